"""What a checkpoint holds of a run in progress, and how a run goes on from one.

What many processes hold is written and read together (runtime/sharded_checkpoint.py), and their
number may change between. The tokens of a step and torch's random numbers are functions of (seed,
step), so weights, optimizer state, the loss scale and the record's counters are all there is to
keep.
"""

from __future__ import annotations

from torch import Tensor, nn

from optim import Optimizer
from runtime.checkpoint import read_meta
from runtime.device import Device
from runtime.processes import Processes
from runtime.record import Record
from runtime.run import Run
from runtime.sharded_checkpoint import SharedCheckpoints, load_into


def save(
    checkpoints: SharedCheckpoints,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    device: Device,
    record: Record,
    val_loss: float | None,
) -> None:
    """Checkpoint the run after ``step`` updates; ``val_loss`` if it was measured there."""
    record.flush()  # metrics up to this step are on the disk before the checkpoint is
    meta = {"scaler": device.scaler.state_dict(), **record.state()}
    checkpoints.save(step, held(model, optimizer), meta, val_loss)


def held(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """What this process holds of the run's tensors, by their names in a checkpoint."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    return tensors | {f"optim.{name}": t for name, t in optimizer.named_state().items()}


def resume(
    run: Run,
    model: nn.Module,
    optimizer: Optimizer,
    device: Device,
    record: Record,
    processes: Processes,
) -> tuple[int, float | None]:
    """Load the checkpoint that the run continues from, if any: (step, its validation loss)."""
    if run.start is None:
        return 0, None
    meta = read_meta(run.start)
    load_into(run.start, held(model, optimizer), processes)
    if meta["scaler"]:  # empty unless the precision was fp16
        device.scaler.load_state_dict(meta["scaler"])
    record.load(meta)
    return meta["step"], meta["val_loss"]
