"""The model spread over processes: DDP, FSDP2, both (HSDP), and the gradient's one reduction.

    none   one process
    ddp    every process holds the model; gradients are averaged while they are computed
    fsdp   every process holds some rows of each parameter (`fully_shard`, DTensors) and gathers a
           block's parameters when it needs them
    hsdp   fsdp within groups of ``parallel.shards`` processes, ddp between these groups

The gradient is the mean over the global batch, whatever the number of processes: each takes an
equal part of the batch (`rows`), and the parts' means are averaged.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from optim.transport import all_gather_single
from runtime.errors import ConfigError
from runtime.processes import Processes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from optim.division import Division

DIVIDE = ("all", "matrix", "none")  # what replicas may divide; see optim/division.py
SHARDED = ("fsdp", "hsdp")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class ParallelConfig:
    strategy: str  # none | ddp | fsdp | hsdp
    timeout: float  # seconds that a process waits for another before the job ends
    shards: int | None  # hsdp: processes that share one replica; None: those of a machine
    divide: str  # optimizer work divided among replicas: all | matrix | none
    check_every: int  # steps between comparisons of the replicas' parameters; 0: never
    deterministic_reduce: bool  # ddp: gradients summed in one fixed order, any number of processes
    activation_checkpointing: bool  # compute a block's activations again in the backward pass
    gradient_as_bucket_view: bool  # ddp: gradients live in the buffers that are sent
    static_graph: bool  # ddp: every step uses the same parameters in the same order
    bucket_mb: float  # ddp: size of a message
    reshard_after_forward: bool  # fsdp: free a block's parameters between forward and backward
    param_dtype: str  # fsdp: gather parameters and compute in fp32 | bf16
    reduce_dtype: str  # fsdp: reduce gradients in fp32 | bf16
    prefetch: int  # fsdp: blocks whose parameters are gathered ahead of their use; 0: torch's way
    wrap_one: bool  # torchrun with one process: wrap the model all the same, to see what it costs


@dataclass(frozen=True)
class Compile:
    """How torch.compile is to be called."""

    mode: str
    blocks: bool  # each layer a graph, the same for all; else the whole model one


@dataclass
class Parallel:
    """A model as this process sees it. ``model`` has the parameters, under their own names, for
    the optimizer and the checkpoint; ``forward`` is what to call."""

    model: nn.Module
    forward: nn.Module
    processes: Processes
    mesh: DeviceMesh | None = None  # (shard) or (replica, shard) for DTensors; None: whole tensors
    tree: TreeReduction | None = None
    divide: str = "none"

    def rows(self, global_batch: int) -> slice:
        """This process's sequences of the global batch: contiguous, equal for all."""
        own = global_batch // self.processes.size
        return slice(self.processes.rank * own, (self.processes.rank + 1) * own)

    @property
    def shards(self) -> dist.ProcessGroup | None:
        """The processes that hold the rows of one replica."""
        return None if self.mesh is None else self.mesh.get_group("shard")

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        """The processes that hold the same as this one."""
        if self.mesh is not None:
            names = self.mesh.mesh_dim_names or ()
            return self.mesh.get_group("replica") if "replica" in names else None
        return dist.group.WORLD if self.processes.size > 1 else None

    @property
    def division(self) -> Division | None:
        """How the optimizer divides its work; None: there is one process."""
        if self.processes.size == 1 and self.mesh is None:
            return None
        from optim.division import Division
        from optim.transport import Transport

        return Division(Transport.over(self.shards, self.replicas), self.divide)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch: gradients are reduced after the last."""
        if isinstance(self.forward, nn.parallel.DistributedDataParallel) and not last:
            with self.forward.no_sync():
                yield
            return
        if self.mesh is not None:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield
        if self.tree is not None:
            self.tree.add()
            if last:
                self.tree.finish()

    def losses(self, own: Tensor) -> Tensor:
        """Losses of all micro-batches of the global batch, in its order, from this process's."""
        if self.processes.size == 1:
            return own
        every = own.new_empty(self.processes.size * len(own))
        all_gather_single(every, own)
        return every

    def check_replicas(self, step: int) -> None:
        """Raise DivergedError if processes that should hold the same parameters do not. Reads the
        device."""
        group = self.replicas
        if group is None or group.size() == 1:
            return
        names = [name for name, _ in self.model.named_parameters()]
        own = torch.stack([fingerprint(p) for p in self.model.parameters()])
        every = own.new_empty(group.size() * len(own))
        all_gather_single(every, own, group=group)
        every = every.view(group.size(), -1)
        different = (every != every[0]).cpu()
        if different.any():
            first = int(different.any(0).int().argmax())
            ranks = [dist.get_global_rank(group, int(r)) for r in different[:, first].nonzero()]
            count, other = int(different.any(0).sum()), dist.get_global_rank(group, 0)
            raise DivergedError(
                f"parameter {names[first]} differs on ranks {ranks} from rank {other} at step "
                f"{step} (and {count} of {len(names)} parameters in all): the processes have "
                f"drifted apart, and what they train from here on is no longer one model"
            )


