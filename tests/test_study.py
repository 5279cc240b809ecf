"""The study's commands are valid, what is published of it is what its runs say, and no more."""

from __future__ import annotations

import csv
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from report.comparison import compare
from report.runs import read_runs
from scripts.compose import compose_config
from scripts.publish_study import analyse, copy, main, table
from scripts.sweep import parse
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
        args = parse(words[2:])
        assert (args.extend, args.refine, args.then) == ("optim.lr", 1, ["seed=2,3"])
        fixed, swept = split_overrides(args.overrides)
        first = [f"{key}={values[0]}" for key, values in listed(swept).items()]
        config = compose_config([*fixed, *first])
        assert config.train.steps == 500
        assert args.folder.name == config.optim["name"]


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


def test_the_pages_show_the_results(rows: dict[str, dict[str, str]]) -> None:
    shown = table(RESULTS)
    assert shown in (RESULTS / "README.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()[2:]]
    assert [line[0] for line in lines] == list(rows)
    readme = (ROOT / "README.md").read_text().splitlines()
    for setting, lr, _, final, difference, p, _ in lines:
        (row,) = (text for text in readme if text.startswith(f"| {setting} |"))
        assert [cell.strip() for cell in row.split("|")[1:-1]] == [
            setting,
            lr,
            final,
            difference,
            p,
        ]


# ---- publishing ----------------------------------------------------------------------------------

# what a run of somebody's has where the published one has the second
PRIVATE = {
    "/home/someone/my study/adamw": "docs/results/runs/adamw",
    "/home/someone/openwebtext_sample.jsonl.xz": "openwebtext_sample.jsonl.xz",
    "/opt/venv/bin/python /home/someone/repo/train.py": "python train.py",
    '"/tmp/torchinductor_someone"': '""',
}


def test_what_is_published_has_no_paths_and_nothing_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    published = {
        file.relative_to(RESULTS / "runs"): file.read_text()
        for file in (RESULTS / "runs" / "adamw").rglob("*")
        if file.is_file()
    }
    for name, text in published.items():
        for word, short in PRIVATE.items():
            text = text.replace(short, word)
        (tmp_path / "study" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "study" / name).write_text(text)
    run = next(tmp_path.glob("study/adamw/lr-*"))
    (run / "log.txt").write_text("by someone")
    (run / "checkpoints").mkdir()
    copy(Path("study"), Path("docs/results/runs"))
    found = {
        file.relative_to("docs/results/runs"): file.read_text()
        for file in Path("docs/results/runs").rglob("*")
        if file.is_file()
    }
    assert found == published


def test_nothing_is_published_over_other_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(RESULTS / "runs" / "adamw", tmp_path / "study" / "adamw")
    assert main([str(tmp_path), str(tmp_path / "out")]) == 1
    assert "has no sweep in it" in capsys.readouterr().err
    shutil.copytree(RESULTS / "runs" / "adamw" / "lr-0.01", tmp_path / "out" / "runs" / "mine")
    assert main([str(tmp_path / "study"), str(tmp_path / "out")]) == 1
    assert f"{tmp_path / 'out' / 'runs' / 'mine'} is not in" in capsys.readouterr().err
    shutil.copytree(tmp_path / "out" / "runs" / "mine", tmp_path / "study" / "adamw" / "lr-0.02")
    assert main([str(tmp_path / "study"), str(tmp_path / "new")]) == 1
    assert "lr-0.02 has not ended" in capsys.readouterr().err
    (tmp_path / "study" / "adamw" / "best_runs.txt").unlink()
    assert main([str(tmp_path / "study"), str(tmp_path / "new")]) == 1
    assert "best_runs.txt names no run" in capsys.readouterr().err
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "README.md").write_text("a page without a table")
    assert main([str(tmp_path / "study"), str(tmp_path / "new")]) == 1
    assert "around what is generated" in capsys.readouterr().err


@pytest.mark.slow
def test_the_tables_are_made_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(RESULTS / "runs", "docs/results/runs")
    analyse(Path("docs/results"))
    for name in ("settings", "runs", "sweep", "trials"):
        with (RESULTS / f"{name}.csv").open() as one, open(f"docs/results/{name}.csv") as other:
            for expected, found in zip(csv.reader(one), csv.reader(other), strict=True):
                assert list(map(cell, found)) == list(map(cell, expected))
    for name in ("loss", "final", "sweep"):
        assert Path(f"docs/results/{name}.png").stat().st_size > 10_000


def cell(text: str) -> str:
    """Numbers to six digits: fits and sums may round otherwise elsewhere."""
    try:
        return f"{float(text):.6g}"
    except ValueError:
        return text
