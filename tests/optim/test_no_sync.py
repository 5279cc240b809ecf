"""No update waits for the device.

Fake tensors have shapes, dtypes and devices but no values: whatever needs a value on the host
(`.item()`, `if norm > 1`, `x[mask]`) raises. What they let pass, a copy between the device (here
"meta", which every build of torch has) and the host, is caught by looking at each operation's
tensors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optim.correction import CORRECTIONS
from optim.mask import MASKS
from optim.norms import clip_grad_norm
from optim.rules import rules
from optim.update import update_parameters


class NoCopies(TorchDispatchMode):
    """Raise where an operation turns tensors of the device into host tensors, or the reverse."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given, returned = devices((args, kwargs)), devices(result)
        if (given and not returned <= given) or (returned == {"cpu"} and "meta" in given):
            raise AssertionError(f"{func} copies from {given} to {returned}")
        return result


def devices(tree: Any) -> set[str]:
    return {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}


CASES = [
    (name, shape)
    for name, rule in rules().items()
    for shape in [(8, 12), (12, 8), (16,)]
    if rule.granularity != "matrix" or len(shape) in rule.orders
]


@pytest.mark.parametrize(("name", "shape"), CASES)
@pytest.mark.parametrize("mask", MASKS)
def test_an_update_does_not_wait(name: str, shape: tuple[int, ...], mask: str) -> None:
    rule = rules()[name]()
    with FakeTensorMode():
        correction = CORRECTIONS["none"]()
        params = [torch.empty(shape, device="meta") for _ in range(2)]
        grads = [torch.empty(shape, device="meta") for _ in params]
        step = torch.zeros((), dtype=torch.float64)
        states = [{"step": step, **rule.init_state(p)} for p in params]
        lr = torch.zeros((), dtype=torch.float64)
        with NoCopies():
            for direction in {rule.direction_at(t) for t in range(1, 20)}:
                how = (rule, correction, MASKS[mask], direction, 0.1)
                update_parameters(*how, params, grads, states, lr)
            rule.join(states)


def test_the_correction_does_not_wait() -> None:
    rule, mars = rules()["adamw"](), CORRECTIONS["mars"]()
    with FakeTensorMode():
        grad = torch.empty(8, 12, device="meta")
        state = mars.init_state(grad)
        with NoCopies():
            mars(grad, state, rule)
            mars.remember(grad, state)


def test_the_global_clip_does_not_wait() -> None:
    with FakeTensorMode():
        params = [torch.empty(4, 6, device="meta", requires_grad=True) for _ in range(2)]
        for p in params:
            p.grad = torch.empty(4, 6, device="meta")
        clip_grad_norm(params, 1.0)


@pytest.mark.parametrize("wait", [lambda x: x.item(), lambda x: x[x > 0], lambda x: x.cpu()])
def test_the_test_sees_waiting(wait: Any) -> None:
    with FakeTensorMode():
        x = torch.empty((), device="meta")
        with pytest.raises(Exception), NoCopies():  # noqa: B017 - each has its own type
            wait(x)
