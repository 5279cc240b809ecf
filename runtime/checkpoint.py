"""Checkpoints that are complete or absent, and safe to load from a stranger.

    checkpoints/step_00000200/tensors.safetensors    "model.<parameter>", "optim.<parameter>.<key>"
    checkpoints/step_00000200/checkpoint.json        step, settings, all that is no tensor

(What many processes wrote lies in several files, one or more per process.) A checkpoint is written
under another name and renamed when all of it is on the disk, so killing the program at any moment
leaves the previous ones whole. Nothing is pickled: loading runs no code.

This module finds and reads checkpoints; runtime/sharded_checkpoint.py writes them.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TENSORS, META = "tensors.safetensors", "checkpoint.json"


class Checkpoints:
    """The checkpoints of one run: ``keep`` latest ones and the best."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        found = (p.name.removeprefix("step_") for p in self.folder.glob("step_*"))
        return sorted(int(name) for name in found if name.isdecimal())

    def clean(self) -> list[Path]:
        """Remove what an interrupted write or removal left behind, and set checkpoints aside that
        a crash of the machine or a careless copy has cut off; returns the names of these."""
        for leftover in self.folder.glob("*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        damaged = [path for path in map(self.path, self.steps()) if not is_whole(path)]
        for path in damaged:
            shutil.rmtree(path.with_suffix(".damaged"), ignore_errors=True)
            path.rename(path.with_suffix(".damaged"))
        return damaged

    def prune(self) -> None:
        """Remove those that are no longer kept."""
        kept = {*self.steps()[-self.keep :], self.best()}
        for old in set(self.steps()) - kept:
            self.remove(old)

    def best(self) -> int | None:
        """Step of the checkpoint with the lowest validation loss, if any was evaluated."""
        losses = {
            s: json.loads((self.path(s) / META).read_text())["val_loss"] for s in self.steps()
        }
        measured = {step: loss for step, loss in losses.items() if loss is not None}
        return min(measured, key=measured.__getitem__, default=None)

    def remove(self, step: int) -> None:
        doomed = self.path(step).rename(self.folder / f"removed_{step:08d}.tmp")
        shutil.rmtree(doomed, ignore_errors=True)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint has all its bytes, without reading the tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        files = json.loads((path / META).read_text()).get("files", {TENSORS: None})
        for name, size in files.items():
            if size is not None and (path / name).stat().st_size != size:
                return False
            with safe_open(path / name, "pt"):
                pass
    except (OSError, ValueError, AttributeError, SafetensorError):
        return False
    return True


def read_meta(path: Path) -> dict[str, Any]:
    """What a checkpoint says beside its tensors. ValueError if it is not whole."""
    if not is_whole(path):
        raise ValueError(f"{path} is not a complete checkpoint: take another of {path.parent}")
    meta: dict[str, Any] = json.loads((path / META).read_text())
    return meta


def load(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint whose names start with ``prefix``, whole and on the CPU,
    whichever processes wrote it; and its metadata. Raises ValueError if it is not whole."""
    import torch.distributed.checkpoint as dcp

    meta = read_meta(path)
    reader = dcp.HuggingFaceStorageReader(str(path))
    tensors = {
        name: torch.empty(x.size, dtype=x.properties.dtype)  # type: ignore[union-attr]
        for name, x in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(prefix)
    }
    with warnings.catch_warnings():  # that one process reads alone is meant
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors, meta
