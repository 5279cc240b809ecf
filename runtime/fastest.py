"""What is measured once, before the first step: which of several ways to compute the same is the
fastest on this device, at this model's shapes.

The name that was found goes into the run's config.yaml. The ways round differently, and a run that
is continued must not: it takes what it began with.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from runtime.config import AUTO, TrainConfig
from runtime.processes import Processes
from runtime.run import Run, recorded

WARM_UP, REPEAT = 3, 5  # calls, turns
CALLS = 10  # of a turn: a GPU computes one while the host launches the next, as in training
# of the largest entry; products in float32 may run in TF32
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-3,
    torch.bfloat16: 3e-2,
    torch.float16: 5e-3,
}


def settle(
    train: TrainConfig,
    key: str,
    run: Run,
    processes: Processes,
    measure: Callable[[], dict[str, float]],
    otherwise: str,
    works: Callable[[str], bool] = lambda name: True,
) -> None:
    """Replace train.<key>=auto by a name, the same on all processes: the one that the run began
    with, if it ``works`` here, else that of the fewest seconds of ``measure``, or ``otherwise``
    where there is nothing to measure."""
    if getattr(train, key) != AUTO:
        return

    def choose() -> tuple[str, str]:
        before = recorded(run.dir, key)
        if before not in (None, AUTO) and works(before):
            return before, "as this run began"
        times = measure()
        if not times:
            return otherwise, ""
        found = min(times, key=lambda name: times[name])
        return found, ", ".join(f"{name} {1e3 * t:.2f} ms" for name, t in times.items())

    found, why = processes.decide(choose)
    setattr(train, key, found)
    if why:
        run.notes.append(f"train.{key}=auto: {found} ({why})")


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Of one call: the median of turns of CALLS, from an idle device to an idle device, after some
    calls that compile."""
    for _ in range(WARM_UP):
        work()
    taken = []
    for _ in range(REPEAT):
        _wait(device)
        start = time.perf_counter()
        for _ in range(CALLS):
            work()
        _wait(device)
        taken.append((time.perf_counter() - start) / CALLS)
    return statistics.median(taken)


def agree(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether they are the same but for the rounding of ``dtype``; what is not finite is not."""
    pairs = zip(found, expected, strict=True)
    return all((a - b).abs().max() <= TOLERANCE[dtype] * b.abs().max() for a, b in pairs)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
