"""Matrices stacked in one parameter's rows are updated as if each were a parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import Net, make

from optim import Optimizer, create_optimizer
from optim.create import SETTINGS
from optim.rules import rules

MATRIX_RULES = [name for name, rule in rules().items() if rule.granularity == "matrix"]
EXTRA: dict[str, dict[str, Any]] = {  # what a rule needs to show all its parts in a few steps
    "shampoo": {"grafting": "adam", "max_dim": 6, "precondition_frequency": 3},
    "soap": {"precondition_frequency": 3},
    "dion": {"rank": 4},
}


def optimizer_of(rule: str, params: list[nn.Parameter], **options: Any) -> Optimizer:
    named = [(f"h.{i}.weight", p) for i, p in enumerate(params)]
    settings = {"lr": 0.01, "groups": SETTINGS["groups"], **EXTRA.get(rule, {}), **options}
    return create_optimizer(rule, named, **settings)


def run(optimizer: Optimizer, params: list[nn.Parameter], grads: list[list[Tensor]]) -> None:
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()


@pytest.mark.parametrize("rule", MATRIX_RULES)
@pytest.mark.parametrize("rows", [8, 12])
def test_three_fused_are_three_separate(rule: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, rows, 10, generator=generator)
    grads = torch.randn(10, 3, rows, 10, generator=generator)
    whole = [nn.Parameter(start.flatten(0, 1).clone())]
    parts = [nn.Parameter(matrix.clone()) for matrix in start]
    fused, separate = optimizer_of(rule, whole, fused=3), optimizer_of(rule, parts)
    run(fused, whole, [[g.flatten(0, 1)] for g in grads])
    run(separate, parts, [list(g) for g in grads])
    assert not torch.equal(whole[0], start.flatten(0, 1))
    torch.testing.assert_close(whole[0], torch.cat(parts), rtol=1e-4, atol=1e-5)
    for key, tensor in fused.state[whole[0]].items():
        if key != "step":
            stacked = torch.cat([separate.state[p][key] for p in parts])
            torch.testing.assert_close(tensor, stacked, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_as_one_matrix_they_differ(rule: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start, grads = (torch.randn(n, 24, 10, generator=generator) for n in (1, 4))
    ends = []
    for fused in (1, 3):
        params = [nn.Parameter(start[0].clone())]
        run(optimizer_of(rule, params, fused=fused), params, [[g] for g in grads])
        ends.append(params[0].detach())
    assert (ends[0] - ends[1]).abs().max() > 1e-4


@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_refuses_rows_that_do_not_divide(rule: str) -> None:
    with pytest.raises(ValueError, match=rf"square\.weight, rule {rule}: 8 rows are not 3 fused"):
        make(Net(), rule, groups={"m": {"match": "matrix"}, "v": OTHERS}, fused=3)


OTHERS = {"match": ["embedding", "head", "vector"], "rule": "adamw"}


def test_one_group_of_a_model_may_be_fused() -> None:
    """As the configuration says it: c_attn's group has fused 3, the other matrices have not."""
    c_attn, c_proj = nn.Parameter(torch.ones(24, 8)), nn.Parameter(torch.ones(8, 8))
    optimizer = create_optimizer(
        "shampoo",
        [("h.0.attn.c_attn.weight", c_attn), ("h.0.attn.c_proj.weight", c_proj)],
        groups={"qkv": {"match": ["c_attn"], "fused": 3}, "rest": {"match": ["matrix"]}},
    )
    factors = {key: optimizer.state[c_attn][key].shape for key in ("factor.0.0", "factor.0.1")}
    assert factors == {"factor.0.0": (24, 8), "factor.0.1": (24, 8)}  # three of 8 x 8 each
    assert optimizer.state[c_proj]["factor.0.0"].shape == (8, 8)
