"""The engine is a torch optimizer whose state is exact."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from optim import Optimizer, create_optimizer


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(5, 6, generator=generator).to(next(model.parameters()).dtype)
    return model(x).float().square().mean()


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, **zero: Any) -> None:
    for step in steps:
        optimizer.zero_grad(**zero)
        loss_of(model, step).backward()
        optimizer.step()


def make(model: nn.Module, name: str = "mars_adamw", **options: Any) -> Optimizer:
    return create_optimizer(name, model.named_parameters(), **{"lr": 1e-2, **options})


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_continues_bit_identically(dtype: torch.dtype) -> None:
    whole, first = net(dtype), net(dtype)
    advance(whole, make(whole), range(6))
    optimizer = make(first)
    advance(first, optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = copy.deepcopy(first)
    resumed = make(second)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert all(t.dtype != torch.bfloat16 for t in resumed.named_state().values())
    advance(second, resumed, range(3, 6))
    assert equal(whole, second)


def test_named_state_continues_bit_identically() -> None:
    whole, first = net(), net()
    advance(whole, make(whole), range(6))
    optimizer = make(first)
    advance(first, optimizer, range(3))
    second = copy.deepcopy(first)
    resumed = make(second)
    resumed.load_named_state({k: v.clone() for k, v in optimizer.named_state().items()})
    advance(second, resumed, range(3, 6))
    assert equal(whole, second)


def test_loading_does_not_tie_two_optimizers() -> None:
    a, b = net(), net()
    ours, theirs = make(a), make(b)
    advance(a, ours, range(2))
    theirs.load_state_dict(ours.state_dict())
    before = {k: v.clone() for k, v in ours.named_state().items()}
    advance(b, theirs, range(2, 4))
    assert all(torch.equal(v, before[k]) for k, v in ours.named_state().items())


def test_state_of_another_optimizer_is_refused() -> None:
    a, b = net(), net()
    lion = make(b, "lion")
    with pytest.raises(ValueError, match=r"another optimizer.s: missing .*last_grad"):
        make(a).load_state_dict(lion.state_dict())
    with pytest.raises(ValueError, match="another optimizer's"):
        make(a).load_named_state(lion.named_state())


def test_gradients_set_to_zero_or_to_none_give_the_same_run() -> None:
    """MARS keeps the last gradient: a reference to p.grad would become the new one."""
    a, b = net(), net()
    advance(a, make(a), range(5), set_to_none=True)
    advance(b, make(b), range(5), set_to_none=False)
    assert equal(a, b)


def test_parameter_without_gradient_is_left_alone() -> None:
    model = net()
    optimizer = make(model)
    bias = model[0].bias
    before = bias.detach().clone()
    loss_of(model, 0).backward()
    bias.grad = None
    optimizer.step()
    assert torch.equal(bias, before)
    assert optimizer.state[bias]["step"] == 0


def test_group_added_later_is_trained_like_the_first() -> None:
    model, extra = net(), nn.Parameter(torch.ones(4, 4))
    optimizer = make(model, "adamw")
    optimizer.add_param_group({"params": [("extra.weight", extra)], "lr": 0.1})
    extra.grad = torch.ones(4, 4)
    optimizer.step()
    assert (extra < 1).all()
    assert "extra.weight.exp_avg" in optimizer.named_state()


def test_lr_may_be_a_tensor_and_schedulers_work() -> None:
    a, b = net(), net()
    number, tensor = make(a, "adamw", lr=1e-2), make(b, "adamw", lr=torch.tensor(1e-2).double())
    groups = tensor.param_groups
    assert groups[0]["lr"] is not groups[1]["lr"]  # schedulers fill it in place
    for optimizer, model in ((number, a), (tensor, b)):
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for step in range(3):
            advance(model, optimizer, range(step, step + 1))
            scheduler.step()
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y)


def test_grad_scaler_skips_an_overflow() -> None:
    model = net()
    optimizer = make(model)
    scaler = torch.amp.GradScaler("cpu")
    before = copy.deepcopy(model)
    scaler.scale(loss_of(model, 0)).backward()
    next(model.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
    scaler.step(optimizer)
    scaler.update()
    assert equal(model, before)
    assert scaler.get_scale() < 2**16


def test_closure_and_maximize() -> None:
    down, up = net(), net()
    for model, options in ((down, {}), (up, {"maximize": True})):
        optimizer = make(model, "adamw", weight_decay=0.0, **options)

        def closure(model: nn.Module = model, optimizer: Optimizer = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, 0)
            loss.backward()
            return loss

        losses = [float(optimizer.step(closure)) for _ in range(5)]  # type: ignore[arg-type]
        assert (losses[-1] < losses[0]) == (model is down)


def test_adamw_equals_torchs() -> None:
    a, b = net(), net()
    groups = {"all": {"match": ["matrix", "vector"]}}
    ours = make(a, "adamw", betas=(0.9, 0.95), weight_decay=0.1, groups=groups)
    theirs = torch.optim.AdamW(b.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    advance(a, ours, range(20))
    advance(b, theirs, range(20))
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_exact_mars_asks_for_the_next_gradient_and_uses_it() -> None:
    """With gradient = f(point, batch), last_grad at step t is f(w_{t-1}, batch t): c differs."""
    model = net()
    optimizer = make(model, mars={"exact": True})
    assert optimizer.needs_next_batch_gradient
    assert not make(net()).needs_next_batch_gradient
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.25)
    optimizer.store_next_batch_gradient()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = optimizer.named_state()["0.weight.last_grad"]
    assert torch.equal(kept, torch.full_like(kept, 0.25))


def test_cautious_mask_keeps_agreeing_entries_only() -> None:
    p = nn.Parameter(torch.zeros(2, 2))
    optimizer = create_optimizer(
        "adamw", [("w", p)], lr=1.0, weight_decay=0.0, betas=(0.9, 0.99), mask="cautious"
    )
    p.grad = torch.ones(2, 2)
    optimizer.step()
    moved = p.detach().clone()
    p.grad = torch.tensor([[-0.1, 1.0], [1.0, 1.0]])  # momentum still points along +1
    optimizer.step()
    assert p[0, 0] == moved[0, 0]
    assert (p[1] < moved[1]).all()


def test_table_names_every_parameter() -> None:
    model = net()
    optimizer = make(model)
    table = {row["parameter"]: row for row in optimizer.table()}
    assert table.keys() == dict(model.named_parameters()).keys()
    assert table["0.weight"]["correction"] == "mars"
    assert table["0.weight"]["state_bytes"] == 3 * 4 * 48 + 8  # two moments, last gradient, step
    assert table["0.bias"]["correction"] == "none"
