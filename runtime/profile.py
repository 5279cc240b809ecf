"""train.profile: where the time of a step goes, as a trace and as a table.

After the steps that compile and fill caches, a few steps are recorded by torch.profiler into
``profile/`` of the run: ``trace_rank<r>.json.gz`` (chrome://tracing, ui.perfetto.dev) and
``kernels_rank<r>.txt``, the most expensive operations. Off, it costs one empty call per step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from runtime.files import atomic_write_text

UNRECORDED, WARM_UP, RECORDED = 5, 2, 3  # steps: before, with the profiler's own start, recorded
ROWS = 40  # of the table


@contextmanager
def profiling(on: bool, run_dir: Path, rank: int, say: Callable[[str], None]) -> Iterator[Any]:
    """A function to call after each step."""
    if not on:
        yield _nothing
        return
    folder, written = run_dir / "profile", list[Path]()
    folder.mkdir(exist_ok=True)

    def write(profile: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        trace, table = folder / f"trace_rank{rank}.json.gz", folder / f"kernels_rank{rank}.txt"
        unfinished = trace.with_name(f".{trace.name}")  # by its end the profiler knows to pack it
        profile.export_chrome_trace(str(unfinished))
        unfinished.replace(trace)
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        text = profile.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=80)
        atomic_write_text(table, f"{RECORDED} steps\n{text}\n")
        written.append(table)
        say(f"train.profile: {RECORDED} steps recorded in {folder}")

    steps = torch.profiler.schedule(wait=UNRECORDED, warmup=WARM_UP, active=RECORDED, repeat=1)
    with torch.profiler.profile(schedule=steps, on_trace_ready=write, record_shapes=True) as it:
        yield it.step
    if not written:
        say(f"train.profile: nothing recorded, which takes {UNRECORDED + WARM_UP + RECORDED} steps")


def _nothing() -> None:
    pass
