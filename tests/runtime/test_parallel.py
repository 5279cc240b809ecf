"""The same gradient and the same losses on any number of processes, under every strategy."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from workers import run

from model.gpt2 import GPT2, GPT2Config
from runtime.errors import ConfigError
from runtime.parallel import (
    Compile,
    DivergedError,
    ParallelConfig,
    TreeReduction,
    check_fit,
    find_blocks,
    fingerprint,
    parallelize,
)
from runtime.processes import Processes

SHAPE = GPT2Config(n_layer=3, n_head=3, n_embd=66, context=12, vocab_size=257)
CONFIG = ParallelConfig(
    strategy="none",
    timeout=30,
    shards=None,
    divide="matrix",
    check_every=0,
    deterministic_reduce=False,
    activation_checkpointing=False,
    gradient_as_bucket_view=True,
    static_graph=False,
    bucket_mb=25,
    reshard_after_forward=True,
    param_dtype="fp32",
    reduce_dtype="fp32",
    prefetch=0,
    wrap_one=True,
)
BATCH, STEPS = 16, 4


def processes() -> Processes:
    """Of a test's worker, or of this process alone."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return Processes()
    return Processes(dist.get_rank(), dist.get_world_size(), control=dist.group.WORLD)


def train(
    config: ParallelConfig, micro_batch: int, steps: int = STEPS
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of every micro-batch of every step, and the final weights; momentum SGD."""
    torch.manual_seed(0)
    model, all_ = GPT2(SHAPE), processes()
    parallel = parallelize(model, config, all_, torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    own = parallel.rows(BATCH)
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(257, (BATCH, 13), generator=generator)[own]
        micros = tokens.split(micro_batch)
        values = []
        for i, micro in enumerate(micros):
            with parallel.micro_batch(last=i == len(micros) - 1):
                loss = parallel.forward(micro[:, :-1], micro[:, 1:])
                (loss / len(micros)).backward()
            values.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        losses += parallel.losses(torch.stack(values)).tolist()
        parallel.check_replicas(step)
    weights = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }
    return losses, weights


def means(losses: list[float]) -> Tensor:
    return torch.tensor(losses, dtype=torch.float64).view(STEPS, -1).mean(1)


STRATEGIES = [
    replace(CONFIG, strategy="ddp"),
    replace(CONFIG, strategy="ddp", gradient_as_bucket_view=False, bucket_mb=0.1),
    replace(CONFIG, strategy="fsdp"),
    replace(CONFIG, strategy="fsdp", prefetch=1, activation_checkpointing=True),
    replace(CONFIG, strategy="fsdp", reshard_after_forward=False),
]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("config", STRATEGIES, ids=range(len(STRATEGIES)))
def test_losses_do_not_depend_on_the_number_of_processes(config: ParallelConfig, size: int) -> None:
    alone, weights = train(CONFIG, micro_batch=2)
    for losses, after in run(size, train, config, 2):
        assert torch.allclose(means(losses), means(alone), rtol=1e-6, atol=0)
        assert after.keys() == weights.keys()
        for name in weights:
            assert torch.allclose(after[name], weights[name], rtol=0, atol=1e-6), name
        if size == 1:  # wrapping alone changes no bit
            assert losses == alone
            assert all(torch.equal(after[name], weights[name]) for name in weights)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp"])
def test_one_process_is_not_wrapped(strategy: str) -> None:
    config = replace(CONFIG, strategy=strategy, wrap_one=False)
    model = GPT2(SHAPE)
    parallel = parallelize(model, config, processes(), torch.device("cpu"))
    assert parallel.forward is parallel.model is model and parallel.division is None


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_hybrid_sharding(shards: int) -> None:
    alone, weights = train(CONFIG, micro_batch=4)
    config = replace(CONFIG, strategy="hsdp", shards=shards)
    for losses, after in run(4, train, config, 4):
        assert torch.allclose(means(losses), means(alone), rtol=1e-6, atol=0)
        assert all(torch.allclose(after[n], weights[n], rtol=0, atol=1e-6) for n in weights)


@pytest.mark.slow
@pytest.mark.parametrize("by_layer", [False, True])
def test_layers_compiled_apart_are_the_model(by_layer: bool) -> None:
    """To rounding, loss and gradients; one graph for all layers, but for a number that differs in
    each. The model itself stays as it is, with the same parameters."""
    shape = replace(SHAPE, n_layer=3, scale_attn_by_inverse_layer_idx=by_layer)
    torch.manual_seed(0)
    model, tokens = GPT2(shape), torch.randint(shape.vocab_size, (2, shape.context + 1))
    torch.compiler.reset()  # or another test's graphs would serve
    compile, before = Compile("default", blocks=True), compiled_graphs()
    forward = parallelize(model, CONFIG, Processes(), torch.device("cpu"), compile).forward
    results = []
    for network in (model, forward):
        model.zero_grad()
        loss = network(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-6)
    assert compiled_graphs() - before == 1 + (3 if by_layer else 1)  # the loss, and the layers


def compiled_graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("micro_batch", [2, 4])
def test_a_fixed_reduction_order_gives_the_same_bits(micro_batch: int) -> None:
    config = replace(CONFIG, strategy="ddp", deterministic_reduce=True)
    alone, weights = train(replace(config, strategy="none"), micro_batch)
    plain = run(4, train, replace(CONFIG, strategy="ddp"), micro_batch)[0]
    assert any(not torch.equal(plain[1][n], weights[n]) for n in weights)  # it is not for nothing
    for size in (1, 2, 4):
        for losses, after in run(size, train, config, micro_batch):
            assert losses == alone
            assert all(torch.equal(after[n], weights[n]) for n in weights), size


def test_the_tree_is_a_tree() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    tree = TreeReduction([p], Processes())
    values = [1.0, 1e8, -1e8, 1.0]  # ((1 + 1e8) + (-1e8 + 1)), not (((1 + 1e8) - 1e8) + 1)
    for value in values:
        p.grad = torch.tensor([value])
        tree.add()
    tree.finish()
    left, right = torch.tensor(values).view(2, 2).sum(1)
    assert p.grad is not None
    assert p.grad.item() == (left + right).item()
    for _ in range(3):
        p.grad = torch.ones(1)
        tree.add()
    with pytest.raises(ConfigError, match="power of two of micro-batches"):
        tree.finish()


def test_a_static_graph_is_for_whole_batches() -> None:
    config = replace(CONFIG, strategy="ddp", static_graph=True)
    alone = train(CONFIG, 8)[0]
    assert torch.allclose(means(run(2, train, config, 8)[0][0]), means(alone), rtol=1e-6, atol=0)


def drift(name: str, rank: int) -> str:
    torch.manual_seed(0)
    model, all_ = GPT2(SHAPE), processes()
    parallel = parallelize(model, replace(CONFIG, strategy="ddp"), all_, torch.device("cpu"))
    parallel.check_replicas(0)
    if all_.rank == rank:
        with torch.no_grad():
            weight = model.get_parameter(name).view(-1)
            weight[-1] = torch.nextafter(weight[-1], torch.tensor(9.0))  # the last bit of one entry
    with pytest.raises(DivergedError) as error:
        parallel.check_replicas(7)
    return str(error.value)


def test_drift_names_the_parameter_and_the_rank() -> None:
    name = "transformer.h.1.mlp.c_fc.weight"
    expected = rf"{name} differs on ranks \[1\] from rank 0 at step 7 \(and 1 of \d+ parameters"
    assert all(re.search(expected, said) for said in run(2, drift, name, 1))


def test_a_fingerprint_sees_every_bit_and_place() -> None:
    x = torch.randn(5, 7)
    assert fingerprint(x) == fingerprint(x.clone())
    swapped = x[torch.tensor([1, 0, 2, 3, 4])]
    assert fingerprint(swapped) != fingerprint(x)
    assert fingerprint(x[:, torch.arange(6, -1, -1)]) != fingerprint(x)
    assert fingerprint(-x * 0) != fingerprint(x * 0)  # minus zero


def test_blocks_are_the_layers() -> None:
    model = GPT2(SHAPE)
    assert find_blocks(model) == list(model.transformer.h)
    assert find_blocks(torch.nn.Linear(2, 2)) == []


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"strategy": "none"}, 2, "parallel=none, but torchrun started 2 processes"),
        ({"strategy": "hsdp", "shards": 3}, 4, "parallel.shards=3 does not divide 4"),
        ({"strategy": "fsdp", "deterministic_reduce": True}, 2, "needs whole gradients"),
        ({"strategy": "ddp", "deterministic_reduce": True}, 3, "3 is not a power of two"),
        ({"strategy": "fsdp", "param_dtype": "bf16", "wrap_one": False}, 1, "are FSDP's"),
        (
            {"strategy": "ddp", "deterministic_reduce": True, "divide": "all"},
            2,
            "needs parallel.divide=matrix or none",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_fit(replace(CONFIG, **changes), Processes(size=size))  # type: ignore[arg-type]
