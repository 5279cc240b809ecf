"""Run directories, whole and damaged: what is read, and what is said of the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generated import TOKENS, falling, write_run
from system import Command, here

from report.runs import (
    DIVERGED,
    FAILED,
    FINISHED,
    TRAIN,
    UNFINISHED,
    VAL,
    Malformed,
    read_run,
    read_runs,
)  # fmt: skip


def test_a_run_of_the_trainer_is_read(tiny: Command, tmp_path: Path) -> None:
    folder = here(*tiny).dir
    run, lines = read_run(folder), (folder / "metrics.jsonl").read_text().splitlines()
    table = [json.loads(line) for line in lines]
    assert run.status == FINISHED and run.optimizer == "adamw"
    np.testing.assert_array_equal(run.steps, [line["step"] for line in table])
    np.testing.assert_array_equal(run.tokens, [line["tokens"] for line in table])
    losses = run.series[TRAIN][run.curve(TRAIN)]
    np.testing.assert_array_equal(losses, [r["train/loss"] for r in table if "train/loss" in r])
    summary = json.loads((folder / "summary.json").read_text())
    assert run.final(VAL) == summary["val_loss"]
    # AdamW: two float32 averages of each parameter, padding rows too, and little else
    assert run.state_bytes is not None
    assert 8 * summary["parameters"] <= run.state_bytes < 9 * summary["parameters"]
    assert run.flops_per_token is not None and run.flops_per_token > 6 * summary["parameters"] / 2
    assert run.step_seconds is not None and run.memory_gb is not None


def test_folders_are_searched_and_trials_stay_in_order(tmp_path: Path) -> None:
    for number in (10, 2, 0):
        write_run(tmp_path / "sweep" / f"{number}", falling(3.0))
    write_run(tmp_path / "one", falling(3.0))
    (tmp_path / "empty").mkdir()
    runs, skipped = read_runs([tmp_path / "sweep", tmp_path / "one", tmp_path / "empty"])
    assert [run.dir.name for run in runs] == ["0", "2", "10", "one"]
    assert skipped == [f"{tmp_path / 'empty'}: no run in it"]
    assert len(read_runs([tmp_path, tmp_path / "one"])[0]) == 4  # none twice
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_runs([tmp_path / "nowhere"])


def test_losses_that_are_no_numbers_leave_gaps(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {0: 9.0, 50: 5.0, 100: 4.0}, [5.0] * 100)
    text = (folder / "metrics.jsonl").read_text().replace('"train/loss": 5.0', '"train/loss": NaN')
    (folder / "metrics.jsonl").write_text(text.replace('"val/loss": 5.0', '"val/loss": null'))
    run = read_run(folder)
    assert run.curve(TRAIN).size == 0
    assert run.steps[run.curve(VAL)].tolist() == [0, 100]


def _rewrite(name: str, change: Any) -> Any:
    def damage(run: Path) -> None:
        (run / name).write_text(change((run / name).read_text()))

    return damage


DAMAGES: dict[str, tuple[Any, str]] = {
    "no config": (lambda run: (run / "config.yaml").unlink(), "config.yaml is missing"),
    "no metrics": (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl is missing"),
    "empty metrics": (_rewrite("metrics.jsonl", lambda _: ""), "metrics.jsonl is empty"),
    "torn config": (_rewrite("config.yaml", lambda t: t[: len(t) // 3]), "config.yaml "),
    "config of bytes": (_rewrite("config.yaml", lambda _: "{\0"), "config.yaml is damaged"),
    "config is a list": (_rewrite("config.yaml", lambda _: "- 1"), "no table"),
    "other program": (_rewrite("config.yaml", lambda _: "lr: 1e-3"), "of another program"),
    "torn summary": (_rewrite("summary.json", lambda t: t[:20]), "summary.json is damaged"),
    "damage in the middle": (
        _rewrite("metrics.jsonl", lambda t: t.replace('{"step": 50', '{"st', 1)),
        "metrics.jsonl is damaged (line 6",
    ),
    "two runs in one": (_rewrite("metrics.jsonl", lambda t: t + t), "goes back at line 12"),
    "end is lost": (
        _rewrite("metrics.jsonl", lambda t: "\n".join(t.splitlines()[:5]) + "\n"),
        "truncated: it ends at step 40, the run at 100",
    ),
    "no tokens": (_rewrite("metrics.jsonl", lambda t: t.replace("tokens", "t")), "no tokens"),
    "words": (_rewrite("metrics.jsonl", lambda t: t.replace("3.0}", '"x"}')), "no numbers"),
    "all nan": (
        _rewrite("metrics.jsonl", lambda t: "\n".join(
            json.dumps(json.loads(line) | {"val/loss": None}) for line in t.splitlines())),
        "no finite loss",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_run_is_skipped_with_one_line_that_says_why(tmp_path: Path, name: str) -> None:
    damage, reason = DAMAGES[name]
    write_run(tmp_path / "good", falling(3.0))
    bad = write_run(tmp_path / "bad", falling(3.0))
    damage(bad)
    runs, skipped = read_runs([tmp_path])
    assert [run.dir.name for run in runs] == ["good"]
    (line,) = skipped
    assert line.startswith(f"{bad}: ") and reason in line and "\n" not in line


def test_a_torn_last_line_costs_nothing_but_itself(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", falling(3.0), finished=False)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[:-20])
    run = read_run(folder)
    assert run.steps[-1] == 90 and run.status == UNFINISHED and run.final(VAL) is None


@pytest.mark.parametrize(
    ("log", "status"),
    [
        ("ended by NonFiniteError: the loss is nan at step 7\n", DIVERGED),
        ("ended by OutOfMemoryError: CUDA out of memory\nTried to allocate\n", FAILED),
        ("ended by KeyboardInterrupt: \nrun x: continuing at step 5\n", UNFINISHED),
        ("", UNFINISHED),
    ],
)
def test_how_a_run_ended(tmp_path: Path, log: str, status: str) -> None:
    folder = write_run(tmp_path / "run", falling(3.0), finished=False)
    with (folder / "log.txt").open("a") as file:
        file.write(log)
    run = read_run(folder)
    assert run.status == status and run.note
    assert run.final(VAL) is None


def test_ending_above_the_beginning_is_divergence(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", {0: 10.8, 50: 7.0, 100: 11.0}))
    assert run.status == DIVERGED and "above its first" in run.note


def test_a_trial_that_never_began_says_why(tmp_path: Path) -> None:
    folder = tmp_path / "3"
    folder.mkdir()
    (folder / ".run.lock").touch()
    (folder / "log.txt").write_text("ended by ValueError: no such file\n")
    with pytest.raises(Malformed, match=r"before its first step \(ValueError: no such file"):
        read_run(folder)


def test_costs_of_a_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", train=[4.0, 3.0, 2.0], second=0.25)
    run = read_run(folder)
    assert run.state_bytes == 100 and run.flops_per_token == 1000
    assert run.step_seconds == pytest.approx(0.25) and run.memory_gb == 2.5
    assert run.flops is not None and run.flops[-1] == 3 * TOKENS * 1000
    exact = {"optim__correction": "mars", "optim__mars": {"exact": True}}
    twice = read_run(write_run(tmp_path / "exact", train=[4.0, 3.0, 2.0], **exact))
    assert twice.flops is not None and twice.flops[-1] == 2 * run.flops[-1]
    # what a newer version writes down itself comes first
    new = {"state_bytes": 7, "flops_per_token": 5}
    run = read_run(write_run(tmp_path / "new", train=[4.0, 3.0, 2.0], summary=new))
    assert (run.state_bytes, run.flops_per_token) == (7, 5)