class DivergedError(RuntimeError):
    """Processes hold different values of what should be one parameter."""


def parallelize(
    model: nn.Module,
    config: ParallelConfig,
    processes: Processes,
    device: torch.device,
    compile: Compile | None = None,
) -> Parallel:
    """Spread a whole, initialized model, compiled or (None) not. Raises ConfigError where strategy
    and processes do not fit. One process has nothing to spread and is not wrapped (FSDP2 alone
    takes 5 to 25 % of a small model's step); with wrap_one, under torchrun, it is."""
    check_fit(config, processes)
    given = Given(model, find_blocks(model), config, processes, device, compile)
    if config.activation_checkpointing:
        for block in given.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # names stay
    wrap = WRAPPERS[config.strategy] if is_wrapped(config, processes) else alone
    return replace(wrap(given), divide=config.divide)


def is_wrapped(config: ParallelConfig, processes: Processes) -> bool:
    return processes.size > 1 or (config.wrap_one and processes.control is not None)


def check_fit(config: ParallelConfig, processes: Processes) -> None:
    size = processes.size
    if config.strategy == "none" and size > 1:
        raise ConfigError(
            f"parallel=none, but torchrun started {size} processes, which would all train the "
            f"same: use parallel=ddp or parallel=fsdp"
        )
    if config.strategy == "hsdp" and size % replica_size(config):
        raise ConfigError(
            f"parallel.shards={replica_size(config)} does not divide {size} processes"
        )
    dtypes = (config.param_dtype, config.reduce_dtype)
    if dtypes != ("fp32", "fp32"):
        given = f"parallel.param_dtype={dtypes[0]} and reduce_dtype={dtypes[1]} are FSDP's"
        if config.strategy not in SHARDED:
            raise ConfigError(f"{given}: with parallel={config.strategy} set train.precision")
        if not is_wrapped(config, processes):
            raise ConfigError(
                f"{given}, which one process does not need: set train.precision, or run under "
                f"torchrun with parallel.wrap_one=true"
            )
    if config.deterministic_reduce:
        if config.strategy not in ("none", "ddp"):
            raise ConfigError("parallel.deterministic_reduce needs whole gradients: parallel=ddp")
        if config.divide == "all":
            raise ConfigError(
                "parallel.deterministic_reduce needs parallel.divide=matrix or none: whole tensors "
                "are updated in the same order everywhere, rows of them are not"
            )
        if size & (size - 1):
            raise ConfigError(f"parallel.deterministic_reduce: {size} is not a power of two")


def check_micro_batches(config: ParallelConfig, processes: Processes, count: int) -> None:
    """ConfigError if a process's gradient cannot come from ``count`` micro-batches."""
    if config.deterministic_reduce:
        if count & (count - 1):
            raise ConfigError(
                f"parallel.deterministic_reduce needs a power of two of micro-batches per process, "
                f"given {count}: change train.micro_batch"
            )
        return
    static = config.strategy == "ddp" and config.static_graph and is_wrapped(config, processes)
    if static and count > 1:  # torch 2.13: "expect_autograd_hooks_ INTERNAL ASSERT FAILED"
        raise ConfigError(
            "parallel.static_graph=true does not work with gradient accumulation: leave it off, or "
            "raise train.micro_batch to this process's whole share of the batch"
        )


