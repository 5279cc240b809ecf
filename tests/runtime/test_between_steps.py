"""train.profile leaves a trace and a table; the collector comes back as it was."""

from __future__ import annotations

import gc
import gzip
import json
from pathlib import Path

from system import Command, here, tensors

from runtime.between_steps import COLLECT, collecting_rarely


def test_a_profiled_run_is_the_same_run(tiny: Command, tmp_path: Path) -> None:
    longer = (*tiny, "train.steps=12", "train.eval_every=0", "train.checkpoint_every=12")
    plain = here(*longer, f"run.dir={tmp_path}/plain")
    given = here(*longer, "train.profile=true", f"run.dir={tmp_path}/profiled")
    assert not (plain.dir / "profile").exists()
    table = (given.dir / "profile" / "kernels_rank0.txt").read_text()
    assert table.startswith("3 steps") and "Optimizer.step" in table
    with gzip.open(given.dir / "profile" / "trace_rank0.json.gz", "rt") as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    assert sum(name.startswith("ProfilerStep#") for name in names) == 3
    assert sorted(path.name for path in (given.dir / "profile").iterdir()) == [
        "kernels_rank0.txt",
        "trace_rank0.json.gz",
    ]
    assert tensors(plain.dir) == tensors(given.dir)


def test_a_run_too_short_says_so(tiny: Command) -> None:
    run = here(*tiny, "train.steps=3", "train.profile=true")
    assert "nothing recorded, which takes 10 steps" in (run.dir / "log.txt").read_text()


def test_garbage_is_collected_every_so_many_steps() -> None:
    class Ring:
        def __init__(self) -> None:
            self.self = self

    def alive() -> int:
        return sum(type(found) is Ring for found in gc.get_objects())

    with collecting_rarely() as after:
        assert not gc.isenabled()
        Ring()
        after(COLLECT - 1)
        assert alive() == 1
        after(COLLECT)
        assert alive() == 0
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_what_was_set_aside_before_stays_so() -> None:
    gc.freeze()
    try:
        before = gc.get_freeze_count()
        with collecting_rarely():
            kept = [[] for _ in range(1000)]
        # had they been set aside as well, rings among them would be there for ever
        assert before - 100 < gc.get_freeze_count() <= before and kept
        assert gc.isenabled()
    finally:
        gc.unfreeze()
