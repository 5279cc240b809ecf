"""Which process holds which rows, and which process updates which matrix. Pure arithmetic.

Processes form a table of ``replicas`` x ``shards``: those of one column hold the same rows of every
parameter, those of one row hold all rows together. Plain data parallelism (DDP) is N x 1, FSDP2 is
1 x N, hybrid sharding (HSDP) is R x S. What an update needs to see decides how its work is divided:

  element, tensor   every process updates some rows of each parameter: those it holds (shards), cut
                    once more among the replicas. State exists for these rows alone.
  matrix            every matrix has one owner, which sees all of it and keeps all its state.

Everything follows from shapes and the table, so all processes come to the same plan without a
message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil


def rows(n: int, parts: int, part: int) -> tuple[int, int]:
    """First and last (exclusive) of ``n`` rows in a part, cut as torch.chunk and `fully_shard` cut:
    parts of ceil(n / parts), the last ones smaller or empty."""
    size = ceil(n / parts)
    return min(n, part * size), min(n, (part + 1) * size)


@dataclass(frozen=True)
class Table:
    """The processes, and the place of this one: replica ``replica``, shard ``shard``."""

    replicas: int = 1
    shards: int = 1
    replica: int = 0
    shard: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.replica < self.replicas and 0 <= self.shard < self.shards):
            raise ValueError(f"{self} has no such place")

    @property
    def size(self) -> int:
        return self.replicas * self.shards

    @property
    def rank(self) -> int:
        """Number of this process in the order of owners: replica by replica."""
        return self.replica * self.shards + self.shard

    def held(self, n: int) -> tuple[int, int]:
        """The rows of n that this process holds."""
        return rows(n, self.shards, self.shard)

    def updated(self, n: int, replica: int | None = None) -> tuple[int, int]:
        """The rows of n that a replica (None: this process) updates, as a part of `held`."""
        start, stop = self.held(n)
        first, last = rows(
            stop - start, self.replicas, self.replica if replica is None else replica
        )
        return start + first, start + last


def matrix_work(shape: Sequence[int]) -> int:
    """Cost of a matrix function (Newton-Schulz, a decomposition), up to a factor: products of
    min x min with min x max. A vector counts as one row."""
    long, short = max(shape), min(shape) if len(shape) > 1 else 1
    return short * short * long


@dataclass(frozen=True)
class Plan:
    """Owner of each matrix (a rank of the table), and the wave in which it travels."""

    work: tuple[int, ...]
    owners: tuple[int, ...]
    waves: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, work: Sequence[int], owners: Sequence[int], size: int, waves: int) -> Plan:
        """Owners' lists cut into ``waves``, so that the results of one travel during the next."""
        lists = [[i for i in range(len(work)) if owners[i] == rank] for rank in range(size)]
        wave = {i: k * waves // len(own) for own in lists for k, i in enumerate(own)}
        return cls(tuple(work), tuple(owners), tuple(wave[i] for i in range(len(work))), size)

    @property
    def loads(self) -> list[int]:
        return [
            sum(w for w, owner in zip(self.work, self.owners, strict=True) if owner == rank)
            for rank in range(self.size)
        ]

    @property
    def balance(self) -> float:
        """Largest load over the mean: 1 is perfect, and 1.15 wastes 15 % of the largest's time."""
        return max(self.loads) * self.size / max(sum(self.loads), 1)

    def owned(self, rank: int, wave: int) -> list[int]:
        """Indices of the matrices that a rank owns in a wave, ascending."""
        return [
            i
            for i, place in enumerate(zip(self.owners, self.waves, strict=True))
            if place == (rank, wave)
        ]

    def __str__(self) -> str:
        loads = ", ".join(f"{load / max(sum(self.loads), 1):.1%}" for load in self.loads)
        return (
            f"{len(self.work)} matrices on {self.size} processes, share of the work {loads} "
            f"(largest over mean {self.balance:.2f})"
        )


def plan(
    work: Sequence[int], size: int, waves: int = 1, loads: Sequence[int] | None = None
) -> Plan:
    """Give each matrix to the process with the least work so far, the costliest first (ties: the
    lower index), then improve by moving or swapping while that lowers the largest load. ``loads``:
    work that the processes have besides."""
    loads = [0] * size if loads is None else list(loads)
    owners = [0] * len(work)
    for i in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        owners[i] = min(range(size), key=lambda rank: (loads[rank], rank))
        loads[owners[i]] += work[i]
    while _improve(work, owners, loads):
        pass
    return Plan.of(work, owners, size, waves)


def _improve(work: Sequence[int], owners: list[int], loads: list[int]) -> bool:
    """Make the one move or swap between the heaviest process and another that lowers the larger of
    their two loads most; False if there is none."""
    heavy = max(range(len(loads)), key=lambda rank: (loads[rank], -rank))
    best: tuple[int, int, int | None, int] | None = None
    given = {work[i]: i for i in reversed(range(len(work))) if owners[i] == heavy}
    for other in range(len(loads)):
        taken: dict[int, int | None] = {0: None}
        taken |= {work[j]: j for j in reversed(range(len(work))) if owners[j] == other}
        for mine, i in given.items() if other != heavy else ():
            for theirs, j in taken.items():
                after = max(loads[heavy] - mine + theirs, loads[other] + mine - theirs)
                if after < loads[heavy] and (best is None or after < best[0]):
                    best = (after, i, j, other)
    if best is None:
        return False
    _, i, j, other = best
    difference = work[i] - (0 if j is None else work[j])
    loads[heavy] -= difference
    loads[other] += difference
    owners[i] = other
    if j is not None:
        owners[j] = heavy
    return True
