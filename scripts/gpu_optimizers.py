"""One update of each optimizer on a GPU, by scripts/bench_optim.py's own turns: as a multiple of
torch's fused AdamW, of the memory's floor, and as a share of a training step.

The floor is what an update must read and write over the bandwidth of a copy, measured just before.
Of AdamW: weight, gradient and two moments read, weight and moments written, 28 bytes a parameter.
MARS-AdamW reads the last gradient too and writes the present one in its place, and its clip needs
the norm of both before anything else can be done: 44.

Before them the symmetric products that Muon's update mostly is (scripts/gpu_symmetric.py).
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from model import GPT2
from scripts.bench_optim import gpt2, measure
from scripts.gpu_invariants import TINY
from scripts.gpu_parts import Part, Row, copy_rate
from scripts.gpu_speed import step_seconds
from scripts.gpu_symmetric import time_products

BYTES = {"adamw": 28, "mars_adamw": 44}  # per parameter, all float32
ORDER = (
    *(("small", name) for name in ("adamw", "mars_adamw", "muon", "shampoo", "soap", "lion")),
    *(("large", name) for name in ("adamw", "mars_adamw", "muon", "shampoo", "soap")),
)
SECONDS = 1.0  # of turns, a row; at least two turns of ten steps


def time_optimizers(part: Part) -> None:
    time_products(part)  # seconds
    bandwidth, slowest = copy_rate(part), 5.0
    model, held = None, ""
    for size, name in ORDER:
        row = {"size": size, "optimizer": name, "mode": "eager" if part.smoke else "compiled"}
        if part.left() < slowest and not part.smoke:
            part.report(**row, skipped="no time left")
            continue
        start = part.left()
        with part.attempt(**row) as result:
            if model is None or held != size:
                model = None  # before the next is made
                part.clear()
                model = model_of(size, part)
                held = size
            result |= time_optimizer(part, name, row["mode"], model, bandwidth)
            result |= share_of_step(part, size, result["ms"])
        slowest = max(slowest, start - part.left())
        part.clear()


def model_of(size: str, part: Part) -> nn.Module:
    """With a random gradient for each parameter."""
    if not part.smoke:
        return gpt2(f"gpt2_{size}", None, part.device)
    model = GPT2(TINY).to(part.device)
    for p in model.parameters():
        p.grad = 1e-3 * torch.randn_like(p)
    return model


def time_optimizer(part: Part, name: str, mode: str, model: nn.Module, bandwidth: float) -> Row:
    options = argparse.Namespace(device=part.device, seconds=0.1 if part.smoke else SECONDS)
    kept = ("ms", "ms_min", "fused_adamw_ms", "times_fused", "state_bytes")
    row = {key: value for key, value in measure(name, mode, model, options).items() if key in kept}
    if name in BYTES:
        moved = BYTES[name] * sum(p.numel() for p in model.parameters())
        row["floor_ms"] = 1e3 * moved / bandwidth
        row["times_floor"] = row["ms"] / row["floor_ms"]
    return row


def share_of_step(part: Part, size: str, ms: float) -> Row:
    """Of a step of 480 sequences, as ``speed`` has measured it with AdamW, with this optimizer in
    AdamW's place; nothing where that was not reached."""
    found = step_seconds(part.of("speed"), size)
    if found is None:
        return {}
    whole, adamw = found
    return {"of_step": 1e-3 * ms / (whole - adamw + 1e-3 * ms)}