def replica_size(config: ParallelConfig) -> int:
    """hsdp: processes that share one replica."""
    return config.shards or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Given:
    """What a strategy spreads, over whom."""

    model: nn.Module
    blocks: list[nn.Module]  # its layers
    config: ParallelConfig
    processes: Processes
    device: torch.device
    compile: Compile | None

    def compiled(self) -> nn.Module:
        """The model to call in training; the given one stays as it is, for sampling from."""
        if self.compile is None:
            return self.model
        if self.compile.blocks:
            return layer_by_layer(self.model, self.compile.mode)
        return cast(nn.Module, torch.compile(self.model, dynamic=False, mode=self.compile.mode))


def layer_by_layer(model: nn.Module, mode: str) -> nn.Module:
    """The model with its layers and its loss compiled, in a copy that has the same parameters, so
    that the given one stays as it is. What lies between, the embedding and the head's product, are
    kernels of their own anyway."""
    shared: dict[int, Any] = {id(x): x for x in (*model.parameters(), *model.buffers())}
    copy: Any = deepcopy(model, shared)
    compile_each(find_blocks(copy), mode)
    copy.loss = torch.compile(copy.loss, dynamic=False, mode=mode)
    return cast(nn.Module, copy)


def compile_each(blocks: list[nn.Module], mode: str) -> None:
    """In place. Layers that are alike run one graph, so that depth costs no compilation. Where a
    number differs (attention divided by the layer), each has its own, of which torch allows 8."""
    import torch._dynamo.config as limits  # seconds

    limits.recompile_limit = max(limits.recompile_limit, 8 * len(blocks))
    for block in blocks:
        block.compile(dynamic=False, mode=mode)


def alone(given: Given) -> Parallel:
    parameters = list(given.model.parameters())
    fixed = given.config.deterministic_reduce
    tree = TreeReduction(parameters, given.processes) if fixed else None
    return Parallel(given.model, given.compiled(), given.processes, tree=tree)


def ddp(given: Given) -> Parallel:
    config, device = given.config, given.device
    if config.deterministic_reduce:  # which replaces what the wrapper would do
        return alone(given)
    wrapped = nn.parallel.DistributedDataParallel(
        given.compiled(),
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=config.gradient_as_bucket_view,
        static_graph=config.static_graph,
        bucket_cap_mb=config.bucket_mb,
    )
    return Parallel(given.model, wrapped, given.processes)


def fsdp(given: Given) -> Parallel:
    return _sharded(given, {"shard": given.processes.size})


