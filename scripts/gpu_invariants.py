"""What must hold of model, optimizers and a step on a GPU, as plain functions: each raises where it
does not (scripts/gpu_claims.py has the list)."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from model import GPT2, GPT2Config
from optim import Optimizer, clip_grad_norm, create_optimizer
from optim.blocks import Factored
from optim.create import resolve
from optim.rules import build_rule, rules
from runtime.config import Config, load, schedule
from runtime.device import Device
from runtime.kernels import kernels
from runtime.record import Figures
from scripts.training import Training, random_corpus
from scripts.training import configuration as settled
from train import update

CONFIGS = str(Path(__file__).resolve().parents[1] / "configs")
TINY = GPT2Config(n_layer=2, n_head=4, n_embd=64, context=32, vocab_size=257, vocab_multiple=64)
KERNELS = ("adamw",)  # whose update torch has a kernel for: nothing is compiled
CYCLES = 2e9  # of a GPU, a second: above any clock
SHAPES = {  # one tensor of each role; two matrices of one shape, which a GPU updates together
    "transformer.wte.weight": (24, 16),
    "transformer.h.0.attn.c_attn.weight": (48, 16),
    "transformer.h.1.attn.c_attn.weight": (48, 16),
    "transformer.h.0.ln_1.weight": (16,),
}


def configuration(*overrides: str) -> Config:
    """configs/ with overrides, as the command line would compose it."""
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return load(compose("train", overrides=["run.name=gpu_check", *overrides]))


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Raise where the host waits for the GPU: `.item()`, a blocking copy, a boolean index."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def keep_busy(seconds: float) -> None:
    """Queue so much work for the GPU, at least, in one launch: how fast the host is does not
    matter."""
    torch.cuda._sleep(int(CYCLES * seconds))


@contextmanager
def compiling_nothing() -> Iterator[None]:
    """Raise if anything was compiled within, by whatever way it came to torch's compiler: inductor
    looks for every graph in its cache first, and counts these looks."""
    before = graphs_compiled()
    yield
    if count := graphs_compiled() - before:
        raise AssertionError(f"{count} graphs were compiled, expected none")


def graphs_compiled() -> int:
    """Graphs that inductor was given in this process, whether its cache had them or not."""
    from torch._dynamo.utils import counters  # imports the compiler: seconds

    looks = counters["inductor"]
    return sum(looks[f"fxgraph_cache_{end}"] for end in ("hit", "miss", "bypass"))


def logits_equal_cpu(device: torch.device) -> None:
    torch.manual_seed(0)
    model, tokens = GPT2(TINY), torch.randint(TINY.vocab_size, (2, TINY.context))
    expected = model(tokens)
    with full_float32():
        given = model.to(device)(tokens.to(device)).cpu()
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=0)


@contextmanager
def full_float32() -> Iterator[None]:
    """Without TF32, which keeps ten bits of each factor."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def clip_does_not_wait(device: torch.device) -> None:
    parameters = [nn.Parameter(torch.zeros(8, 8, device=device)) for _ in range(3)]
    for p in parameters:
        p.grad = torch.full_like(p, 2.0)
    with no_waiting(device):
        total = clip_grad_norm(parameters, 1.0)
    torch.testing.assert_close(total.item(), 192**0.5 * 2)
    torch.testing.assert_close(clip_grad_norm(parameters, None).item(), 1.0, atol=1e-5, rtol=0)


def optimizer_equals_cpu(name: str, device: torch.device) -> None:
    """Five steps from the same weights along the same gradients. Newton-Schulz in float32: in
    bfloat16 two devices differ by what it rounds. torch.linalg waits for whether a decomposition
    went well, and so do the steps that have one, but no other."""
    with full_float32():
        here, there = build(name, torch.device("cpu")), build(name, device)
        for step in range(5):
            take_step(here, step)
            with nullcontext() if decomposes(there, step) else no_waiting(device):
                take_step(there, step)
    assert_same_weights(there, here)


def compiled_equals(name: str, device: torch.device) -> None:
    """Four steps with another lr each. Only two may compile, and one must: some rules begin with a
    step that is unlike the rest."""
    with full_float32():
        eager, compiled = build(name, device), build(name, device, compile=True)
        for step in range(4):
            take_step(eager, step)
            if step < 2:
                take_step(compiled, step)
                continue
            waits = nullcontext() if decomposes(compiled, step) else no_waiting(device)
            with compiling_nothing(), waits:
                take_step(compiled, step)
    assert_same_weights(compiled, eager)
    if not compiled._compiled:
        raise AssertionError(f"nothing of {name} was compiled")


