"""With ``spread`` each matrix is decomposed once every so many steps, and no step does all of them.

That several processes do what one does, also after a checkpoint made by another number of them, is
tested with spread in test_division.py and test_division_state.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from toys import Net, advance, assert_equal, loss_of, make, weights

from optim import Optimizer, create_optimizer
from optim.blocks import factored_work
from optim.create import SETTINGS
from optim.rules import rules

FREQUENCY = 5
DECOMPOSED = {"shampoo": "root.0.", "soap": "basis."}  # state that changes then alone
RULES: dict[str, dict[str, Any]] = {
    "shampoo": {"grafting": "adam", "start_step": 2},
    "soap": {},
}
every_rule = pytest.mark.parametrize("name", RULES)


def optimizer_of(name: str, params: list[nn.Parameter], **options: Any) -> Optimizer:
    named = [(f"h.{i}.weight", p) for i, p in enumerate(params)]
    given = {"lr": 0.01, "groups": SETTINGS["groups"], **RULES[name], **options}
    return create_optimizer(name, named, precondition_frequency=FREQUENCY, **given)


def matrices(shapes: list[tuple[int, int]]) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def decomposed(name: str, spread: bool, shapes: list[tuple[int, int]], steps: int) -> Tensor:
    """Whether each matrix's roots or bases changed: bool (step, matrix), past the first ones."""
    params = matrices(shapes)
    optimizer = optimizer_of(name, params, spread=spread)
    table: list[list[bool]] = []
    for _ in range(FREQUENCY + 2 + steps):
        before = [{k: x.clone() for k, x in optimizer.state[p].items()} for p in params]
        for p in params:
            p.grad = torch.randn(p.shape)
        optimizer.step()
        table.append([])
        for p, old in zip(params, before, strict=True):
            keys = [key for key in old if key.startswith(DECOMPOSED[name])]
            changed = {not torch.equal(old[key], optimizer.state[p][key]) for key in keys}
            assert len(changed) == 1, "one side alone"
            table[-1] += changed
    return torch.tensor(table[FREQUENCY + 2 :])


@every_rule
def test_each_matrix_once_and_each_step_as_many(name: str) -> None:
    times = decomposed(name, True, [(6, 4)] * 7 + [(4, 6)] * 6, 3 * FREQUENCY).long()
    for start in range(len(times) - FREQUENCY + 1):
        assert (times[start : start + FREQUENCY].sum(0) == 1).all()
    assert set(times.sum(1).tolist()) == {2, 3}  # 13 of one cost in 5 steps


@every_rule
def test_otherwise_all_in_one_step(name: str) -> None:
    times = decomposed(name, False, [(6, 4)] * 3, 2 * FREQUENCY).sum(1).tolist()
    assert sorted(times) == [0] * 8 + [3] * 2


@every_rule
@pytest.mark.parametrize("fused", [1, 3])
def test_steps_cost_about_the_same(name: str, fused: int) -> None:
    """The matrices of GPT-2 small: the largest decomposition of a step is the least that it can
    cost at most."""
    shapes = tuple(
        torch.Size((768 * rows, 768 * cols))
        for rows, cols in [(3, 1), (1, 1), (4, 1), (1, 4)] * 12
        if fused == 1 or rows == 3
    )
    settings = {"max_dim": 8192} if name == "shampoo" else {}
    rule: Any = rules()[name](precondition_frequency=10, spread=True, fused=fused, **settings)
    costs = [
        factored_work(shape, fused, *rule.cuts(shape), products=0, decomposition=1)
        for shape in shapes
    ]
    loads = [0] * 10
    for phase, cost in zip(rule.phases(shapes), costs, strict=True):
        loads[phase] += cost
    assert max(loads) <= sum(loads) / 10 + max(costs)
    assert rule.phases(shapes) == rules()[name](**vars(rule)).phases(shapes)


@pytest.mark.parametrize("start_step", [1, 4])
@pytest.mark.parametrize("grafting", ["none", "adam"])
def test_first_roots_are_common_then_phase_k_comes_later(start_step: int, grafting: str) -> None:
    """Roots that begin later cost loss: at nano size 0.02 nats after 150 steps (3 seeds)."""
    rule: Any = rules()["shampoo"](
        precondition_frequency=FREQUENCY, start_step=start_step, grafting=grafting
    )
    for phase in range(FREQUENCY):
        for step in range(1, start_step + 1):
            assert rule.direction_at(step, phase) == rule.direction_at(step)
        for step in range(start_step + 1, 30):
            assert rule.direction_at(step + phase, phase) == rule.direction_at(step)
    waiting = rule.direction if grafting == "none" else rule.before_start
    early = [rule.direction_at(step, 2) for step in range(1, start_step + 1)]
    assert early == [waiting] * (start_step - 1) + [rule.with_new_roots]


@every_rule
def test_a_continued_run_is_the_uninterrupted_one(name: str) -> None:
    options = {**RULES[name], "precondition_frequency": 3, "spread": True}
    through, stopped, resumed = Net(), Net(), Net()
    optimizer = make(through, name, **options)
    advance(through, optimizer, range(14))
    first = make(stopped, name, **options)
    advance(stopped, first, range(7))
    resumed.load_state_dict(stopped.state_dict())
    second = make(resumed, name, **options)
    second.load_named_state(first.named_state())
    advance(resumed, second, range(7, 14))
    assert_equal(weights(through), weights(resumed))


@every_rule
def test_a_frozen_matrix_moves_no_other(name: str) -> None:
    """Phases are of places in the group, not among the gradients that happen to be there."""
    ends = []
    for missing in (False, True):
        params = matrices([(6, 4)] * 4)
        optimizer = optimizer_of(name, params, spread=True)
        for step in range(12):
            torch.manual_seed(step)
            for p in params:
                p.grad = torch.randn(p.shape)
            if missing:
                params[0].grad = None
            optimizer.step()
        ends.append([p.detach() for p in params[1:]])
    assert_equal(*ends)


@every_rule
def test_the_loss_falls(name: str) -> None:
    model = Net()
    before = loss_of(model).item()
    options = {**RULES[name], "lr": 0.03, "precondition_frequency": FREQUENCY}
    advance(model, make(model, name, spread=True, **options), range(60))
    assert loss_of(model).item() < 0.5 * before


@every_rule
def test_on_a_gpu_a_call_does_one_thing(name: str) -> None:
    """There matrices of one shape are stacked: those that are due, and the others."""
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(6, 4, device="cuda")) for _ in range(7)]
        for p in params:
            p.grad = torch.empty_like(p)
        for spread, expected in ((False, [[7]] * 5), (True, [[1, 6], [2, 5]])):
            optimizer = optimizer_of(name, params, spread=spread)
            (group,) = optimizer.param_groups
            for steps in range(20, 25):
                pieces = optimizer._pieces(group)
                for piece in pieces:
                    piece.state["step"] = torch.tensor(float(steps), dtype=torch.float64)
                sizes = sorted(len(some) for some, _ in optimizer._calls(group, pieces))
                assert sizes in expected
