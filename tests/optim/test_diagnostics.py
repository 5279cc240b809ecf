"""Each figure against its definition, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from optim import create_optimizer
from optim.diagnostics import Diagnostics

BETAS = (0.9, 0.99)
SCALE = 0.1 * 0.9 / (1 - 0.9)  # of MARS's correction with gamma = 0.1


def two(
    name: str = "mars_adamw", every: int = 1, **options: Any
) -> tuple[list[nn.Parameter], Diagnostics]:
    """A matrix under MARS and a vector without, and their optimizer's diagnostics."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator)) for s in ((6, 4), (5,))]
    named = [("h.weight", params[0]), ("h.bias", params[1])]
    optimizer = create_optimizer(name, named, **{"lr": 0.1, **options})
    return params, Diagnostics(optimizer, every)


def step(params: list[nn.Parameter], diagnostics: Diagnostics, *grads: Tensor) -> dict[str, float]:
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    diagnostics.optimizer.step()
    return {key: value.item() for key, value in diagnostics.take().items()}


def draw(count: int, scale: float = 1.0, mean: float = 0.0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            mean + scale * torch.randn(6, 4, generator=generator),
            mean + scale * torch.randn(5, generator=generator),
        )
        for _ in range(count)
    ]


def close(figure: float, expected: Tensor | float) -> bool:
    return figure == pytest.approx(float(expected), rel=1e-5)


def test_update_and_gradients_of_each_role_and_group() -> None:
    params, diagnostics = two("adamw", weight_decay=0.1)
    first, second = draw(2)
    step(params, diagnostics, *first)
    before = [p.detach().clone() for p in params]
    figures = step(params, diagnostics, *second)
    for i, labels in enumerate((("matrix", "group.decay"), ("vector", "group.no_decay"))):
        moved = params[i].detach() - before[i]
        for label in labels:
            of = {k.rpartition("/")[2]: v for k, v in figures.items() if f"/{label}/" in k}
            assert of.keys() == {
                *("update_rms", "update_to_weight", "gradient_cosine", "gradient_variance")
            }
            assert close(of["update_rms"], moved.square().mean().sqrt())
            assert close(of["update_to_weight"], moved.norm() / before[i].norm())
            cosine = torch.cosine_similarity(first[i].flatten(), second[i].flatten(), dim=0)
            assert close(of["gradient_cosine"], cosine)


def test_a_set_is_one_long_vector() -> None:
    params, diagnostics = two("lion", groups={"all": {"match": ["."]}})
    first, second = draw(2)
    step(params, diagnostics, *first)
    before = torch.cat([p.detach().flatten() for p in params])
    figures = step(params, diagnostics, *second)
    moved = torch.cat([p.detach().flatten() for p in params]) - before
    assert close(figures["optim/group.all/update_to_weight"], moved.norm() / before.norm())
    g, h = (torch.cat([x.flatten() for x in pair]) for pair in (first, second))
    cosine = torch.cosine_similarity(g, h, dim=0)
    assert close(figures["optim/group.all/gradient_cosine"], cosine)


@pytest.mark.parametrize(("scale", "clipped"), [(0.01, 0.0), (1.0, 1.0)])
def test_mars_correction_and_its_clip(scale: float, clipped: float) -> None:
    params, diagnostics = two(betas=BETAS, mars={"gamma": 0.1})
    first, second = draw(2, scale)
    step(params, diagnostics, *first)
    figures = step(params, diagnostics, *second)
    change = SCALE * (second[0] - first[0]).norm()
    assert close(figures["optim/matrix/correction_norm"], change)
    assert close(figures["optim/matrix/correction_size"], change / second[0].norm())
    assert figures["optim/matrix/correction_clipped"] == clipped
    assert "optim/vector/correction_size" not in figures


