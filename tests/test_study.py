"""The study's commands are valid, and its page shows what its runs say."""

from __future__ import annotations

import csv
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from report.comparison import compare
from report.runs import read_runs
from scripts.compose import compose_config
from scripts.sweep_plan import listed, split_overrides

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"


def test_every_sweep_of_the_study_composes(tmp_path: Path) -> None:
    said = subprocess.run(
        ["bash", ROOT / "scripts" / "study.sh", tmp_path, "train.steps=500"],
        env=os.environ | {"PYTHON": "echo"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [shlex.split(line) for line in said.stdout.splitlines()]
    sweeps = [words for words in lines if words[:2] == ["-m", "scripts.sweep"]]
    assert len(sweeps) == 10
    for words in sweeps:
        overrides = words[3 : words.index("--extend")]
        fixed, swept = split_overrides(overrides)
        first = [f"{key}={values[0]}" for key, values in listed(swept).items()]
        config = compose_config([*fixed, *first])
        assert config.train.steps == 500
        assert Path(words[2]).name == config.optim["name"]


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, str]]:
    with (RESULTS / "settings.csv").open() as file:
        return {row["optimizer"]: row for row in csv.DictReader(file)}


def test_the_results_are_those_of_the_runs(rows: dict[str, dict[str, str]]) -> None:
    names = [(RESULTS / "runs" / name / "best_runs.txt").read_text().split() for name in rows]
    runs, skipped = read_runs([ROOT / folder for each in names for folder in each])
    assert not skipped and len(runs) == 3 * len(rows)
    found = compare(runs, baseline="adamw")
    assert [row.group.optimizer for row in found.rows] == list(rows)
    for row in found.rows:
        assert row.final is not None
        assert row.final.value == pytest.approx(float(rows[row.group.optimizer]["final"]))


def test_readme_shows_the_results(rows: dict[str, dict[str, str]]) -> None:
    readme = (ROOT / "README.md").read_text()
    for name, row in rows.items():
        (line,) = (text for text in readme.splitlines() if text.startswith(f"| {name} |"))
        assert f"{float(row['final']):.3f}" in line
