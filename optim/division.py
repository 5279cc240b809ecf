"""What of each parameter this process updates, and keeps state for.

It follows from the granularity of a rule (optim/sharding.py), for plain parameters (every process
holds all of them) and DTensors (rows of dimension 0) alike:

    division = Division(Transport.over(shards=mesh.get_group()))            FSDP2
    division = Division(Transport.over(replicas=dist.group.WORLD))          DDP
    optimizer = create_optimizer("muon", model.named_parameters(), division=division)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from optim.correction import Correction, NoCorrection
from optim.mask import Mask, no_mask
from optim.norms import held
from optim.rule import Granularity, Rule, State
from optim.sharding import Plan, Table, plan
from optim.transport import Exchange, Transport

# which updates replicas divide among them, by granularity; the others each replica makes for itself
DIVIDE: dict[str, tuple[Granularity, ...]] = {
    "all": ("element", "tensor", "matrix"),
    "matrix": ("matrix",),
    "none": (),
}
WAVES = 3  # of matrices: while the updates of one travel, the next are computed


class Division:
    """How the work of one optimizer is divided among the processes of a transport.

    ``divide`` says what replicas (the processes of DDP) divide among them: ``all`` updates and
    states, those of matrix rules (``matrix``), or nothing (``none``). What is divided costs a
    message that brings the results. The shards of FSDP2 always divide everything.
    """

    def __init__(self, transport: Transport, divide: str = "all") -> None:
        if divide not in DIVIDE:
            raise ValueError(f"divide is {divide!r}: expected one of {', '.join(DIVIDE)}")
        self.transport, self._granularities = transport, DIVIDE[divide]
        table = Table(shards=transport.table.shards, shard=transport.table.shard)
        self._replicated = replace(transport, table=table, replicas=None)
        self._owners: dict[Tensor, tuple[int, int]] = {}  # matrix -> rank of its owner, its work
        self._meshes: dict[int, DeviceMesh] = {}

    def _transport(self, rule: Rule) -> Transport:
        """The processes that divide a rule's work."""
        return self.transport if rule.granularity in self._granularities else self._replicated

    def in_parts(self, rule: Rule) -> bool:
        """Whether several processes work on what the rule updates."""
        return self._transport(rule).table.size > 1

    def by_owners(self, rule: Rule) -> bool:
        """Whether each parameter of the rule is updated by one process for all."""
        return rule.granularity == "matrix" and self.in_parts(rule)

    def needs_sums(self, rule: Rule, correction: Correction, mask: Mask) -> bool:
        """Whether updates in parts contain sums over whole tensors."""
        if self.by_owners(rule) or not self.in_parts(rule):
            return False
        plain = mask is no_mask and isinstance(correction, NoCorrection)
        return rule.granularity == "tensor" or not plain

    def check(self, name: str, param: Tensor, rule: Rule) -> None:
        """ValueError for a parameter that is not laid out as the transport says."""
        if param.ndim == 0:
            if self.in_parts(rule):
                raise ValueError(f"{name} has no dimension to divide: give it shape (1,)")
            return
        start, stop = self.transport.table.held(len(param))
        expected, found = (stop - start, *param.shape[1:]), tuple(held(param.detach()).shape)
        if found != expected:
            raise ValueError(
                f"{name} has shape {tuple(param.shape)}, of which this process holds {found}, "
                f"expected {expected}: rows of dimension 0, cut by fully_shard into "
                f"{self.transport.table.shards}"
            )

    # ---- rows -----------------------------------------------------------------------------------

    def part(self, x: Tensor, rule: Rule, replica: int | None = None) -> Tensor:
        """The rows of a parameter or its gradient that a replica (None: this one) updates."""
        local, table = held(x), self._transport(rule).table
        if table.replicas == 1:
            return local
        first = table.held(len(x))[0]
        start, stop = table.updated(len(x), replica)
        return local[start - first : stop - first]

    def share(self, params: Sequence[Tensor], rule: Rule) -> Callable[[], None]:
        """Start to give the other replicas the rows that this one has updated; what it returns
        finishes, and brings theirs."""
        transport = self._transport(rule)
        if transport.replicas is None:
            return lambda: None
        replicas = range(transport.table.replicas)
        parts = [[self.part(p, rule, replica) for p in params] for replica in replicas]
        return transport.share(parts, "parameters")

    def add_up(self, rule: Rule) -> Callable[[list[Tensor]], list[Tensor]]:
        """The reduction for `lockstep`."""
        return lambda parts: self._transport(rule).add_up(parts, replicas=True)

    @property
    def add_up_held(self) -> Callable[[list[Tensor]], list[Tensor]] | None:
        """The reduction over all rows of what is made from those held here; None where these are
        all."""
        if self.transport.shards is None:
            return None
        return lambda parts: self.transport.add_up(parts, replicas=False)

    # ---- owners ---------------------------------------------------------------------------------

    def assign(self, params: Sequence[Tensor], rule: Rule) -> None:
        """Choose an owner for each of these matrices, given what all own already."""
        size = self._transport(rule).table.size
        loads = [0] * size
        for owner, work in self._owners.values():
            loads[owner] += work
        costs = [rule.work(p.shape) for p in params]
        owners = plan(costs, size, loads=loads).owners
        self._owners |= zip(params, zip(owners, costs, strict=True), strict=True)

    def is_owned(self, param: Tensor, rule: Rule) -> bool:
        return self._owners[param][0] == self._transport(rule).table.rank

    def exchange(self, params: Sequence[Tensor], rule: Rule) -> Exchange:
        """The journey of these matrices' gradients to their owners and of the updates back."""
        transport, local = self._transport(rule), held(params[0])
        like = local.new_empty(0, dtype=torch.promote_types(local.dtype, torch.float32))
        return Exchange(transport, [p.shape for p in params], self._plan(params, transport), like)

    def _plan(self, params: Sequence[Tensor], transport: Transport) -> Plan:
        owners, work = ([self._owners[p][k] for p in params] for k in (0, 1))
        return Plan.of(work, owners, transport.table.size, WAVES)

    @property
    def balance(self) -> float:
        """Largest work on matrices of a process over the mean."""
        return self._whole_plan().balance if self._owners else 1.0

    def __str__(self) -> str:
        if self._owners:
            return str(self._whole_plan())
        by_rows = self.transport.shards is not None or "element" in self._granularities
        return "rows of each parameter" if by_rows else "nothing: each process updates all"

    def _whole_plan(self) -> Plan:
        by_all = "matrix" in self._granularities
        return self._plan([*self._owners], self.transport if by_all else self._replicated)

    # ---- state ----------------------------------------------------------------------------------

    def seen(self, param: Tensor, rule: Rule) -> Tensor | None:
        """What of a parameter its state is made from; None where another process keeps it."""
        if not self.by_owners(rule):
            return self.part(param, rule)
        return held(param).new_empty(()).expand(param.shape) if self.is_owned(param, rule) else None

    def sliced(self, param: Tensor, rule: Rule, correction: Correction) -> dict[str, torch.Size]:
        """Whole shapes of states that do not follow the parameter's rows (means of its columns).
        Each process keeps a slice of them, cut as rows are, and all are needed for an update."""
        if not self.in_parts(rule) or self.by_owners(rule):
            return {}
        whole = whole_state(param, param.shape, rule, correction)
        none = whole_state(param, (0, *param.shape[1:]), rule, correction)
        return {k: x.shape for k, x in whole.items() if x.ndim and x.shape == none[k].shape}

    def slice(self, whole: Tensor, rule: Rule) -> Tensor:
        """The rows of a whole tensor that this process updates, as a view."""
        start, stop = self._transport(rule).table.updated(len(whole))
        return whole[start:stop]

    def unslice(
        self, slices: Sequence[Tensor], shapes: Sequence[torch.Size], rule: Rule
    ) -> list[Tensor]:
        """Whole tensors from the slices of all processes, in one message: a sum, to which each
        adds zeros where it has nothing."""
        whole = [own.new_zeros(shape) for own, shape in zip(slices, shapes, strict=True)]
        for tensor, own in zip(whole, slices, strict=True):
            self.slice(tensor, rule).copy_(own)
        return self.add_up(rule)(whole)

    def named(self, param: Tensor, state: State, rule: Rule, correction: Correction) -> State:
        """State for a checkpoint: what is kept for some rows becomes a DTensor of all."""
        if not self.in_parts(rule) or self.by_owners(rule):
            return state
        whole = whole_state(param, param.shape, rule, correction)
        return {
            key: self._of_rows(tensor, whole[key].shape, rule, param) if whole[key].ndim else tensor
            for key, tensor in state.items()
        }

    def copy_(self, own: Tensor, saved: Tensor, rule: Rule) -> None:
        """Copy into a tensor of `named` from one of the same division, or from a whole one."""
        if isinstance(own, DTensor) and not isinstance(saved, DTensor):
            saved = self.slice(saved, rule)
        held(own).copy_(held(saved))

    def _of_rows(self, part: Tensor, shape: Sequence[int], rule: Rule, param: Tensor) -> DTensor:
        mesh = self._mesh(self._transport(rule), param)
        strides = torch.empty(shape, device="meta").stride()
        cut = [Shard(0)] * mesh.ndim
        return DTensor.from_local(
            part, mesh, cut, run_check=False, shape=torch.Size(shape), stride=strides
        )

    def _mesh(self, transport: Transport, param: Tensor) -> DeviceMesh:
        """The processes in the order in which rows are cut: by shards, then among replicas."""
        kind, groups = param.device.type, (transport.shards, transport.replicas)
        present = [group for group in groups if group is not None]
        if len(present) not in self._meshes:
            if len(present) == 1:
                mesh = DeviceMesh.from_group(present[0], kind)
            else:
                assert isinstance(param, DTensor)
                ranks = param.device_mesh.mesh.mT.contiguous()  # (replica, shard) -> transposed
                names = ("shard", "replica")
                mesh = DeviceMesh.from_group(present, kind, mesh=ranks, mesh_dim_names=names)
            self._meshes[len(present)] = mesh
        return self._meshes[len(present)]


def whole_state(like: Tensor, shape: Sequence[int], rule: Rule, correction: Correction) -> State:
    """Shapes and dtypes of the state that one process alone would keep of a parameter of this
    shape, without memory."""
    param = torch.empty(tuple(shape), dtype=like.dtype, device="meta")
    step = torch.empty((), dtype=torch.float64, device="meta")
    return {"step": step, **rule.init_state(param), **correction.init_state(param)}
