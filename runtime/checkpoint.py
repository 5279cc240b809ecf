"""Checkpoints that are complete or absent, and safe to load from a stranger.

    checkpoints/step_00000200/tensors.safetensors   "model.<parameter>", "optim.<parameter>.<key>"
    checkpoints/step_00000200/checkpoint.json       step, settings, all that is no tensor

A checkpoint is written under another name and renamed when all of it is on the disk, so killing the
program at any moment leaves the previous ones whole. Nothing is pickled: loading runs no code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.files import fsync, write_json

TENSORS, META = "tensors.safetensors", "checkpoint.json"


class NonFiniteError(RuntimeError):
    """The loss, the gradient or the weights are no longer finite."""


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

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        val_loss: float | None,
    ) -> Path:
        """Write a checkpoint and remove those that are no longer kept; returns its folder.

        Raises NonFiniteError, writing nothing, if a tensor holds NaN or infinity, and OSError if
        the disk does not take it; the checkpoints that were there stay.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        host = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        bad = [name for name, t in host.items() if not torch.isfinite(t).all()]
        if bad:
            raise NonFiniteError(f"{bad[0]} is not finite after step {step}")
        final, temporary = self.path(step), self.folder / f"step_{step:08d}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            save_file(host, temporary / TENSORS)
            fsync(temporary / TENSORS)
            write_json(temporary / META, {**meta, "step": step, "val_loss": val_loss})
            if final.exists():  # written before, by a run that was resumed from an older one
                self._remove(step)
            temporary.rename(final)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"cannot write the checkpoint {final} ({error}): make room, then the same command "
                f"continues from the one before"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        fsync(self.folder)
        kept = {*self.steps()[-self.keep :], self.best()}
        for old in set(self.steps()) - kept:
            self._remove(old)
        return final

    def best(self) -> int | None:
        """Step of the checkpoint with the lowest validation loss, if any was evaluated."""
        losses = {
            s: json.loads((self.path(s) / META).read_text())["val_loss"] for s in self.steps()
        }
        measured = {step: loss for step, loss in losses.items() if loss is not None}
        return min(measured, key=measured.__getitem__, default=None)

    def _remove(self, step: int) -> None:
        doomed = self.path(step).rename(self.folder / f"removed_{step:08d}.tmp")
        shutil.rmtree(doomed, ignore_errors=True)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint has all its bytes, without reading the tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path / TENSORS, "pt"):
            return isinstance(json.loads((path / META).read_text()), dict)
    except (OSError, ValueError, SafetensorError):
        return False


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of one checkpoint folder. Raises ValueError if it is not whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path / TENSORS), json.loads((path / META).read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is not a complete checkpoint: {error}") from None
