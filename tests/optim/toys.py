"""A small network with a parameter of each role, and steps on it, for the tests of this folder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optim import Optimizer, create_optimizer, list_optimizers

every_optimizer = pytest.mark.parametrize("name", list_optimizers())


class Net(nn.Module):
    """One parameter of each role, and matrices that are square, wide and tall."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(10, 8)
        self.square, self.wide, self.tall = nn.Linear(8, 8), nn.Linear(12, 8), nn.Linear(8, 12)
        self.lm_head = nn.Linear(8, 10, bias=False)
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens)
        x = x + self.square(torch.tanh(x))
        x = x + self.wide(torch.tanh(self.tall(x)))
        return self.lm_head(x).float()


def loss_of(model: nn.Module, step: int = 0) -> Tensor:
    tokens = torch.randint(10, (64,), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(tokens), (3 * tokens + 1) % 10)


def advance(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, set_to_none: bool = True
) -> nn.Module:
    for step in steps:
        optimizer.zero_grad(set_to_none=set_to_none)
        loss_of(model, step).backward()
        optimizer.step()
        if isinstance(optimizer, Optimizer) and optimizer.needs_hessian_gradient:
            optimizer.zero_grad(set_to_none=set_to_none)
            loss_of(model, step).backward()
            optimizer.store_hessian_gradient()
    return model


def make(model: nn.Module, name: str, **options: Any) -> Optimizer:
    return create_optimizer(name, model.named_parameters(), **options)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
