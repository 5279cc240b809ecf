"""Compiled updates are the eager ones, their scalars cost nothing, and nothing compiles twice."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optim import Optimizer, create_optimizer
from optim.compilation import compiled
from optim.correction import NoCorrection
from optim.mask import no_mask
from optim.rules import rules
from optim.update import update_parameters

slow = pytest.mark.slow
# Equal bit for bit: arithmetic that is the helpers' of optim/rule.py, the norms of whole tensors
# (MARS, LAMB), which are a call of torch's kernel compiled too, and counts (the cautious mask).
# Other sums (of rows, of columns, products) are taken in another order when compiled.
SAME_BITS = ["nadamw", "lion", "adopt", "ademamix", "mars_adamw", "lamb", "cautious_adamw"]
TO_ROUNDING = ["came", "adafactor", "sinkgd", "muon"]


def make(name: str, layers: int = 2, **options: Any) -> tuple[Optimizer, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (40, 24)}
    for i in range(layers):
        shapes |= {f"h.{i}.attn.c_attn.weight": (72, 24), f"h.{i}.attn.c_attn.bias": (72,)}
        shapes |= {f"h.{i}.ln_1.weight": (24,)}
    named = {k: nn.Parameter(torch.randn(s, generator=generator)) for k, s in shapes.items()}
    exact = {"ns_dtype": "float32"} if name == "muon" else {}
    optimizer = create_optimizer(name, named.items(), lr=1e-2, **exact, **options)
    return optimizer, list(named.values())


def step(optimizer: Optimizer, params: list[nn.Parameter], number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.set_lr(1e-2 / (1 + number))
    optimizer.step()


def after(name: str, compile: bool, steps: int = 6) -> list[Tensor]:
    optimizer, params = make(name, compile=compile)
    for number in range(steps):
        step(optimizer, params, number)
    return [p.detach() for p in params]


@slow
@pytest.mark.parametrize("name", SAME_BITS)
def test_compiled_has_the_bits_of_eager(name: str) -> None:
    for eager, own in zip(after(name, False), after(name, True), strict=True):
        assert torch.equal(eager, own)


@slow
@pytest.mark.parametrize("name", TO_ROUNDING)
def test_others_agree_to_rounding(name: str) -> None:
    for eager, own in zip(after(name, False), after(name, True), strict=True):
        torch.testing.assert_close(own, eager, rtol=1e-6, atol=1e-6)


@slow
def test_another_lr_step_or_depth_compiles_nothing_more() -> None:
    for layers in (4, 12):
        optimizer, params = make("lion", layers, compile=True)
        step(optimizer, params, 0)
        assert len(optimizer._compiled) == 2  # shapes of matrices; gains and biases are joined
        for number in range(1, 4):
            step(optimizer, params, number)
        assert len(optimizer._compiled) == 2


@slow
def test_scalars_are_not_part_of_a_loop() -> None:
    from torch._inductor import config as inductor
    from torch._inductor.utils import run_and_get_code

    rule = rules()["nadamw"]()
    params, grads = ([torch.ones(8, 16) for _ in range(2)] for _ in range(2))
    states = [{"step": torch.ones((), dtype=torch.float64), **rule.init_state(p)} for p in params]
    lr = torch.tensor(0.1, dtype=torch.float64)
    how = (rule, NoCorrection(), no_mask, rule.direction, 0.1)
    update = partial(update_parameters, *how)
    with inductor.patch(fx_graph_cache=False):  # or there would be no code to look at
        _, (code,) = run_and_get_code(lambda: compiled(update, params, grads, states, lr))
    assert "std::pow" not in code
    # beta1^t, beta1^(t+1), beta2^t: each once, not once for each parameter
    assert code.count("= torch.ops.aten.pow.Scalar(") == 3


@pytest.mark.parametrize("name", [n for n, r in rules().items() if r.granularity == "element"])
def test_joined_vectors_have_the_bits_of_single_ones(name: str) -> None:
    """Eagerly too, gains and biases of entrywise rules are updated as one long vector."""
    start = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (24, 7, 33)]
    together, alone = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    named = [(f"h.{i}.bias", p) for i, p in enumerate(together)]
    one = create_optimizer(name, named, lr=1e-2)
    many = [create_optimizer(name, [(f"h.{i}.bias", p)], lr=1e-2) for i, p in enumerate(alone)]
    for number in range(4):
        step(one, together, number)
        generator = torch.Generator().manual_seed(number)
        for optimizer, p in zip(many, alone, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            optimizer.set_lr(1e-2 / (1 + number))
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    for optimizer, p, q in zip(many, alone, together, strict=True):
        own = optimizer.state[p]
        assert all(torch.equal(one.state[q][key], tensor) for key, tensor in own.items())


@slow
def test_gradients_of_another_layout_or_missing() -> None:
    """A graph holds for the strides that it was made for: others get their own."""
    ends = []
    for compile in (False, True):
        optimizer, params = make("nadamw", compile=compile)
        for number in range(3):
            generator = torch.Generator().manual_seed(number)
            for i, p in enumerate(params):
                grad = torch.randn(p.shape, generator=generator)
                p.grad = grad.mT.contiguous().mT if p.ndim == 2 and number == 1 else grad
                p.grad = None if (i, number) == (1, 2) else p.grad
            optimizer.step()
        ends.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@slow
def test_compiled_continues_bit_identically() -> None:
    whole, params = make("mars_adamw", compile=True)
    for number in range(4):
        step(whole, params, number)
    first, early = make("mars_adamw", compile=True)
    for number in range(2):
        step(first, early, number)
    second, late = make("mars_adamw", compile=True)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        for p, q in zip(late, early, strict=True):
            p.copy_(q)
    for number in range(2, 4):
        step(second, late, number)
    assert all(torch.equal(a, b) for a, b in zip(params, late, strict=True))
