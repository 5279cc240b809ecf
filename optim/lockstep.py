"""Sums over whole tensors in rules that see a part of them, one reduction for all tensors at once.

A rule of granularity "tensor" is written for a whole tensor: ``h / rms(h)``. Where each process has
some rows only, every sum over a tensor must run over all processes, and an all-reduce of its own
for each of 148 tensors would cost more than the update (docs/distributed.md). So such sums go
through `total`, and the engine runs the updates of all tensors side by side: each up to its next
`total`, then one reduction of everything asked for, then on. An update is an ordinary function that
is suspended there (a greenlet, which needs the package of that name); it knows nothing of it.

Where a process holds whole tensors, `total` returns its argument and nothing is suspended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")
Parts = tuple[Tensor, ...]
Reduce = Callable[[list[Tensor]], list[Tensor]]

_suspend: Callable[[Parts], Parts] | None = None  # how to wait for a sum; None: it is at hand


def in_parts() -> bool:
    """Whether tensors are being updated in parts, so that a sum over one needs `total`."""
    return _suspend is not None


def total(*parts: Tensor) -> Parts:
    """Each tensor summed over all processes that hold a part of the tensor being updated. Sums
    asked for together travel together."""
    return parts if _suspend is None else _suspend(parts)


def lockstep(tasks: Sequence[Callable[[], T]], reduce: Reduce) -> list[T]:
    """Results of all tasks, run side by side. ``reduce`` gets what all of them have asked `total`
    for since the last time, in order, and returns the sums; tasks may ask for different numbers of
    sums, but each must ask for the same ones on every process."""
    from greenlet import getcurrent, greenlet

    global _suspend
    if _suspend is not None:
        raise RuntimeError("lockstep does not nest")
    main = getcurrent()
    updates = [greenlet(task, main) for task in tasks]
    results: dict[int, Any] = {}
    answers: dict[int, tuple[Any, ...]] = dict.fromkeys(range(len(tasks)), ())
    _suspend = main.switch
    try:
        while answers:
            asked: dict[int, Parts] = {}
            for i, answer in answers.items():
                value = updates[i].switch(*answer)
                if updates[i].dead:
                    results[i] = value
                else:
                    asked[i] = value
            sums = iter(
                reduce([part for parts in asked.values() for part in parts]) if asked else []
            )
            answers = {i: (tuple(next(sums) for _ in parts),) for i, parts in asked.items()}
    finally:
        _suspend = None
    return [results[i] for i in range(len(tasks))]
