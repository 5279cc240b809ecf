"""A checkpoint is complete or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.checkpoint import META, TENSORS, load
from runtime.errors import NonFiniteError
from runtime.processes import Processes
from runtime.sharded_checkpoint import SharedCheckpoints

TENSOR = {"model.w": torch.arange(6.0).view(2, 3), "optim.w.step": torch.tensor(3.0).double()}


def checkpoints_in(folder: Path, keep: int) -> SharedCheckpoints:
    return SharedCheckpoints(folder, keep, Processes())


def saved(checkpoints: SharedCheckpoints, *what: Any) -> Path:
    path = checkpoints.save(*what)
    checkpoints.wait()
    return path


def test_round_trip_is_exact(tmp_path: Path) -> None:
    tensors = {**TENSOR, "model.bf16": torch.randn(5).bfloat16(), "model.t": torch.randn(3, 4).T}
    path = saved(checkpoints_in(tmp_path, 1), 7, tensors, {"scaler": {}, "x": 0.1}, 1.5)
    loaded, meta = load(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[k], t) and loaded[k].dtype == t.dtype for k, t in tensors.items())
    files = {TENSORS: (path / TENSORS).stat().st_size}
    assert meta == {"scaler": {}, "x": 0.1, "step": 7, "val_loss": 1.5, "files": files}


def test_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path, 2)
    for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 4.0)]:
        saved(checkpoints, step, TENSOR, {}, loss)
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best() == 2


def test_a_half_written_one_is_not_seen_and_is_cleaned(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path, 2)
    saved(checkpoints, 1, TENSOR, {}, None)
    half = tmp_path / "step_00000002.tmp"
    half.mkdir()
    (half / TENSORS).write_bytes(b"half")
    assert checkpoints.steps() == [1]
    checkpoints.clean()
    assert not half.exists()
    assert checkpoints.steps() == [1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_written(tmp_path: Path, bad: float) -> None:
    checkpoints = checkpoints_in(tmp_path, 1)
    saved(checkpoints, 1, TENSOR, {}, None)
    with pytest.raises(NonFiniteError, match=r"model\.w is not finite after step 2"):
        saved(checkpoints, 2, {"model.w": torch.tensor([1.0, bad])}, {}, None)
    assert checkpoints.steps() == [1]


def test_a_write_that_fails_leaves_the_older_ones(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path, 1)
    saved(checkpoints, 1, TENSOR, {}, None)
    with pytest.raises(OSError, match="make room"):  # no JSON: fails after the tensors are there
        saved(checkpoints, 2, TENSOR, {(1, 2): 3}, None)  # type: ignore[dict-item]
    assert checkpoints.steps() == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_one_of_an_older_version_still_loads(tmp_path: Path) -> None:
    """Which did not write down its files."""
    path = saved(checkpoints_in(tmp_path, 1), 3, TENSOR, {}, None)
    meta = json.loads((path / META).read_text())
    del meta["files"]
    (path / META).write_text(json.dumps(meta))
    assert all(torch.equal(t, TENSOR[name]) for name, t in load(path)[0].items())


@pytest.mark.parametrize("file", [TENSORS, META])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_one_is_named(tmp_path: Path, file: str, damage: str) -> None:
    path = saved(checkpoints_in(tmp_path, 1), 1, TENSOR, {}, None)
    target = path / file
    content = target.read_bytes()
    target.unlink()
    if damage == "cut":
        target.write_bytes(content[:-5])
    with pytest.raises(ValueError, match="step_00000001 is not a complete checkpoint"):
        load(path)
