"""One process or many: who this one is, how all of them agree, and how they end together.

torchrun starts the same command once per GPU and tells each, in the environment, its RANK among
WORLD_SIZE. `join` connects them. Without torchrun there is one process: nothing is initialized, and
everything here costs nothing.

    agree    all have the same settings and the same data, or end with the difference
    decide   rank 0 does it (compose, choose a run directory, prepare data) and the others get the
             result, or end with rank 0's error: one message, a non-zero exit code everywhere
    guard    a process that fails says so on the terminal and in errors/rank_<r>.json of the run;
             those that fail because it did only name it. One that hangs shows where it was
    apart    what ranks other than 0 print goes to logs/rank_<r>.log of the run
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist

from runtime.errors import ConfigError

T = TypeVar("T")

LATER = timedelta(seconds=60)  # than this program's own look at a hang


class DecidedElsewhere(RuntimeError):
    """Rank 0 failed to decide; it has said why."""


@dataclass
class Processes:
    """This process among all: ``rank`` of ``size``; ``local_rank`` on this machine (its GPU).

    ``timeout``: seconds after which waiting for the others is an error. ``control`` is a group of
    its own on gloo for messages of the program (on GPUs the tensors travel by NCCL).
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    timeout: float = 600.0
    control: dist.ProcessGroup | None = None
    store: dist.Store | None = None
    decisions: int = 0

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes and prints for all."""
        return self.rank == 0

    def decide(self, make: Callable[[], T]) -> T:
        """The value of ``make()`` of rank 0, on every rank; may take hours (preparing data), for
        waiting here has no timeout: torchrun ends the others if rank 0 dies.

        On rank 0 an exception of ``make`` passes through; the others raise DecidedElsewhere.
        The value must pickle: it never leaves the job.
        """
        if self.store is None:
            return make()
        key = f"decision/{self.decisions}"
        self.decisions += 1
        if not self.first:
            while not self.store.check([key]):
                time.sleep(0.05)
            value, error = pickle.loads(bytes.fromhex(self.store.get(key).decode()))
            if error is not None:
                raise DecidedElsewhere(error)
            return value
        try:
            value = make()
        except BaseException as error:
            told = (None, f"rank 0: {type(error).__name__}: {error}")
            self.store.set(key, pickle.dumps(told).hex())
            raise
        self.store.set(key, pickle.dumps((value, None)).hex())
        return value

    def first_then_all(self, make: Callable[[], T]) -> T:
        """``make()`` of every process, but first of rank 0, which prepares what all need."""
        made: list[T] = []
        self.decide(lambda: made.append(make()))
        return made[0] if made else make()

    def barrier(self) -> None:
        """Wait for all; RuntimeError on rank 0 naming those that did not come in time."""
        if self.control is not None:
            limit = timedelta(seconds=self.timeout)
            dist.monitored_barrier(self.control, timeout=limit, wait_all_ranks=True)

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in order, on every rank."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def agree(self, values: Mapping[str, Any], what: str) -> None:
        """ConfigError, on every rank, where one has other ``values`` than rank 0: names ``what``
        they are, the rank, its machine and the first differences."""
        (home, ours), *others = self.gather((socket.gethostname(), values))
        for rank, (host, theirs) in enumerate(others, start=1):
            different = [
                f"{key} is {theirs.get(key)} against {ours.get(key)}"
                for key in sorted(ours.keys() | theirs.keys())
                if theirs.get(key) != ours.get(key)
            ]
            if different:
                more = f" (and {len(different) - 3} more)" if len(different) > 3 else ""
                raise ConfigError(
                    f"rank {rank} on {host} has other {what} than rank 0 on {home}: "
                    f"{'; '.join(different[:3])}{more}. Start all processes with the same"
                )

    def check_gpus(self) -> None:
        """ConfigError, on every rank, where one has no GPU of its own although others have."""
        check_gpus(self.gather((socket.gethostname(), self.local_rank, torch.cuda.device_count())))

    def any(self, flag: bool) -> bool:
        """Whether any rank says so: a stop signal reaches one of them first."""
        if self.control is None:
            return flag
        told = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self.control)
        return bool(told.item())

    def leave(self) -> None:
        """Close the connections. Not after an error: the others may be gone."""
        if self.control is not None:
            dist.destroy_process_group()
            self.control = self.store = None


_joined = 0  # times that this program has: a sweep does once per trial


def launched() -> bool:
    """Whether torchrun (or another launcher with its environment) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def check_gpus(seen: list[tuple[str, int, int]]) -> None:
    """ConfigError for processes without a GPU among such with one. ``seen`` of each process: host,
    local rank, number of GPUs there."""
    for host, local_rank, gpus in seen:
        if 0 < gpus <= local_rank:
            processes = sum(other == host for other, _, _ in seen)
            raise ConfigError(
                f"torchrun started {processes} processes on {host}, which has {gpus} GPUs: use "
                f"--nproc_per_node={gpus}, or train.device=cpu"
            )
    without = next((host for host, _, gpus in seen if not gpus), None)
    having = next((host for host, _, gpus in seen if gpus), None)
    if without is not None and having is not None:
        raise ConfigError(
            f"{without} has no GPU that torch can use, {having} has: leave it out, or use "
            f"train.device=cpu"
        )


def join(timeout: float = 600.0) -> Processes:
    """Connect to the other processes that torchrun started; alone without torchrun.

    CPU tensors travel by gloo, CUDA tensors by NCCL. ``timeout`` in seconds holds for every
    collective: torch's default of half an hour would hide a hang. NCCL's watchdog, which shows no
    Python stack, has `LATER` more, so that the guard is first to report.
    """
    if not launched():
        return Processes(timeout=timeout)
    limit = timedelta(seconds=timeout)
    store, rank, size = next(dist.rendezvous("env://", timeout=limit))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        # A restarted job of one machine gets the store of the dead one, whose addresses it would
        # try (distributed gloo fails so). Machines count restarts differently: there, set
        # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, as scripts/nodes.sh does.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt {attempt}", store)
    global _joined
    store = dist.PrefixStore(f"join {_joined}", store)
    _joined += 1
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    backend, world_limit = "gloo", limit
    if local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)  # before NCCL chooses one by itself
        backend, world_limit = "cpu:gloo,cuda:nccl", limit + LATER
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=world_limit)
    control = dist.new_group(backend="gloo", timeout=limit)
    own = dist.PrefixStore("processes", store)
    return Processes(rank, size, local_rank, timeout, control, own)


class Apart:
    """From its creation on, what a rank other than 0 prints goes to a file: at first a nameless
    one, then the run's (`keep`). On rank 0 nothing changes. ``terminal`` is where a failing rank
    can still be heard."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.terminal: IO[str] = os.fdopen(os.dup(sys.stderr.fileno()), "w")
        self._file: IO[bytes] | None = None
        if rank:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - lives as long as this
            self._print_into(self._file)

    def keep(self, folder: Path) -> None:
        """Continue in ``folder``/rank_<r>.log, with what was printed before there was a run."""
        if self._file is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._flush()
        log = (folder / f"rank_{self.rank}.log").open("ab", buffering=0)
        if self._file.readable():  # not the log of the trial before, in a sweep
            self._file.seek(0)
            log.write(self._file.read())
        self._print_into(log)
        self._file.close()
        self._file = log

    def _print_into(self, file: IO[bytes]) -> None:
        self._flush()
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())

    def _flush(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()


def rank_in_environment() -> int:
    """This process's rank, for what happens before there is a configuration to join with."""
    return int(os.environ.get("RANK", "0"))
