"""What is done after each step beside the training itself: profiling, and collecting garbage.

Python's collector runs when so many objects have been made, on every process of a job at another
moment, and all then wait for one. Here what exists when training begins is set aside, and the rest
is looked through every `COLLECT` steps, on all processes after the same step.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.profile import profiling

COLLECT = 1000  # steps


@contextmanager
def between_steps(
    profile: bool, run_dir: Path, rank: int, say: Callable[[str], None]
) -> Iterator[Callable[[int], None]]:
    """A function to call after each step, with its number."""
    with collecting_rarely() as collect, profiling(profile, run_dir, rank, say) as record:

        def after(step: int) -> None:
            record()
            collect(step)

        yield after


@contextmanager
def collecting_rarely() -> Iterator[Callable[[int], None]]:
    # What was set aside before stays so, and nothing is added to it: that would never be freed.
    was_on, first = gc.isenabled(), gc.get_freeze_count() == 0
    gc.collect()
    if first:
        gc.freeze()
    gc.disable()

    def after(step: int) -> None:
        if step % COLLECT == 0:
            gc.collect()

    try:
        yield after
    finally:
        if first:
            gc.unfreeze()
        if was_on:
            gc.enable()
