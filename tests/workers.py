"""Processes that stay: a test of N connected processes costs a fraction of a second, not 5.

`run(n, function, *args)` calls a function of a test module on n processes that are connected by
gloo, and returns what it returned on each. Connecting is paid once per n, importing once for all.
After a failure the processes may wait for each other in different places: they are ended, and the
next call starts new ones, so that one failing test fails alone.
"""

from __future__ import annotations

import atexit
import gc
import queue
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import forks

START, ANSWER = 120.0, 60.0  # seconds, on a busy machine

_pools: dict[int, Pool] = {}


class WorkerError(AssertionError):
    """A function failed on one of the processes; the text is its traceback there."""


def run(size: int, function: Callable[..., Any], *args: Any, timeout: float = ANSWER) -> list[Any]:
    """Results of ``function(*args)``, called on ranks 0 ... size - 1 at once. The function must be
    importable, its arguments and results picklable (tensors included)."""
    if size not in _pools:
        _pools[size] = Pool(size)
    try:
        return _pools[size].run(function, args, timeout)
    except BaseException:
        _pools.pop(size).close()
        raise


class Pool:
    def __init__(self, size: int) -> None:
        self.size, self.calls = size, 0
        self.folder = tempfile.TemporaryDirectory()
        self.tasks = [forks.forks.Queue() for _ in range(size)]
        self.answers = forks.forks.Queue()
        store = str(Path(self.folder.name) / "store")
        self.processes = [
            forks.start(_work, rank, size, store, tasks, self.answers, daemon=True)
            for rank, tasks in enumerate(self.tasks)
        ]

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        for tasks in self.tasks:
            tasks.put((function, args))
        limit = timeout if self.calls else timeout + START
        self.calls += 1
        results: dict[int, Any] = {}
        while len(results) < self.size:
            try:
                rank, result, error = self.answers.get(timeout=limit)
            except queue.Empty:
                missing = sorted(set(range(self.size)) - results.keys())
                raise WorkerError(f"no answer from ranks {missing} in {limit:g} s") from None
            if error is not None:
                raise WorkerError(f"on rank {rank} of {self.size}:\n{error}")
            results[rank] = result
        return [results[rank] for rank in range(self.size)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _work(rank: int, size: int, store: str, tasks: Any, answers: Any) -> None:
    import torch
    import torch.distributed as dist
    import torch.multiprocessing as mp

    torch.set_num_threads(1)
    mp.set_sharing_strategy("file_system")
    limit = timedelta(seconds=ANSWER)
    method = f"file://{store}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=size, timeout=limit)
    while True:
        function, args = tasks.get()
        gc.freeze()  # a run collects garbage first: a fifth of a second in all that torch holds
        try:
            answers.put((rank, function(*args), None))
        except BaseException:
            answers.put((rank, None, traceback.format_exc()))
        finally:
            gc.unfreeze()


@atexit.register
def close() -> None:
    while _pools:
        _pools.popitem()[1].close()