def test_variances_of_independent_gradients() -> None:
    """Gradients of mean 3 and variance 4 per entry: then g - g' doubles what it touches, and
    Var c = ((1 + s)^2 + s^2) Var g. Approximate MARS reduces variance only where gradients are
    correlated from step to step."""
    params, diagnostics = two(betas=BETAS, mars={"gamma": 0.1}, every=2, lr=1e-3)
    figures: dict[str, float] = {}
    sums = {"gradient": 0.0, "correction": 0.0}
    for i, grads in enumerate(draw(3000, 2.0, 3.0)):
        figures = step(params, diagnostics, *grads) or figures
        if i > 1000 and i % 2:  # a longer average than the reported one
            for key in sums:
                sums[key] += figures[f"optim/matrix/{key}_variance"] / 1000
    assert sums["gradient"] == pytest.approx(4 * 24, rel=0.05)
    factor = (1 + SCALE) ** 2 + SCALE**2
    assert sums["correction"] == pytest.approx(factor * 4 * 24, rel=0.05)


def test_variance_of_the_first_measured_steps() -> None:
    """Two measured steps: m = g_1, w = 1, and the variance is ||g_2 - g_1||^2 / 2."""
    params, diagnostics = two("adamw")
    first, second = draw(2)
    assert "optim/matrix/gradient_variance" not in step(params, diagnostics, *first)
    figures = step(params, diagnostics, *second)
    variance = (second[0] - first[0]).square().sum() / 2
    assert close(figures["optim/matrix/gradient_variance"], variance)


def test_failed_decompositions_are_reported() -> None:
    """A gradient that is not finite spoils one factor of each side; the weights' role is told."""
    params, diagnostics = two("shampoo", precondition_frequency=1)
    ((matrix, vector),) = draw(1)
    figures = step(params, diagnostics, matrix, vector)
    assert figures["optim/matrix/failed_roots"] == figures["optim/vector/failed_roots"] == 0
    matrix[0, 0] = torch.nan
    with pytest.warns(UserWarning, match="preconditioner factor failed in float64 too"):
        figures = step(params, diagnostics, matrix, vector)
    assert figures["optim/matrix/failed_roots"] == 2
    assert figures["optim/vector/failed_roots"] == 0


def test_only_every_nth_step_and_nothing_held_between() -> None:
    params, diagnostics = two("adamw", every=4)
    measured = []
    for i, grads in enumerate(draw(9), start=1):
        figures = step(params, diagnostics, *grads)
        if figures:
            measured.append(i)
            assert "optim/matrix/gradient_cosine" in figures
        assert diagnostics.take() == {}
        assert (diagnostics._last is not None) == (i % 4 == 3)
        assert diagnostics._before is None
    assert measured == [4, 8]


def test_it_changes_nothing() -> None:
    watched, diagnostics = two("mars_adamw")
    free, other = two("mars_adamw")
    other.remove()
    for grads in draw(5):
        step(watched, diagnostics, *grads)
        assert step(free, other, *grads) == {}
    assert all(torch.equal(p, q) for p, q in zip(watched, free, strict=True))


def test_a_missing_gradient_counts_as_zero() -> None:
    params, diagnostics = two("adamw")
    params[0].grad, params[1].grad = torch.ones(6, 4), None
    diagnostics.optimizer.step()
    figures = diagnostics.take()
    assert figures["optim/vector/update_rms"] < 1e-30
    assert all(value.isfinite() for value in figures.values())


class HostReads(TorchDispatchMode):
    """Types of the tensors whose value went to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.name() == "aten::_local_scalar_dense":
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_it_reads_no_value_on_the_host() -> None:
    """Counters and lr are float64 and live there; figures and what they are made of are float32."""
    params, diagnostics = two("mars_adamw")
    for p, g in zip(params, draw(1)[0], strict=True):
        p.grad = g
    with HostReads() as reads:
        diagnostics.optimizer.step()
        figures = diagnostics.take()
        assert reads.dtypes <= {torch.float64}
        figures["optim/matrix/update_rms"].item()
    assert torch.float32 in reads.dtypes


def test_every_must_be_positive() -> None:
    with pytest.raises(ValueError, match="every 0 steps: expected 1 or more"):
        two(every=0)
