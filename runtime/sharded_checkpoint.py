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

import os
import shutil
import threading
import traceback
import warnings
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.checkpoint import META, TENSORS, Checkpoints, load
from runtime.errors import NonFiniteError
from runtime.files import atomic_path, fsync, write_json
from runtime.processes import Processes


class SharedCheckpoints(Checkpoints):
    """The checkpoints of a run of any number of processes; each makes one and calls the same
    methods in the same order."""

    def __init__(self, folder: Path, keep: int, processes: Processes) -> None:
        super().__init__(folder, keep)
        self.processes = processes
        # Its own, for its messages mix with those of no other group and of no other checkpoint.
        self._group: dist.ProcessGroup | None = None
        if processes.control is not None:
            limit = timedelta(seconds=processes.timeout)
            self._group = dist.new_group(backend="gloo", timeout=limit)
        self._writing: threading.Thread | None = None
        self._error: BaseException | None = None
        self._target: Path | None = None

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
        self._check_finite(tensors, step)
        final, temporary = self.path(step), self.folder / f"step_{step:08d}.tmp"
        self._target = final
        if self.processes.first:
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                temporary.mkdir(parents=True)
            except OSError as error:
                raise self._failure(error) from error
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
                if self.processes.size == 1:
                    shutil.rmtree(temporary, ignore_errors=True)

        self._writing = threading.Thread(target=finish, name="checkpoint", daemon=True)
        self._writing.start()
        return final

    def wait(self) -> None:
        """Until the checkpoint that is being written is there. OSError if it could not be, or, of
        several processes, is not in time; RuntimeError if another one is gone or late."""
        if self._writing is None:
            return
        limit = 2 * self.processes.timeout  # for what is written here, then for the others
        self._writing.join(None if self.processes.size == 1 else limit)
        if self._writing.is_alive():
            raise OSError(
                f"the checkpoint {self._target} is still being written after {limit:g} s of "
                f"waiting: the disk hangs, or is too slow for parallel.timeout={limit / 2:g}"
            )
        self._writing, error, self._error = None, self._error, None
        if self._group is not None and isinstance(error, RuntimeError):
            raise error  # of a message: what happened says the process that is gone or late
        if error is not None:
            raise self._failure(error) from error

    def _failure(self, error: BaseException) -> OSError:
        return OSError(
            f"cannot write the checkpoint {self._target} ({reason(error)}): make room, then the "
            f"same command continues from the one before"
        )

    def _check_finite(self, tensors: Mapping[str, Tensor], step: int) -> None:
        found = self.processes.gather(not_finite(tensors))
        if (bad := next((name for name in found if name is not None), None)) is not None:
            raise NonFiniteError(f"{bad} is not finite after step {step}")

    def __enter__(self) -> SharedCheckpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """What was begun is finished, unless an error may have ended the others already."""
        together = error is None or isinstance(error, NonFiniteError)  # which all raise at once
        if together or self.processes.size == 1:
            self.wait()

    def _start(self, tensors: dict[str, Tensor], folder: Path) -> Any:
        """Copy the tensors and write the copies in the background; what it returns waits."""
        if self._group is None:
            host = {
                name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()
            }
            return lambda: write_alone(host, folder / TENSORS)
        import torch.distributed.checkpoint as dcp

        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        # Not dcp.async_save: its thread is waited for when Python exits, also when it hangs.
        # `stage` copies to the CPU, and so leaves the writer nothing to ask a GPU for.
        host = writer.stage(tensors)
        return partial(dcp.save, host, storage_writer=writer, process_group=self._group)

    def _commit(self, temporary: Path, final: Path, content: dict[str, Any]) -> None:
        sizes = {p.name: p.stat().st_size for p in sorted(temporary.glob("*.safetensors"))}
        write_json(temporary / META, {**content, "files": sizes})
        fsync(temporary)
        if final.exists():  # written before, by a run that was resumed from an older one
            self.remove(int(final.name.removeprefix("step_")))
        os.rename(temporary, final)
        fsync(self.folder)
        self.prune()


def reason(error: BaseException) -> str:
    """Why a checkpoint could not be written, in a line: DCP's error is the tracebacks of all."""
    from torch.distributed.checkpoint.api import CheckpointException

    if not isinstance(error, CheckpointException):
        return str(error)
    rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
    return f"rank {rank}: {traceback.format_exception_only(cause)[-1].strip()}"


def write_alone(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    fsync(path)


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor that holds NaN or infinity. Reads the device once."""
    local = {name: t.to_local() if hasattr(t, "to_local") else t for name, t in tensors.items()}
    if not local:
        return None
    device = next(iter(local.values())).device
    finite = torch.stack([torch.isfinite(t).all().to(device) for t in local.values()])
    return None if finite.all() else list(local)[int((~finite).int().argmax())]


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
    for part, what in KINDS.items():
        problem = _difference(
            {name: x for name, x in stored.items() if name.startswith(part)},
            {name: x for name, x in together.items() if name.startswith(part)},
        )
        if problem is not None:
            raise ValueError(f"{path} {what}: {problem}")
    _load(dict(tensors), reader, processes.control)


KINDS = {  # of tensors, by the start of their names; and what it means if they are others
    "model.": "holds another model than model=",
    "optim.": "goes with other settings: the saved optimizer state is another optimizer's",
}
Kind = tuple[tuple[int, ...], torch.dtype]  # shape and dtype


def _difference(stored: Mapping[str, Kind], asked: Mapping[str, Kind]) -> str | None:
    """How what is asked for differs from what is stored, if it does."""
    if stored.keys() != asked.keys():
        missing, extra = sorted(asked.keys() - stored.keys()), sorted(stored.keys() - asked.keys())
        return f"{len(missing)} missing {missing[:3]}, {len(extra)} left over {extra[:3]}"
    for name, (shape, dtype) in asked.items():
        if (shape, dtype) != stored[name]:
            return (
                f"size mismatch for {name.partition('.')[2]}: saved {stored[name][1]} "
                f"{stored[name][0]}, expected {dtype} {shape}"
            )
    return None


def _load(tensors: dict[str, Any], reader: Any, group: dist.ProcessGroup | None) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():  # that one process reads alone is meant
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)


def export(path: Path, file: Path, prefix: str = "") -> None:
    """Write a checkpoint's tensors as one safetensors file that any program reads."""
    from safetensors.torch import save_file

    with atomic_path(file) as temporary:
        save_file(load(path, prefix)[0], temporary)
