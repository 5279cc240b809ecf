"""What a checkpoint holds of a run in progress, and how a run goes on from one.

The tokens of a step and torch's random numbers are functions of (seed, step), so weights, optimizer
state, the loss scale and the record's counters are all there is to keep.
"""

from __future__ import annotations

from torch import nn

from optim import Optimizer
from runtime import checkpoint
from runtime.device import Device
from runtime.record import Record
from runtime.run import Run


def save(
    run: Run,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    device: Device,
    record: Record,
    val_loss: float | None,
) -> None:
    """Checkpoint the run after ``step`` updates; ``val_loss`` if it was measured there."""
    record.flush()  # metrics up to this step are on the disk before the checkpoint is
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    tensors |= {f"optim.{name}": t for name, t in optimizer.named_state().items()}
    meta = {"scaler": device.scaler.state_dict(), **record.state()}
    run.checkpoints.save(step, tensors, meta, val_loss)


def resume(
    run: Run, model: nn.Module, optimizer: Optimizer, device: Device, record: Record
) -> tuple[int, float | None]:
    """Load the checkpoint that the run continues from, if any: (step, its validation loss)."""
    if run.start is None:
        return 0, None
    tensors, meta = checkpoint.load(run.start)
    saved = {name.removeprefix("model."): t for name, t in tensors.items() if name[:6] == "model."}
    try:
        model.load_state_dict(saved)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ValueError(f"{run.start} holds another model than model=: {reason}") from None
    optimizer.load_named_state(
        {name.removeprefix("optim."): t for name, t in tensors.items() if name[:6] == "optim."}
    )
    if meta["scaler"]:  # empty unless the precision was fp16
        device.scaler.load_state_dict(meta["scaler"])
    record.load(meta)
    return meta["step"], meta["val_loss"]
