"""Every setting of parallel reaches torch, and does what it says."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from system import Command, here
from test_parallel import CONFIG, SHAPE, processes
from test_parallel_runs import job
from test_same_curve import configuration
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from workers import run

import train as training
from model.gpt2 import GPT2
from runtime.config import trajectory
from runtime.errors import ConfigError
from runtime.parallel import (
    DivergedError,
    Parallel,
    ParallelConfig,
    check_fit,
    check_micro_batches,
    parallelize,
)
from runtime.processes import Processes

CPU = torch.device("cpu")
LAYERS, VOCABULARY = SHAPE.n_layer, SHAPE.vocab_size
DDP, FSDP = replace(CONFIG, strategy="ddp"), replace(CONFIG, strategy="fsdp")


def spread(config: ParallelConfig, **shape: Any) -> Parallel:
    torch.manual_seed(0)
    return parallelize(GPT2(replace(SHAPE, **shape)), config, processes(), CPU)


def tokens(rows: int, length: int = 13) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(VOCABULARY, (rows, length), generator=generator)


def accumulate(parallel: Parallel, batch: Tensor, count: int) -> None:
    for i, micro in enumerate(batch.chunk(count)):
        with parallel.micro_batch(last=i == count - 1):
            (parallel.forward(micro[:, :-1], micro[:, 1:]) / count).backward()


class Calls(TorchDispatchMode):
    """Counts messages by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.name()
        for kind in ("allgather", "reduce_scatter", "allreduce"):
            self.counted[kind] += "c10d" in name and kind in name
        return func(*args, **kwargs or {})


# ---- what travels --------------------------------------------------------------------------------


def reduced_by_ddp(count: int) -> tuple[int, int]:
    """Numbers that DDP sends per update, and those of the model."""
    parallel, sent = spread(replace(DDP, bucket_mb=0.1)), []

    def hook(_, bucket):  # type: ignore[no-untyped-def]
        sent.append(bucket.buffer().numel())
        done = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return done.then(lambda future: future.value()[0])

    parallel.forward.register_comm_hook(None, hook)  # type: ignore[operator]
    accumulate(parallel, tokens(4), count)
    return sum(sent), sum(p.numel() for p in parallel.model.parameters())


@pytest.mark.parametrize("count", [1, 4])
def test_ddp_reduces_once_per_update(count: int) -> None:
    for sent, whole in run(2, reduced_by_ddp, count):
        assert sent == whole


def sent_by_fsdp(config: ParallelConfig, count: int) -> Counter[str]:
    parallel = spread(config)
    accumulate(parallel, tokens(4), count)  # the first time torch makes its plans
    with Calls() as calls:
        accumulate(parallel, tokens(4), count)
    return calls.counted


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_fsdp_reduces_once_and_gathers_as_told(count: int, reshard: bool) -> None:
    """Each layer once or twice per micro-batch; embedding and head, which the backward pass needs
    at once, once."""
    layers = LAYERS * (2 if reshard else 1)
    for calls in run(2, sent_by_fsdp, replace(FSDP, reshard_after_forward=reshard), count):
        assert calls["reduce_scatter"] == LAYERS + 1
        if reshard or count == 1:
            assert calls["allgather"] == count * (layers + 1)


