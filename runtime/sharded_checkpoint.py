"""Checkpoints of many processes: written together while training goes on, read by any number.

    checkpoints/step_00000200/tensors.safetensors      one process: one file
    checkpoints/step_00000200/shard-<rank>-....        many: what each process holds
    checkpoints/step_00000200/checkpoint.json          step, settings, the files and their sizes

A checkpoint is a flat dictionary, name -> tensor, of which each process gives what it holds: a
tensor that all have (written once), one that it alone has (an owner's state), or its rows of one (a
DTensor). Whoever loads asks for what it holds then, which may be cut in another way. The files are
safetensors, written and read by torch.distributed.checkpoint: nothing is pickled, so loading runs
no code.

Writing happens beside training, one checkpoint at a time, in a folder of another name, which rank 0
renames when all processes' bytes are on the disk.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from runtime.checkpoint import META, TENSORS, Checkpoints, NonFiniteError
from runtime.files import atomic_path, fsync, write_json
from runtime.processes import Processes


class SharedCheckpoints(Checkpoints):
    """The checkpoints of a run of any number of processes; each makes one and calls the same
    methods in the same order."""

    def __init__(self, folder: Path, keep: int, processes: Processes) -> None:
        super().__init__(folder, keep)
        self.processes = processes
        # Its own, for its messages mix with those of no other group and of no other checkpoint.
        self._group = dist.new_group(backend="gloo") if processes.control is not None else None
        self._writing: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        val_loss: float | None,
    ) -> Path:
        """Start to write what this process holds, as it is now; returns the folder that will be
        there. Waits for the checkpoint before, and raises what went wrong with it (OSError).

        Raises NonFiniteError, writing nothing, if a tensor holds NaN or infinity.
        """
        self.wait()
        check_finite(tensors, step)
        final, temporary = self.path(step), self.folder / f"step_{step:08d}.tmp"
        if self.processes.first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.processes.barrier()
        written = self._start(dict(tensors), temporary)
        content = {**meta, "step": step, "val_loss": val_loss}

        def finish() -> None:
            try:
                written()
                if self.processes.first:
                    self._commit(temporary, final, content)
            except BaseException as error:  # raised by the next wait
                self._error = error

        self._writing = threading.Thread(target=finish, name="checkpoint", daemon=True)
        self._writing.start()
        return final

    def wait(self) -> None:
        """Until the checkpoint that is being written is there. OSError if it could not be."""
        if self._writing is None:
            return
        self._writing.join()
        self._writing, error, self._error = None, self._error, None
        if error is not None:
            raise OSError(
                f"cannot write the checkpoint ({error}): make room, then the same command "
                f"continues from the one before"
            ) from error

    def _start(self, tensors: dict[str, Tensor], folder: Path) -> Any:
        """Copy the tensors and write the copies in the background; what it returns waits."""
        if self._group is None:
            host = {
                name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()
            }
            return lambda: write_alone(host, folder / TENSORS)
        import torch.distributed.checkpoint as dcp

        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        future = dcp.async_save(tensors, storage_writer=writer, process_group=self._group)
        return future.result  # type: ignore[union-attr]

    def _commit(self, temporary: Path, final: Path, content: dict[str, Any]) -> None:
        sizes = {p.name: p.stat().st_size for p in sorted(temporary.glob("*.safetensors"))}
        write_json(temporary / META, {**content, "files": sizes})
        fsync(temporary)
        if final.exists():  # written before, by a run that was resumed from an older one
            self._remove(int(final.name.removeprefix("step_")))
        os.rename(temporary, final)
        fsync(self.folder)
        kept = {*self.steps()[-self.keep :], self.best()}
        for old in set(self.steps()) - kept:
            self._remove(old)


def write_alone(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    fsync(path)


def check_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    """NonFiniteError naming the first tensor that holds NaN or infinity. Reads the device once."""
    local = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    if not local:
        return
    device = next(iter(local.values())).device
    finite = torch.stack([torch.isfinite(t).all().to(device) for t in local.values()])
    if not finite.all():
        bad = list(local)[int((~finite).int().argmax())]
        raise NonFiniteError(f"{bad} is not finite after step {step}")


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
        raise ValueError(f"{path} is not a complete checkpoint")
    meta: dict[str, Any] = json.loads((path / META).read_text())
    return meta


@torch.no_grad()
def load_into(path: Path, tensors: Mapping[str, Tensor], processes: Processes) -> None:
    """Fill the tensors that this process holds (see above) from a checkpoint, in place.

    Raises ValueError, before anything is changed and on every rank, if what all processes ask for
    is not exactly what the checkpoint has: a tensor missing, left over, of another shape or dtype.
    """
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(path))
    stored = {
        name: (tuple(x.size), x.properties.dtype)  # type: ignore[union-attr]
        for name, x in reader.read_metadata().state_dict_metadata.items()
    }
    asked = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    together = {name: x for part in processes.gather(asked) for name, x in part.items()}
    if together.keys() != stored.keys():
        missing, extra = (
            sorted(together.keys() - stored.keys()),
            sorted(stored.keys() - together.keys()),
        )
        raise ValueError(
            f"{path} is of another model or optimizer: it lacks {len(missing)} tensors "
            f"{missing[:3]}, and has {len(extra)} that are not asked for {extra[:3]}"
        )
    for name, (shape, dtype) in together.items():
        if (shape, dtype) != stored[name]:
            raise ValueError(
                f"{path} has {name} as {stored[name][1]} {stored[name][0]}, "
                f"expected {dtype} {shape}"
            )
    _load(dict(tensors), reader, processes.control)


def load_whole(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """All tensors of a checkpoint whose names start with ``prefix``, whole, on the CPU, whichever
    processes wrote it."""
    import torch.distributed.checkpoint as dcp

    read_meta(path)
    reader = dcp.HuggingFaceStorageReader(str(path))
    tensors = {
        name: torch.empty(x.size, dtype=x.properties.dtype)  # type: ignore[union-attr]
        for name, x in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(prefix)
    }
    _load(tensors, reader, None)
    return tensors


def _load(tensors: dict[str, Any], reader: Any, group: dist.ProcessGroup | None) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():  # that one process reads alone is meant
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)


def export(path: Path, file: Path, prefix: str = "") -> None:
    """Write a checkpoint's tensors as one safetensors file that any program reads."""
    from safetensors.torch import save_file

    with atomic_path(file) as temporary:
        save_file(load_whole(path, prefix), temporary)
