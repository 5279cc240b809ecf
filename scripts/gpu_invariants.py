"""What must hold of model, optimizers and a step on a GPU, as plain functions: each raises where it
does not (scripts/gpu_claims.py has the list)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from model import GPT2, GPT2Config
from optim import Optimizer, clip_grad_norm, create_optimizer
from optim.create import resolve
from optim.rules import rules
from runtime.config import Config, load, schedule
from runtime.device import Device
from runtime.record import Figures
from train import update

CONFIGS = str(Path(__file__).resolve().parents[1] / "configs")
TINY = GPT2Config(n_layer=2, n_head=4, n_embd=64, context=32, vocab_size=257, vocab_multiple=64)
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
    """Three steps from the same weights along the same gradients. Newton-Schulz in float32: in
    bfloat16 two devices differ by what it rounds."""
    with full_float32():
        here, there = build(name, torch.device("cpu")), build(name, device)
        for step in range(3):
            take_step(here, step)
            with no_waiting(device):
                take_step(there, step)
    assert_same_weights(there, here)


def compiled_equals(name: str, device: torch.device) -> None:
    """Four steps with another lr each. Only two may compile: some rules begin with a step that is
    unlike the rest."""
    with full_float32():
        eager, compiled = build(name, device), build(name, device, compile=True)
        for step in range(4):
            take_step(eager, step)
            if step < 2:
                take_step(compiled, step)
                continue
            with compiling_nothing(), no_waiting(device):
                take_step(compiled, step)
    assert_same_weights(compiled, eager)


def build(name: str, device: torch.device, compile: bool = False) -> Optimizer:
    generator = torch.Generator().manual_seed(0)
    parameters = [
        (key, nn.Parameter(torch.randn(shape, generator=generator).to(device)))
        for key, shape in SHAPES.items()
    ]
    used = {f.name for group in resolve(name).values() for f in fields(rules()[group["rule"]])}
    exact: dict[str, Any] = {"ns_dtype": "float32"} if "ns_dtype" in used else {}
    return create_optimizer(name, parameters, compile=compile, lr=1e-2, **exact)


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
