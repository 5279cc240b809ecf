"""How gradients come to the owner of a matrix, and updates back: few large messages.

    FSDP2   there, back    one all-to-all each, of the rows that every process holds
    DDP     share          one flat broadcast per owner (gloo) or one all-gather of all (NCCL)
    HSDP    both           all-to-all within the replica that owns a matrix; then each process
                           shares its rows of the update with the other replicas
    sums    add_up         whatever the updates of all tensors ask for, in one all-reduce

Every split follows from shapes, so nothing is exchanged to learn it. What starts a message returns
the function that finishes it: other work can go on in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from optim.sharding import Plan, Table, rows

# its name since torch 2.13, which warns of the old one
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Transport:
    """The processes as a table, with the two groups that this one belongs to: ``shards``, which
    hold the rows of one replica (None: it holds them all), and ``replicas``, which hold the same
    rows as this one (None: nobody does). ``received`` counts bytes from others, by purpose."""

    table: Table
    shards: dist.ProcessGroup | None = None
    replicas: dist.ProcessGroup | None = None
    received: Counter[str] = field(default_factory=Counter, compare=False)

    @classmethod
    def over(
        cls, shards: dist.ProcessGroup | None = None, replicas: dist.ProcessGroup | None = None
    ) -> Transport:
        """Of this process, in the given groups; a group of one counts as none."""
        shards, replicas = (
            g if g is not None and g.size() > 1 else None for g in (shards, replicas)
        )
        sizes = [1 if group is None else group.size() for group in (replicas, shards)]
        places = [0 if group is None else group.rank() for group in (replicas, shards)]
        return cls(Table(*sizes, *places), shards, replicas)

    def share(self, tensors: Sequence[Sequence[Tensor]], purpose: str) -> Callable[[], None]:
        """Give every replica what each has: ``tensors[r]`` are right on replica r and overwritten
        on all others."""
        group, here = self.replicas, self.table.replica
        like = next((t for own in tensors for t in own), None)
        sizes = [sum(t.numel() for t in own) for own in tensors]
        if group is None or like is None or not any(sizes):
            return lambda: None
        self.received[purpose] += (sum(sizes) - sizes[here]) * like.element_size()
        stack = like.new_empty(sum(sizes))
        buffers = stack.split(sizes)
        _pack(tensors[here], buffers[here])
        pending = _gather(stack, buffers, here, group)

        def finish() -> None:
            for work in pending:
                work.wait()
            for replica, (own, buffer) in enumerate(zip(tensors, buffers, strict=True)):
                if replica != here:
                    _unpack(buffer, own)

        return finish

    def all_to_all(
        self,
        parts: Sequence[Sequence[Tensor]],
        shapes: Sequence[Sequence[Sequence[int]]],
        like: Tensor,
        purpose: str,
    ) -> Callable[[], list[list[Tensor]]]:
        """Send ``parts[s]`` to shard s of this replica; finishing returns, by sender, the tensors
        that came, whose shapes are known. All travel in the dtype of ``like``."""
        assert self.shards is not None
        sends = [sum(t.numel() for t in own) for own in parts]
        counts = [[prod(shape) for shape in own] for own in shapes]
        receives = [sum(own) for own in counts]
        outgoing, incoming = like.new_empty(sum(sends)), like.new_empty(sum(receives))
        _pack([t for own in parts for t in own], outgoing)
        here = self.table.shard
        self.received[purpose] += (sum(receives) - receives[here]) * like.element_size()
        work = dist.all_to_all_single(
            incoming, outgoing, receives, sends, group=self.shards, async_op=True
        )

        def finish() -> list[list[Tensor]]:
            work.wait()
            flat = iter(incoming.split([n for own in counts for n in own]))
            return [[next(flat).view(shape) for shape in own] for own in shapes]

        return finish

    def add_up(self, parts: Sequence[Tensor], replicas: bool) -> list[Tensor]:
        """Each tensor summed over the processes that hold other rows: all shards, and all replicas
        where they divide the rows among them. In float64, so that the sum does not depend on how
        many processes there are beyond its rounding to the tensor's own dtype."""
        flat = torch.cat([part.reshape(-1).double() for part in parts])
        for group in (self.shards, self.replicas if replicas else None):
            if group is not None:
                dist.all_reduce(flat, group=group)
                n = group.size()
                self.received["sums"] += 2 * (n - 1) * flat.nbytes // n
        sums = flat.split([part.numel() for part in parts])
        return [s.view(part.shape).to(part.dtype) for s, part in zip(sums, parts, strict=True)]