def gradients_in_bf16(reduce_dtype: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """FSDP's after two micro-batches, and the mean in float32 of what bfloat16 copies give."""
    parallel = spread(replace(FSDP, param_dtype="bf16", reduce_dtype=reduce_dtype))
    torch.manual_seed(0)
    copy = GPT2(SHAPE).bfloat16()
    own = tokens(8)[parallel.rows(8)]
    accumulate(parallel, own, 2)
    found = {n: p.grad.full_tensor() for n, p in parallel.model.named_parameters()}  # type: ignore[union-attr]
    sums: dict[str, Tensor] = {}
    for micro in own.chunk(2):
        copy.zero_grad()
        (copy(micro[:, :-1], micro[:, 1:]) / 2).backward()
        for name, p in copy.named_parameters():
            assert p.grad is not None
            sums[name] = sums.get(name, 0) + p.grad.float()
    for x in sums.values():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return found, sums


def test_gradients_are_reduced_in_reduce_dtype() -> None:
    """fp32 is the default: sums over micro-batches and processes lose nothing in bfloat16."""
    for found, right in run(2, gradients_in_bf16, "fp32"):
        for name in right:
            assert torch.equal(found[name], right[name]), name
    for found, right in run(2, gradients_in_bf16, "bf16"):
        assert any(not torch.equal(found[name], right[name]) for name in right)


# ---- settings reach the wrapper ------------------------------------------------------------------


def of_ddp(config: ParallelConfig) -> dict[str, Any]:
    wrapped = spread(config).forward
    names = ("gradient_as_bucket_view", "static_graph", "bucket_bytes_cap")
    return {name: getattr(wrapped, name) for name in names}


def test_ddp_gets_its_settings() -> None:
    chosen = replace(DDP, gradient_as_bucket_view=False, static_graph=True, bucket_mb=3)
    for config in (DDP, chosen):
        for found in run(2, of_ddp, config):
            assert found == {
                "gradient_as_bucket_view": config.gradient_as_bucket_view,
                "static_graph": config.static_graph,
                "bucket_bytes_cap": config.bucket_mb * 2**20,
            }


def of_fsdp(config: ParallelConfig) -> list[tuple[list[int], list[int]]]:
    """Layers that each layer gathers ahead, in the forward and in the backward pass."""
    layers: Any = spread(config).model.transformer.h
    states = [layer._get_fsdp_state() for layer in layers]
    return [
        (
            [states.index(x) for x in state._states_to_forward_prefetch],
            [states.index(x) for x in state._states_to_backward_prefetch],
        )
        for state in states
    ]


def test_layers_are_gathered_ahead() -> None:
    (found, _) = run(2, of_fsdp, replace(FSDP, prefetch=2))
    assert found == [([1, 2], []), ([2], [0]), ([], [1, 0])]
    assert run(2, of_fsdp, FSDP)[0] == [([], [])] * LAYERS


def test_activations_are_computed_again() -> None:
    """Once more per layer and micro-batch, and to the same gradients."""
    counts, gradients = [], []
    for again in (False, True):
        config = replace(CONFIG, activation_checkpointing=again)
        parallel, calls = spread(config), list[None]()
        for layer in parallel.model.transformer.h:  # type: ignore[union-attr]
            layer.ln_1.register_forward_hook(lambda *_, calls=calls: calls.append(None))
        accumulate(parallel, tokens(4), 2)
        counts.append(len(calls))
        gradients.append([p.grad for p in parallel.model.parameters()])
    assert counts == [2 * LAYERS, 4 * LAYERS]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def of_hsdp(timeout: float, machine: str | None) -> tuple[list[float], tuple[int, ...]]:
    """Timeouts of the groups that gradients travel in, in seconds, and the sizes of these."""
    config = replace(CONFIG, strategy="hsdp", shards=None if machine else 2)
    with patch.dict("os.environ", {"LOCAL_WORLD_SIZE": machine or "1"}):
        parallel = parallelize(
            GPT2(replace(SHAPE, context=1)), config, replace(processes(), timeout=timeout), CPU
        )
    groups: list[Any] = [parallel.shards, parallel.replicas]
    parallel.check_replicas(0)  # the positions, of one row: half of the processes have none of it
    limits = [g._get_backend(CPU).options._timeout.total_seconds() for g in groups]
    return limits, tuple(g.size() for g in groups)


def test_groups_of_hsdp() -> None:
    """They know the timeout; a replica is a machine where nothing else is said."""
    assert run(4, of_hsdp, 77.0, None) == [([77.0, 77.0], (2, 2))] * 4
    assert run(4, of_hsdp, 77.0, "4") == [([77.0, 77.0], (4, 1))] * 4


def weights_after_evaluation(reshard: bool) -> tuple[bool, float, float]:
    """Whether parameters are in rows after a pass without gradients, and the losses of two such
    passes between which all became zero."""
    parallel, batch = spread(replace(FSDP, reshard_after_forward=reshard)), tokens(4)
    losses = []
    with torch.no_grad():
        for _ in range(2):
            losses.append(float(parallel.forward(batch[:, :-1], batch[:, 1:])))
            in_rows = all(isinstance(p, DTensor) for p in parallel.model.parameters())
            for p in parallel.model.parameters():
                p.zero_()
    return in_rows, *losses


@pytest.mark.parametrize("reshard", [True, False])
def test_evaluation_leaves_no_gathered_weights(reshard: bool) -> None:
    for in_rows, before, after in run(2, weights_after_evaluation, reshard):
        assert in_rows
        assert before != pytest.approx(after, abs=1e-4)
        assert after == pytest.approx(torch.tensor(float(VOCABULARY)).log().item(), abs=1e-4)


# ---- what is compared and refused ----------------------------------------------------------------


def drifting_job(overrides: Command) -> str:
    """A run whose rank 1 gets another last bit in one weight after step 3."""
    update, name = training.update, "transformer.h.0.mlp.c_fc.weight"

    def faulty(config: Any, step: int, model: nn.Module, *rest: Any) -> Any:
        figures = update(config, step, model, *rest)
        if (step, dist.get_rank()) == (2, 1):
            parallel = next(part for part in rest if isinstance(part, Parallel))
            weight = parallel.model.get_parameter(name).data.view(-1)
            weight[-1] = torch.nextafter(weight[-1], torch.tensor(9.0))
        return figures

    with patch.object(training, "update", faulty), pytest.raises(DivergedError) as error:
        job(overrides)
    return str(error.value)


def test_a_run_that_drifts_apart_stops(tiny: Command, tmp_path: Path) -> None:
    never = ("train.eval_every=0", "train.checkpoint_every=0", "parallel=ddp", "run.name=test")
    command = (*tiny, *never, "parallel.check_every=3", f"run.dir={tmp_path / 'run'}")
    for said in run(2, drifting_job, command):
        assert re.match(r"parameter transformer.h.0.mlp.c_fc.weight differs on ranks \[1\]", said)
        assert "at step 3" in said


def test_mistakes_of_precision_are_refused(tiny: Command) -> None:
    with pytest.raises(ConfigError, match=r"bf16.*are FSDP's: with parallel=ddp set train.prec"):
        check_fit(replace(DDP, reduce_dtype="bf16"), Processes(size=2))
    with pytest.raises(ConfigError, match=r"parallel.param_dtype is 'fp16'"):
        configuration(*tiny, "run.name=test", "parallel.param_dtype=fp16")
    dtypes = ("parallel=fsdp", "parallel.param_dtype=bf16")  # as train.precision, not as the rest
    one, other = (trajectory(configuration(*tiny, "run.name=x", *how)) for how in ((), dtypes))
    assert {k for k in one if one[k] != other[k]} == {"parallel.param_dtype"}


def test_messages_below_what_torch_compiles_are_refused(tiny: Command) -> None:
    small = (*tiny, "run.name=test", "parallel=ddp", "parallel.bucket_mb=0.5")
    configuration(*small)
    with pytest.raises(ConfigError, match=r"parallel.bucket_mb=0.5 with train.compile=true"):
        configuration(*small, "train.compile=true")


def test_micro_batches_that_do_not_fit_are_refused_early(tiny: Command, tmp_path: Path) -> None:
    """Before anything is built, or with micro_batch=auto before the first step."""
    static, two = replace(DDP, static_graph=True), Processes(size=2)
    check_micro_batches(static, two, 1)
    check_micro_batches(replace(static, deterministic_reduce=True), two, 2)
    with pytest.raises(ConfigError, match="does not work with gradient accumulation"):
        check_micro_batches(static, two, 2)
    fixed = (*tiny, "parallel.deterministic_reduce=true", "parallel.divide=matrix")
    message = "needs a power of two of micro-batches per process, given 3"
    assert message in here(*fixed, "train.global_batch=6", "train.micro_batch=2").error
    assert not (tmp_path / "runs").exists()
    # 128 sequences of 32 tokens: as many as auto takes on a CPU
    assert message in here(*fixed, "train.global_batch=384", "train.micro_batch=auto").error
    assert not list(tmp_path.glob("runs/*/metrics.jsonl"))
