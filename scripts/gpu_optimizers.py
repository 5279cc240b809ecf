"""One update of each optimizer on a GPU, in turns with torch's fused AdamW: as a multiple of it, of
the memory's floor, and as a share of a training step.

The floor is what an update must read and write over the bandwidth of a copy, measured just before.
Of AdamW: weight, gradient and two moments read, weight and moments written, 28 bytes a parameter.
MARS-AdamW reads the last gradient too and writes the present one in its place, and its clip needs
the norm of both before anything else can be done: 44.

Shampoo and SOAP decompose each factor once in ten steps, which takes a GPU seconds: their rows are
ten steps one by one, *worst_ms* is that which decomposes. What that will take is told beforehand,
from one decomposition, and a row that would not end in time says so.

Beside them the symmetric products that Muon's update mostly is (scripts/gpu_symmetric.py).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model import GPT2
from optim import Optimizer
from scripts.bench_optim import LR, gpt2, measure, optimizer_of
from scripts.gpu_invariants import TINY, decomposes
from scripts.gpu_parts import Part, Row, copy_rate
from scripts.gpu_speed import step_seconds
from scripts.gpu_symmetric import time_products

BYTES = {"adamw": 28, "mars_adamw": 44}  # per parameter, all float32
ORDER = (  # and seconds, guessed: to compile, to fill the memory, of turns; what targets want first
    ("small", "adamw", 3.0),
    ("small", "mars_adamw", 8.0),
    ("small", "muon", 14.0),
    ("large", "adamw", 6.0),
    ("large", "mars_adamw", 12.0),
    ("small", "soap", 10.0),
    ("small", "shampoo", 10.0),
    ("large", "muon", 20.0),
    ("small", "lion", 8.0),
    ("large", "soap", 20.0),
    ("large", "shampoo", 20.0),
)
DECOMPOSITIONS: dict[str, Callable[[Tensor], Any]] = {  # of a step like most, by rule
    "shampoo": torch.linalg.eigh,
    "soap": torch.linalg.qr,
}
SECONDS = 1.0  # of turns, a row; at least two turns of ten steps


def time_optimizers(part: Part) -> None:
    bandwidth, model, held = copy_rate(part), None, ""
    time_products(part, "large")
    for size, name, guess in ORDER:
        row = {"size": size, "optimizer": name, "mode": "eager" if part.smoke else "compiled"}
        if part.left() < guess and not part.smoke:
            part.report(**row, skipped=f"{guess:.0f} s needed, {part.left():.0f} left")
            continue
        with part.attempt(**row) as result:
            if model is None or held != size:
                model = None  # before the next is made
                part.clear()
                model = model_of(size, part)
                held = size
            result |= time_optimizer(part, name, row["mode"], model, bandwidth)
            if "ms" in result:
                result |= share_of_step(part, size, result["ms"])
        part.clear()
    time_products(part, "small")


def model_of(size: str, part: Part) -> nn.Module:
    """With a random gradient for each parameter."""
    if not part.smoke:
        return gpt2(f"gpt2_{size}", None, part.device)
    model = GPT2(TINY).to(part.device)
    for p in model.parameters():
        p.grad = 1e-3 * torch.randn_like(p)
    return model


def time_optimizer(part: Part, name: str, mode: str, model: nn.Module, bandwidth: float) -> Row:
    if name in DECOMPOSITIONS:
        return time_period(part, name, mode, model)
    options = argparse.Namespace(device=part.device, seconds=0.1 if part.smoke else SECONDS)
    kept = ("ms", "ms_min", "fused_adamw_ms", "times_fused", "state_bytes")
    row = {key: value for key, value in measure(name, mode, model, options).items() if key in kept}
    if name in BYTES:
        moved = BYTES[name] * sum(p.numel() for p in model.parameters())
        row["floor_ms"] = 1e3 * moved / bandwidth
        row["times_floor"] = row["ms"] / row["floor_ms"]
    return row


def time_period(part: Part, name: str, mode: str, model: nn.Module) -> Row:
    """The mean of as many steps as have one decomposition among them, some way into a run."""
    optimizer: Any = optimizer_of(name, mode, model)
    period = max(
        group["hyper"].get("precondition_frequency", 1) for group in optimizer.param_groups
    )
    begin(optimizer, period)
    needed = decomposition_seconds(part, name, optimizer)
    if part.left() < 1.2 * needed + 5 and not part.smoke:
        return {"skipped": f"a step that decomposes: {needed:.0f} s, {part.left():.0f} left"}
    fused = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    for step in (optimizer.step, fused.step):
        part.seconds(step)  # compiles, creates state
    own, theirs = [], []
    for _ in range(period):
        own.append(1e3 * part.seconds(optimizer.step))
        theirs.append(1e3 * part.seconds(fused.step))
    mean, least = statistics.fmean(own), statistics.median(theirs)
    return {
        "ms": mean,
        "worst_ms": max(own),
        "fused_adamw_ms": least,
        "times_fused": mean / least,
    }


def begin(optimizer: Optimizer, period: int) -> None:
    """As after the first decomposition, of which a run has one: the next step has none, nor have
    those up to the next multiple of the period."""
    for state in optimizer.state.values():
        state["step"].fill_(period)
        for key, tensor in state.items():
            if key.startswith("basis."):
                n = tensor.shape[-1]
                tensor.copy_(torch.eye(n).repeat(len(tensor) // n, 1))
    while decomposes(optimizer, int(next(iter(optimizer.state.values()))["step"])):
        for state in optimizer.state.values():
            state["step"] += 1


def decomposition_seconds(part: Part, name: str, optimizer: Optimizer) -> float:
    """What all factors will take, from one of those there are most of: as their sizes' cube."""
    factors = [
        tensor.shape
        for state in optimizer.state.values()
        for key, tensor in state.items()
        if key.startswith("factor.")
    ]
    usual = statistics.mode(shape[-1] for shape in factors)
    work = partial(DECOMPOSITIONS[name], torch.randn(usual, usual, device=part.device))
    work()  # loads the library
    alike = sum(shape[0] * shape[1] ** 2 / usual**3 for shape in factors)
    return part.seconds(work) * alike


def share_of_step(part: Part, size: str, ms: float) -> Row:
    """Of a step of 480 sequences, as ``speed`` has measured it with AdamW, with this optimizer in
    AdamW's place; nothing where that was not reached."""
    found = step_seconds(part.of("speed"), size, True)
    if found is None:
        return {}
    whole, adamw = found
    return {"of_step": 1e-3 * ms / (whole - adamw + 1e-3 * ms)}
