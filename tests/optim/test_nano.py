"""Every optimizer trains GPT-2 nano on real text with the settings of its configuration."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from toys import every_optimizer

from model import GPT2, GPT2Config
from optim import clip_grad_norm, create_optimizer

ROOT = Path(__file__).resolve().parents[2]
ROWS, LENGTH, STEPS = 4, 32, 40


def config(path: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "configs" / path).read_text())


def nano() -> GPT2:
    sizes = {key: config("model/gpt2_nano.yaml")[key] for key in ("n_layer", "n_head", "n_embd")}
    torch.manual_seed(0)
    return GPT2(GPT2Config(**sizes, context=LENGTH, vocab_size=256))


def batch(text: Tensor, step: int, rows: int = ROWS) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - LENGTH, (rows,), generator=generator)
    return torch.stack([text[i : i + LENGTH + 1] for i in starts.tolist()]).long()


def loss_of(model: GPT2, tokens: Tensor, sampled: bool = False) -> Tensor:
    logits = model(tokens[:, :-1]).flatten(0, 1)[:, :256]
    targets = tokens[:, 1:].flatten()
    if sampled:
        targets = torch.distributions.Categorical(logits=logits.detach()).sample()
    return torch.nn.functional.cross_entropy(logits, targets)


@pytest.mark.slow
@every_optimizer
def test_lowers_the_loss_in_40_steps(name: str) -> None:
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8)
    held_out, model = batch(text, -1, rows=64), nano()
    optimizer = create_optimizer(
        named_parameters=model.named_parameters(), **config(f"optim/{name}.yaml")
    )
    with torch.no_grad():
        before = loss_of(model, held_out).item()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, batch(text, step)).backward()
        clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
        if optimizer.needs_hessian_gradient:
            optimizer.zero_grad()
            loss_of(model, batch(text, STEPS + step), sampled=True).backward()
            optimizer.store_hessian_gradient()
    with torch.no_grad(), optimizer.evaluation_weights():
        after = loss_of(model, held_out).item()
    print(name, before, after)
    assert after < before - 0.1