def hsdp(given: Given) -> Parallel:
    shards = replica_size(given.config)
    return _sharded(given, {"replica": given.processes.size // shards, "shard": shards})


WRAPPERS: dict[str, Callable[[Given], Parallel]] = {
    "none": alone,
    "ddp": ddp,
    "fsdp": fsdp,
    "hsdp": hsdp,
}


def _sharded(given: Given, sizes: dict[str, int]) -> Parallel:
    """FSDP2 over the last of the mesh's dimensions, whose names and ``sizes`` are given."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    config, blocks, mesh = given.config, given.blocks, _mesh(given, sizes)
    precision = MixedPrecisionPolicy(
        # None: as parameters are, and inputs of layers stay what autocast makes them.
        param_dtype=None if config.param_dtype == "fp32" else DTYPES[config.param_dtype],
        reduce_dtype=DTYPES[config.reduce_dtype],  # None would be that of the gradients
    )
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": precision}
    if given.compile:
        compile_each(blocks, given.compile.mode)
    for block in blocks:
        fully_shard(block, reshard_after_forward=config.reshard_after_forward, **options)
    # None: torch keeps the root's (embedding and head), which the backward pass needs at once.
    fully_shard(given.model, reshard_after_forward=None, **options)
    given.model.register_forward_hook(_to_rows)
    n = config.prefetch
    for i, block in enumerate(blocks if n else []):
        ahead, behind = blocks[i + 1 : i + 1 + n], blocks[max(0, i - n) : i][::-1]
        block.set_modules_to_forward_prefetch(ahead)  # type: ignore[operator]
        block.set_modules_to_backward_prefetch(behind)  # type: ignore[operator]
    return Parallel(given.model, given.model, given.processes, mesh)


def _mesh(given: Given, sizes: dict[str, int]) -> DeviceMesh:
    """All processes in a table of these named ``sizes``. From groups, for `init_device_mesh` makes
    some that know nothing of the timeout."""
    from torch.distributed.device_mesh import DeviceMesh

    kind, names = given.device.type, tuple(sizes)
    if len(sizes) == 1:
        assert dist.group.WORLD is not None
        return DeviceMesh.from_group(dist.group.WORLD, kind, mesh_dim_names=names)
    table = torch.arange(given.processes.size).view(*sizes.values())
    limit = timedelta(seconds=given.processes.timeout)
    groups = [
        dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=limit)[0]
        for ranks in (table.T, table)
    ]
    return DeviceMesh.from_group(groups, kind, mesh=table, mesh_dim_names=names)


def _to_rows(model: nn.Module, *_: Any) -> None:
    """After a forward pass that no backward pass follows: give gathered parameters back, which
    else evaluation would leave to the optimizer, the checkpoint and the next step's forward."""
    from torch.distributed.fsdp import FSDPModule

    if not torch.is_grad_enabled():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a model: the members of its longest nn.ModuleList."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


@torch.no_grad()
def fingerprint(x: Tensor) -> Tensor:
    """A 64-bit number made of every bit of a tensor (of a DTensor: of what this process holds), on
    its device. Row and column sums of the bits, weighted by position: no large temporary."""
    x = x.to_local() if hasattr(x, "to_local") else x
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    if not x.numel():  # a shard without rows
        return torch.zeros((), dtype=torch.int64, device=x.device)
    bits = x.detach().contiguous().view(integer).reshape(len(x) if x.ndim else 1, -1)
    sums = (bits.sum(1, dtype=torch.int64), bits.sum(0, dtype=torch.int64))
    odd = [2 * torch.arange(len(s), device=x.device) + 1 for s in sums]
    return (sums[0] * odd[0]).sum() + (sums[1] * odd[1]).sum() * 0x9E3779B1


class TreeReduction:
    """Gradients of the micro-batches of a global batch, summed in one fixed order.

    Floating-point sums depend on their order. Here micro-batches are the leaves of a binary tree,
    ((1 + 2) + (3 + 4)) + ...: what one process has is a subtree, and the processes' subtrees are
    added in the same pattern. So 1, 2, 4, ... processes give the same bits at the same micro-batch,
    for as many bytes as an all-reduce. Numbers of processes and of micro-batches are powers of two.
    """

    def __init__(self, parameters: list[nn.Parameter], processes: Processes) -> None:
        self.parameters, self.size = parameters, processes.size
        self.levels: list[Tensor | None] = []  # level k: the sum of 2^k micro-batches, or None

    @torch.no_grad()
    def add(self) -> None:
        """Take the gradients of a micro-batch out of ``.grad``."""
        sum_ = torch.cat([g.reshape(-1) for g in self._gradients()])
        for p in self.parameters:
            p.grad = None
        for k, level in enumerate(self.levels):
            if level is None:
                self.levels[k] = sum_
                return
            sum_ = level.add_(sum_)
            self.levels[k] = None
        self.levels.append(sum_)

    @torch.no_grad()
    def finish(self) -> None:
        """Sum over all processes and put the result, their mean, into ``.grad``."""
        *rest, flat = self.levels
        if flat is None or any(level is not None for level in rest):
            raise ConfigError(
                "parallel.deterministic_reduce needs a power of two of micro-batches per process: "
                "change train.micro_batch"
            )
        self.levels = []
        if self.size > 1:
            flat = self._across(flat)
        for p, grad in zip(
            self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True
        ):
            p.grad = grad.view(p.shape)

    def _across(self, flat: Tensor) -> Tensor:
        n = len(flat)
        chunk = -(-n // self.size)
        sent = nn.functional.pad(flat, (0, chunk * self.size - n))
        came = torch.empty_like(sent)
        dist.all_to_all_single(came, sent)
        parts = list(came.split(chunk))
        while len(parts) > 1:
            parts = [left + right for left, right in zip(parts[::2], parts[1::2], strict=True)]
        all_gather_single(sent, parts[0] / self.size)
        return sent[:n]

    def _gradients(self) -> Iterable[Tensor]:
        for p in self.parameters:
            yield torch.zeros_like(p) if p.grad is None else p.grad