def build(name: str, device: torch.device, compile: bool = False) -> Optimizer:
    generator = torch.Generator().manual_seed(0)
    parameters = [
        (key, nn.Parameter(torch.randn(shape, generator=generator).to(device)))
        for key, shape in SHAPES.items()
    ]
    used = {f.name for group in resolve(name).values() for f in fields(rules()[group["rule"]])}
    wanted = {"ns_dtype": "float32", "precondition_frequency": 3}
    own: dict[str, Any] = {key: value for key, value in wanted.items() if key in used}
    optimizer = create_optimizer(name, parameters, compile=compile, lr=1e-2, **own)
    fill_factors(optimizer)
    return optimizer


def fill_factors(optimizer: Optimizer) -> None:
    """Give the factors of Shampoo and SOAP eigenvalues 1, 2, ... in random directions, as if there
    had been many gradients: eigenvectors of one gradient's are not defined where it is zero, nor to
    any precision where eigenvalues are close, so that two devices may choose differently."""
    generator = torch.Generator().manual_seed(7)
    for p in parameters_of(optimizer):
        for key, factor in optimizer.state[p].items():
            if key.startswith("factor."):
                n = factor.shape[-1]
                random = torch.randn(n, n, generator=generator, dtype=torch.float64)
                basis = torch.linalg.qr(random).Q
                factor.copy_(basis * torch.arange(1.0, n + 1) @ basis.mT)


def decomposes(optimizer: Optimizer, steps: int) -> bool:
    """Whether the step after so many takes roots or bases."""
    found = (
        (build_rule(group["rule"], group["hyper"]), group["params"])
        for group in optimizer.param_groups
    )
    return any(
        rule.direction_at(steps + 1, phase) != rule.direction
        for rule, params in found
        if isinstance(rule, Factored)
        for phase in rule.phases(tuple(p.shape for p in params))
    )


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def take_step(optimizer: Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(1 + step)
    for p in parameters_of(optimizer):
        grad = torch.randn(p.shape, generator=generator)
        p.grad = (grad.pin_memory() if p.is_cuda else grad).to(p.device, non_blocking=True)
    optimizer.set_lr(1e-2 / (1 + step))
    optimizer.step()


def assert_same_weights(given: Optimizer, expected: Optimizer) -> None:
    for a, b in zip(parameters_of(given), parameters_of(expected), strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach().cpu(), atol=1e-5, rtol=1e-5)


class SameBatch:
    """The same random tokens at every step, page-locked as the loader's are."""

    def __init__(self, rows: int, shape: GPT2Config, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(shape.vocab_size, (rows, shape.context + 1), generator=generator)
        self.tokens = tokens.pin_memory() if device.type == "cuda" else tokens

    def batch(self, step: int) -> Tensor:
        return self.tokens


def update_learns_without_waiting(precision: str, device: torch.device) -> None:
    """train.py's own update, two micro-batches, on one batch again and again."""
    config = configuration(
        f"train.precision={precision}",
        f"train.device={device.type}",
        "train.global_batch=8",
        "train.micro_batch=4",
        "optim.lr=3e-3",
        "schedule=constant",
    )
    run = Device.choose(config.train)
    torch.manual_seed(0)
    model = GPT2(TINY).to(run.device)
    optimizer = create_optimizer(named_parameters=model.named_parameters(), **config.optim)
    batches, lr_schedule = SameBatch(8, TINY, run.device), schedule(config)

    def one(step: int) -> Figures:
        return update(config, step, model, optimizer, lr_schedule, batches, run)

    first = one(0).losses.mean().item()
    with no_waiting(run.device):
        figures = [one(step) for step in range(1, 20)]
    last = figures[-1].losses.mean().item()
    if not last < first - 0.1:  # also where it is not finite
        raise AssertionError(f"the loss went from {first:.4f} to {last:.4f} in 20 steps")
    figures_are_read_without_waiting(precision, device)


def figures_are_read_without_waiting(precision: str, device: torch.device) -> None:
    """The trainer's step with its record, a line written for each; and an update's figures are read
    while what was queued after it still runs."""
    settings = [f"model.{key}={getattr(TINY, key)}" for key in ("n_layer", "n_head", "n_embd")]
    settings += [f"model.context={TINY.context}", f"train.device={device.type}", "logging.every=1"]
    settings += [f"train.precision={precision}", "train.global_batch=8", "train.micro_batch=4"]
    settings += ["model.vocab_size=50257"]  # of random_corpus
    with tempfile.TemporaryDirectory() as name, redirect_stdout(io.StringIO()):
        config = settled(Path(name), settings)
        training = Training(config, random_corpus(Path(name) / "ids", config, 100_000))
        training.seconds(2)
        with kernels(config.train), no_waiting(device):
            for _ in range(3):
                training.step()
        if device.type == "cuda":
            training.step()
            keep_busy(0.5)
            finished = torch.cuda.Event()
            finished.record()
            training.record.settle(training.done)
            if finished.query():
                raise AssertionError("reading the figures waited for what was queued after them")
        training.close()
