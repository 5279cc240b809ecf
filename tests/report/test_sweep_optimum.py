"""The sweep's answer, from trials whose optimum is known and trials that went wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from generated import falling, sweep, write_run
from test_compare import Page

from report.options import run_command
from report.runs import read_runs
from report.sweep import Options, analyse, main, paste, with_journal

GRID = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)


def run(*words: str) -> int:
    return run_command(Options, main, "doc", words)


def rows(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """AdamW with its optimum at 9e-4; Lion with its optimum beyond the grid; a diverged, a failed
    and an unreadable trial of AdamW."""
    folder = tmp_path / "sweep"
    sweep(folder / "adamw", GRID, (1, 2, 3), 9e-4, 0.05, 0.001)
    sweep(folder / "lion", GRID, (1, 2, 3), 9e-3, 0.05, 0.001, optim__name="lion")
    for number, (lr, said) in enumerate(
        ((8e-3, "NonFiniteError: the loss is nan at step 3"), (1.6e-2, "OSError: disk full"))
    ):
        lost = write_run(
            folder / "adamw" / f"9{number}", falling(3.0, 20), finished=False, optim__lr=lr
        )
        with (lost / "log.txt").open("a") as log:
            log.write(f"ended by {said}\n")
    write_run(folder / "adamw" / "99", falling(3.0, 20))
    (folder / "adamw" / "99" / "config.yaml").unlink()
    return folder


def test_the_answer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(str(folder), f"out={out}") == 0
    said = capsys.readouterr()
    assert said.err.splitlines() == [f"skipped {folder}/adamw/99: config.yaml is missing"]
    adamw, lion = rows(out / "sweep.csv")
    assert (adamw["sweep"], lion["sweep"]) == ("adamw", "lion")
    assert float(adamw["lr"]) == pytest.approx(9e-4, rel=0.03)
    assert float(adamw["low"]) < 9e-4 < float(adamw["high"])
    assert float(adamw["factor"]) == pytest.approx(1.56, abs=0.05)  # exp(sqrt(0.01 / 0.05))
    counts = {name: int(adamw[name]) for name in ("finished", "diverged", "failed", "unfinished")}
    assert counts == {"finished": 15, "diverged": 1, "failed": 1, "unfinished": 0}
    assert adamw["warnings"] == "" and "upper edge: add optim.lr=0.008" in lion["warnings"]
    assert float(lion["lr"]) == 4e-3 and lion["fitted"] == "False"
    assert adamw["paste"] in said.out and adamw["paste"].startswith("optim=adamw optim.lr=0.000")
    assert len(rows(out / "trials.csv")) == 32
    text = (out / "sweep.html").read_text()
    page = Page(text)
    assert all(each.startswith("data:") for each in page.loads) and "upper edge" in page.alarm
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "the loss is nan at step 3" in text


def test_settings_that_are_not_the_learning_rate_make_sweeps_of_their_own(tmp_path: Path) -> None:
    for decay in (0.0, 0.1):
        sweep(tmp_path / f"{decay}", GRID, (1,), 1e-3, 0.05 + decay, 0.0, optim__weight_decay=decay)
    found = analyse(read_runs([tmp_path])[0])
    assert {each.label for each in found} == {"adamw weight_decay=0", "adamw weight_decay=0.1"}
    for each in found:
        decay = each.label.rpartition("=")[2]
        assert paste(each, found) == f"optim=adamw optim.weight_decay={decay} optim.lr=0.001"


def test_what_the_sweep_script_wrote_of_trials_is_read(tmp_path: Path) -> None:
    """Its trials.jsonl knows of a trial that left no run, and why another one stopped."""
    sweep(tmp_path, GRID, (1,), 1e-3, 0.05, 0.0)
    write_run(tmp_path / "pruned", falling(3.0, 20), finished=False, optim__lr=8e-3, seed=1)
    write_run(tmp_path / "lost", falling(3.0, 20), finished=False, optim__lr=1.6e-2, seed=1)
    journal = [
        {"trial": "0", "status": "finished", "val_loss": 3.0},
        {"trial": "pruned", "status": "pruned"},
        {"trial": "lost", "status": "failed", "error": "exit code -9"},
        {"trial": "optim.lr=-1", "status": "failed", "error": "lr must be positive"},
    ]
    lines = [*map(json.dumps, journal), "{damaged", "{torn"]
    (tmp_path / "trials.jsonl").write_text("\n".join(lines))
    runs, skipped = with_journal(*read_runs([tmp_path]), [tmp_path])
    notes = {run.dir.name: (run.status, run.note) for run in runs}
    assert notes["pruned"] == ("unfinished", "pruned")
    assert notes["lost"] == ("failed", "failed: exit code -9")
    assert notes["0"] == ("finished", "")
    assert skipped == [
        f"{tmp_path}/optim.lr=-1: failed: lr must be positive",
        f"{tmp_path}/trials.jsonl, line 5: not the record of a trial",
    ]


def test_a_trial_run_twice_counts_once(tmp_path: Path) -> None:
    sweep(tmp_path / "one", GRID, (1, 2), 1e-3, 0.05, 0.001)
    sweep(tmp_path / "two", GRID, (1, 2), 1e-3, 0.05, 0.001)
    (found,) = analyse(read_runs([tmp_path])[0])
    assert len(found.runs) == 10


def test_a_sweep_in_which_nothing_finished(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "0", falling(3.0), finished=False)
    assert run(str(tmp_path / "runs"), f"out={tmp_path}") == 0
    (row,) = rows(tmp_path / "sweep.csv")
    assert row["lr"] == "" and row["warnings"] == "no trial finished"
