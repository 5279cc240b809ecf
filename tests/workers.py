"""Processes that stay: a test of N connected processes costs a fraction of a second, not 5.

`run(n, function, *args)` calls a function of a test module on n processes that are connected by
gloo, and returns what it returned on each. Importing torch and connecting, some seconds, is paid
once per n. After a failure the processes may wait for each other in different places: they are
ended, and the next call starts new ones, so that one failing test fails alone.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

START, ANSWER = 120.0, 60.0  # seconds, on a busy machine

_spawn = multiprocessing.get_context("spawn")
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
        self.tasks = [_spawn.Queue() for _ in range(size)]
        self.answers = _spawn.Queue()
        store = str(Path(self.folder.name) / "store")
        self.processes: list[BaseProcess] = []
        for rank in range(size):
            queues = (self.tasks[rank], self.answers)
            process = _spawn.Process(target=_work, args=(rank, size, store, *queues), daemon=True)
            process.start()
            self.processes.append(process)

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
    os.environ["OMP_NUM_THREADS"] = "1"
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
        try:
            answers.put((rank, function(*args), None))
        except BaseException:
            answers.put((rank, None, traceback.format_exc()))


@atexit.register
def close() -> None:
    while _pools:
        _pools.popitem()[1].close()
