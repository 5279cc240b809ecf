"""A tiny GPT-2 whose weights make every part of it matter."""

from __future__ import annotations

import torch
from torch import Tensor

from model import GPT2, GPT2Config

TINY = GPT2Config(n_layer=3, n_head=2, n_embd=32, context=24, vocab_size=61)


def random_model(config: GPT2Config, seed: int = 0) -> GPT2:
    """Weights far from the initial ones: attention is sharp, and gains and biases matter."""
    model = GPT2(config)
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(config: GPT2Config, rows: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, config.context + 1)
    text = torch.randint(config.vocab_size, shape, generator=generator)
    return text[:, :-1], text[:, 1:]
