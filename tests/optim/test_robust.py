"""The optimizers in other people's loops: torch's tools, awkward gradients, and clear mistakes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_no_sync import NoCopies
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler
from toys import Net, advance, assert_equal, every_optimizer, loss_of, make, weights

from optim import Optimizer, clip_grad_norm, create_optimizer
from optim.rules import rules


@every_optimizer
def test_a_step_does_not_wait(name: str) -> None:
    """All of `step`, engine included, on a device without values, where reading one raises."""
    with torch.device("meta"):
        model = Net()
    optimizer = make(model, name)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    with NoCopies():
        for done in (0, 1, 9, 10):  # some rules do more at the first and at every tenth step
            for state in optimizer.state.values():
                state["step"].fill_(done)
            optimizer.step()


@every_optimizer
def test_distributed_checkpoint_functions_continue_bit_identically(name: str) -> None:
    """They take a step on zero gradients where an optimizer has no state: it must not move."""
    first = Net()
    optimizer = make(first, name)
    advance(first, optimizer, range(4))
    saved = copy.deepcopy(get_optimizer_state_dict(first, optimizer))
    second = copy.deepcopy(first)
    resumed = make(second, name)
    set_optimizer_state_dict(second, resumed, saved)
    assert_equal(weights(first), weights(second))
    for model, its in ((first, optimizer), (second, resumed)):
        advance(model, its, range(4, 8))
    assert_equal(weights(first), weights(second))


@every_optimizer
def test_copies_and_pickles_continue_bit_identically(name: str) -> None:
    model = Net()
    optimizer = make(model, name)
    advance(model, optimizer, range(3))
    pairs = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    for other, its in pairs:
        advance(other, its, range(3, 6))
    advance(model, optimizer, range(3, 6))
    for other, _ in pairs:
        assert_equal(weights(model), weights(other))


Schedule = Callable[[Optimizer], lr_scheduler.LRScheduler]
SCHEDULES: dict[str, Schedule] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.01, total_steps=10, cycle_momentum=False),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, 3, cycle_momentum=False),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("tensor", [False, True])
def test_torchs_schedulers_drive_ours_as_torchs(name: str, tensor: bool) -> None:
    ours, theirs = Net(), Net()
    lr: Any = torch.tensor(1e-3, dtype=torch.float64) if tensor else 1e-3
    groups = {"all": {"match": ["."]}}
    options = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = (
        make(ours, "adamw", lr=lr, groups=groups, **options),
        torch.optim.AdamW(theirs.parameters(), lr=1e-3, **options),
    )
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        schedule = SCHEDULES[name](optimizer)  # type: ignore[arg-type]
        for step in range(6):
            advance(model, optimizer, range(step, step + 1))
            schedule.step()
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_schedule_of_the_momentum_is_refused() -> None:
    with pytest.raises(ValueError, match="momentum"):
        lr_scheduler.OneCycleLR(make(Net(), "adamw"), 0.01, total_steps=10)


@pytest.mark.slow
def test_step_inside_torch_compile() -> None:
    """A user's compiled training step: the optimizer's part runs as it is."""
    ours, plain = Net(), Net()
    optimizers = [make(model, "mars_adamw") for model in (ours, plain)]
    compiled = torch.compile(optimizers[0].step)
    for step in range(3):
        for model, optimizer in zip((ours, plain), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, step).backward()
        compiled()
        optimizers[1].step()
    for a, b in zip(weights(ours), weights(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@every_optimizer
def test_maximize_is_the_mirror_of_descending(name: str) -> None:
    down, up = Net(), Net()
    optimizers = make(down, name), make(up, name, maximize=True)
    for step in range(3):
        for p, q in zip(down.parameters(), up.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = -p.grad
        for optimizer in optimizers:
            optimizer.step()
    assert_equal(weights(down), weights(up))


@every_optimizer
def test_a_gradient_that_comes_and_goes(name: str) -> None:
    """Each parameter lives by its own count of steps; the others do not notice."""
    model, other = Net(), Net()
    optimizers = make(model, name), make(other, name)
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        if step == 2:
            model.square.weight.grad = None
        for optimizer in optimizers:
            optimizer.step()
    assert optimizers[0].state[model.square.weight]["step"] == 4
    assert not torch.equal(model.square.weight, other.square.weight)
    if not any(rules()[g["rule"]].joint for g in optimizers[0].param_groups):
        assert torch.equal(model.wide.weight, other.wide.weight)


@every_optimizer
def test_a_parameter_added_later_is_trained(name: str) -> None:
    model, extra = Net(), nn.Parameter(torch.ones(6, 6))
    optimizer = make(model, name)
    advance(model, optimizer, range(2))
    optimizer.add_param_group({"params": [("extra.weight", extra)]})
    for _ in range(3):
        extra.grad = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
        optimizer.step()
    assert extra.isfinite().all() and not torch.equal(extra, torch.ones(6, 6))
    row = next(row for row in optimizer.table() if row["parameter"] == "extra.weight")
    assert row["rule"] == optimizer.param_groups[0]["rule"]


@every_optimizer
def test_a_plain_module_whose_names_say_nothing(name: str) -> None:
    """That torch is all it needs: tests/test_help.py."""
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))
    optimizer = create_optimizer(name, model.named_parameters())
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 8)).square().mean().backward()
        clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
    for p, start in zip(model.parameters(), before, strict=True):
        assert p.isfinite().all() and not torch.equal(p, start)


V, W = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, 3))
BLOCK = nn.Parameter(torch.zeros(2, 2, 2))
ALL = {"groups": {"all": {"match": ["."]}}}


@pytest.mark.parametrize(
    ("name", "parameters", "options", "said"),
    [
        ("sinkgd", [("h.w", W)], {"correction": "mars"}, "SinkGD keeps no momentum, which corr"),
        ("swan", [("h.w", W)], {"correction": "mars"}, "Swan keeps no momentum, which corr"),
        ("adafactor", [("h.w", W)], {"correction": "mars"}, "Adafactor keeps no momentum"),
        ("muon", [("h.b", V)], ALL, r"h\.b has shape \(3,\), but muon updates"),
        (
            "soap",
            [("h.t", nn.Parameter(torch.zeros(2, 2, 2)))],
            ALL,
            r"h\.t has",
        ),
        ("muon", [("h.w", W)], {"fused": 2}, r"h\.w, rule muon: 3 rows are not 2 fused"),
        ("muon", [("h.w", W)], {"fused": 0}, "fused must be positive"),
        (
            "lion",
            [("h.w", W)],
            {"betas": (0.9, -0.1)},
            r"rule lion: betas\[1\] must be in",
        ),
        ("muon", [("h.w", W)], {"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ("lion", [("h.w", W)], {"lr": float("nan")}, "lr must be a number that is not negative"),
        ("lion", [("h.w", W), ("h.w", V)], {}, "two parameters have the same name"),
    ],
)
def test_each_mistake_is_one_clear_error(
    name: str, parameters: list[tuple[str, Tensor]], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        create_optimizer(name, parameters, **options)
    assert "\n" not in str(caught.value)


def test_a_group_added_later_is_checked_as_well() -> None:
    optimizer = make(Net(), "muon")
    with pytest.raises(ValueError, match=r"extra\.bias has shape \(3,\), but muon updates matr"):
        optimizer.add_param_group({"params": [("extra.bias", nn.Parameter(torch.zeros(3)))]})
    with pytest.raises(ValueError, match="lr must not be negative, given -1"):
        optimizer.add_param_group({"params": [("e.w", nn.Parameter(torch.eye(3)))], "lr": -1.0})
