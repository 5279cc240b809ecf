"""metrics.jsonl survives kills: cut anywhere, resumed anywhere, no step lost or written twice."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.metrics import MetricsLog, read_metrics


def train(log: MetricsLog, first: int, last: int) -> None:
    """A deterministic run: the values of a step depend on the step alone."""
    for step in range(first, last + 1):
        values = {"train/loss": 10.0 / (step + 3), "lr": 6e-4 * math.sin(step)}
        if step % 4 == 0:
            values["val/loss"] = 10.1 / (step + 3)
        log.log(step, 512 * step, 0.25 * step, values)


def whole_run(run_dir: Path, last: int) -> bytes:
    log = MetricsLog(run_dir, [], None)
    train(log, 0, last)
    log.close()
    return (run_dir / "metrics.jsonl").read_bytes()


def test_a_record_is_one_line_readable_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, [], None)
    log.log(1, 512, 0.12345, {"train/loss": 2.5, "lr": 1e-3})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 1, "tokens": 512, "time_s": 0.123, "train/loss": 2.5, "lr": 0.001}\n'
    assert read_metrics(tmp_path / "metrics.jsonl") == [json.loads(line)]
    log.close()


def test_values_come_back_exactly(tmp_path: Path) -> None:
    value = 0.1 + 0.2
    log = MetricsLog(tmp_path, [], None)
    log.log(0, 0, 0.0, {"double": value, "tensor": torch.tensor(1 / 3)})
    log.close()
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["double"] == value and record["tensor"] == torch.tensor(1 / 3).item()


def test_not_finite_is_null_in_valid_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, [], None)
    log.log(1, 1, 0.0, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
    log.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert [record[name] for name in "abcd"] == [None, None, None, 1.0]


@pytest.fixture
def no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of rewrites need not wait for the disk: nobody pulls the plug here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def test_cut_at_every_byte_and_resumed_equals_never_interrupted(
    tmp_path: Path, no_disk: None
) -> None:
    last = 5
    whole = whole_run(tmp_path / "whole", last)
    lines = whole.splitlines(keepends=True)
    cut_dir = tmp_path / "cut"
    cut_dir.mkdir()
    path = cut_dir / "metrics.jsonl"
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        complete = len(read_metrics(path))
        resume_step = (complete - 1) // (1 + size % 2)  # the last line, or one in the middle
        log = MetricsLog(cut_dir, [], resume_step)
        assert path.read_bytes() == b"".join(lines[: resume_step + 1])
        train(log, resume_step + 1, last)
        log.close()
        assert path.read_bytes() == whole
    assert sorted(os.listdir(cut_dir)) == ["metrics.jsonl"]  # no temporary file left


def test_every_cut_keeps_the_exact_prefix(tmp_path: Path, no_disk: None) -> None:
    whole = whole_run(tmp_path / "whole", 5)
    lines = whole.splitlines(keepends=True)
    path = tmp_path / "metrics.jsonl"
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        # A line whose end alone is missing is complete: a JSON object closes with its last byte.
        complete = (whole[:size] + b"\n").count(b"}\n")
        MetricsLog(tmp_path, [], 1000).close()
        assert path.read_bytes() == b"".join(lines[:complete])


def test_resume_does_not_repeat_the_evaluation_of_its_step(tmp_path: Path) -> None:
    whole_run(tmp_path, 8)
    log = MetricsLog(tmp_path, [], 4)
    log.log(4, 2048, 99.0, {"val/loss": 3.0})
    log.log(5, 2560, 99.0, {"train/loss": 3.0})
    log.close()
    assert [record["step"] for record in read_metrics(log.path)] == [0, 1, 2, 3, 4, 5]


def test_resume_in_an_empty_directory(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "new", [], 40)  # forked from another run's checkpoint
    log.log(41, 1, 0.0, {})
    log.close()
    assert [record["step"] for record in read_metrics(log.path)] == [41]


def test_untouched_file_is_not_rewritten(tmp_path: Path) -> None:
    whole_run(tmp_path, 8)
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    MetricsLog(tmp_path, [], 8).close()
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before


def test_steps_must_increase(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, [], None)
    log.log(3, 1, 0.0, {})
    for step in (3, 2):
        with pytest.raises(ValueError, match=f"step {step} after those of step 3"):
            log.log(step, 1, 0.0, {})
    log.close()


def test_a_new_run_does_not_take_over_a_used_directory(tmp_path: Path) -> None:
    whole = whole_run(tmp_path, 3)
    with pytest.raises(FileExistsError, match=r"run\.dir"):
        MetricsLog(tmp_path, [], None)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_damage_before_the_last_line_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)
    path.write_bytes(b'{"step": 1}\n\0\0\0\0')  # a power cut leaves zeros
    assert read_metrics(path) == [{"step": 1}]


def test_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl does not exist"):
        read_metrics(tmp_path / "metrics.jsonl")


class ListMirror:
    def __init__(self) -> None:
        self.records: list[Mapping[str, Any]] = []
        self.closed = 0

    def write(self, record: Mapping[str, Any]) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed += 1


def test_mirrors_get_what_the_file_gets(tmp_path: Path) -> None:
    mirrors = [ListMirror(), ListMirror()]
    log = MetricsLog(tmp_path, mirrors, None)
    train(log, 0, 5)
    log.close()
    log.close()
    for mirror in mirrors:
        assert mirror.records == read_metrics(log.path)
        assert mirror.closed == 1