@dataclass(frozen=True)
class Exchange:
    """The matrices that are updated together: their whole ``shapes``, who owns them, and
    ``like``, an empty tensor with the device and the dtype they travel in."""

    transport: Transport
    shapes: Sequence[torch.Size]
    plan: Plan
    like: Tensor

    def owned(self, wave: int) -> list[int]:
        """Indices of the matrices of a wave that this process owns."""
        return self.plan.owned(self.transport.table.rank, wave)

    def there(self, held: Sequence[Tensor], wave: int) -> Callable[[], dict[int, Tensor]]:
        """Send the rows held of each matrix to its owner; finishing returns, by index, the whole
        matrices of the wave that this process owns."""
        own = self.owned(wave)
        if self.transport.shards is None:
            return lambda: {i: held[i] for i in own}
        parts = [[held[i] for i in owner] for owner in self._owners(wave)]
        shapes = [[self._rows(i, shard) for i in own] for shard in self._shards]
        arrive = self.transport.all_to_all(parts, shapes, self.like, "gradients")

        def finish() -> dict[int, Tensor]:
            return {
                i: torch.cat(rows) for i, rows in zip(own, zip(*arrive(), strict=True), strict=True)
            }

        return finish

    def back(self, updates: Mapping[int, Tensor], wave: int) -> Callable[[], dict[int, Tensor]]:
        """Send the updates of this process's matrices to where their rows are held; finishing
        returns, by index, the rows held here of all updates of the wave."""
        if self.transport.shards is None:
            return self._share(updates, wave)
        parts = [
            [u[slice(*self._cut(i, shard))] for i, u in updates.items()] for shard in self._shards
        ]
        owners = self._owners(wave)
        shapes = [[self._rows(i, self.transport.table.shard) for i in owner] for owner in owners]
        arrive = self.transport.all_to_all(parts, shapes, self.like, "updates")

        def finish() -> dict[int, Tensor]:
            came = zip(owners, arrive(), strict=True)
            return self._share(
                {i: u for own, us in came for i, u in zip(own, us, strict=True)}, wave
            )()

        return finish

    def _share(self, updates: Mapping[int, Tensor], wave: int) -> Callable[[], dict[int, Tensor]]:
        """Rows held of this replica's updates -> those of all replicas."""
        table = self.transport.table
        held = [
            {
                i: self._empty(i) if replica != table.replica else updates[i].to(self.like.dtype)
                for i in sorted(i for own in self._owners(wave, replica) for i in own)
            }
            for replica in range(table.replicas)
        ]
        finish = self.transport.share([list(own.values()) for own in held], "updates")

        def done() -> dict[int, Tensor]:
            finish()
            return {i: u for own in held for i, u in own.items()}

        return done

    @property
    def _shards(self) -> range:
        return range(self.transport.table.shards)

    def _owners(self, wave: int, replica: int | None = None) -> list[list[int]]:
        """Indices by owner, for the owners of a replica (None: this one)."""
        table = self.transport.table
        first = (table.replica if replica is None else replica) * table.shards
        return [self.plan.owned(first + shard, wave) for shard in self._shards]

    def _cut(self, i: int, shard: int) -> tuple[int, int]:
        return rows(self.shapes[i][0], self.transport.table.shards, shard)

    def _rows(self, i: int, shard: int) -> list[int]:
        start, stop = self._cut(i, shard)
        return [stop - start, *self.shapes[i][1:]]

    def _empty(self, i: int) -> Tensor:
        return self.like.new_empty(self._rows(i, self.transport.table.shard))


def _gather(
    stack: Tensor, buffers: Sequence[Tensor], here: int, group: dist.ProcessGroup
) -> list[dist.Work]:
    """Start to fill every buffer, a part of ``stack``, by the replica whose it is."""
    if len({len(buffer) for buffer in buffers}) == 1:
        return [all_gather_single(stack, buffers[here], group, async_op=True)]
    if stack.is_cuda:  # NCCL takes parts of any size, as broadcasts launched together; gloo none
        return [dist.all_gather(list(buffers), buffers[here], group, async_op=True)]
    return [
        dist.broadcast(buffer, group=group, group_src=replica, async_op=True)
        for replica, buffer in enumerate(buffers)
        if len(buffer)
    ]


def _pack(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """Lay tensors one after the other into a flat buffer of their total size."""
    for piece, tensor in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True):
        piece.view(tensor.shape).copy_(tensor)


def _unpack(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for piece, tensor in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True):
        tensor.copy_(piece.view(tensor.shape))
