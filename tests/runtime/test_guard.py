"""What the others say when one process fails, or does not move, where nothing is expected of it."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import forks
import torch
import torch.distributed as dist

from runtime import guard
from runtime.guard import Guard
from runtime.processes import Processes
from runtime.run import ERRORS, LOCK, open_for_all
from scripts.compose import compose_config


def asleep() -> None:
    time.sleep(600)


def lose(rank: int, size: int, folder: Path) -> None:
    """Rank 1 sleeps in an evaluation; rank 0 does not wait for it as long as rank 2."""
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    dist.barrier()
    with guarded(rank, size, folder) as watched:
        watched.pause(4, "evaluation")
        if rank == 1:
            asleep()
        if rank == 0:
            work = dist.all_reduce(torch.ones(1), async_op=True)
            assert work is not None
            work.wait(timedelta(seconds=0.3))
        dist.all_reduce(torch.ones(1))


def fail(rank: int, size: int, folder: Path) -> None:
    with guarded(rank, size, folder, patience=0.1) as watched:
        watched.pause(0, "building")
        if rank == 1:
            raise ZeroDivisionError("the true reason")
        asleep()


def guarded(rank: int, size: int, folder: Path, patience: float = 0.5) -> Guard:
    guard.PATIENCE = patience
    terminal = (folder / f"terminal_{rank}").open("w")
    watched = Guard(rank, size, folder / "errors", 600.0, terminal)
    watched._interval = 0.4
    return watched


def ended(processes: list[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join(30)
        process.kill()
    return [process.exitcode for process in processes]


def test_a_process_that_sleeps_in_a_pause_shows_where(tmp_path: Path) -> None:
    """The timeout is ten minutes away: the end of another rank ends it, and it is listed first."""
    assert ended([forks.start(lose, rank, 3, tmp_path) for rank in range(3)]) == [1, 1, 1]
    out, *others = ((tmp_path / f"terminal_{rank}").read_text() for rank in range(3))
    assert others == ["", ""]
    places = [out.index(f"rank {rank} on ") for rank in range(3)]
    assert min(places) == places[1]
    assert "step 4, evaluation since " in out
    assert "in asleep" in out[: max(places)], "not the stack of the rank that sleeps"
    reports = [json.loads((tmp_path / f"errors/rank_{r}.json").read_text()) for r in range(3)]
    assert [report["kind"] for report in reports] == ["consequence", "hang", "hang"]
    assert [report["waits"] for report in reports] == [True, False, True]


def test_an_error_ends_those_that_sleep(tmp_path: Path) -> None:
    assert ended([forks.start(fail, rank, 2, tmp_path) for rank in range(2)]) == [1, 1]
    out, other = ((tmp_path / f"terminal_{rank}").read_text() for rank in range(2))
    assert out.endswith("ended because rank 1 failed: ZeroDivisionError: the true reason\n")
    assert out.count("\n") == 1
    assert "in fail\n" in other


def test_what_an_attempt_before_said_is_gone_when_the_next_begins(tmp_path: Path) -> None:
    """Also by a machine whose clock is ahead."""
    config = compose_config([f"run.dir={tmp_path}/run", "run.name=test"])
    open_for_all(config, Processes()).close()
    report = tmp_path / "run" / ERRORS / "rank_1.json"
    report.parent.mkdir(parents=True)
    (tmp_path / "run" / LOCK).touch()
    report.write_text(json.dumps({"rank": 1, "kind": "error", "time": time.time() + 3600}))
    run = open_for_all(config, Processes())
    assert not report.exists()
    run.close()
