"""Newton-Schulz makes matrices orthogonal, whatever their scale, one by one or stacked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optim.orthogonalize import COEFFICIENTS, ORDERS, newton_schulz

SHAPES = [(32, 32), (16, 48), (48, 16)]


def matrix(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def polar_factor(x: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    return u @ v


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("order", ORDERS)
def test_jordan_brings_singular_values_near_one(
    shape: tuple[int, int], dtype: str, order: str
) -> None:
    singular = torch.linalg.svdvals(newton_schulz(matrix(*shape), dtype=dtype, order=order))
    assert singular.max() < 1.3
    assert singular[:-1].min() > 0.5  # the last one of a square matrix may start at almost 0


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_express_converges_to_the_polar_factor(shape: tuple[int, int]) -> None:
    x = matrix(*shape).double()
    u = newton_schulz(x.float(), coefficients="polar_express", steps=12, dtype="float32")
    assert (u - polar_factor(x)).abs().max() < 1e-4


def test_polar_express_beats_jordan_in_the_same_number_of_steps() -> None:
    x = matrix(64, 64)
    error = {
        name: (newton_schulz(x, coefficients=name, steps=6, dtype="float32") - polar_factor(x))
        for name in COEFFICIENTS
    }
    assert error["polar_express"].norm() < 0.5 * error["jordan"].norm()


@pytest.mark.parametrize("factor", [1e-4, 2.0**10])
def test_scale_does_not_matter(factor: float) -> None:
    x = matrix(24, 40)
    scaled = newton_schulz(x * factor, dtype="float32")
    assert (scaled - newton_schulz(x, dtype="float32")).abs().max() < 1e-4


def test_transposing_commutes() -> None:
    x = matrix(24, 40)
    assert torch.equal(newton_schulz(x.mT), newton_schulz(x).mT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stacked_is_one_by_one(dtype: str) -> None:
    x = matrix(2, 3, 24, 40)
    stacked = newton_schulz(x, dtype=dtype)
    singly = torch.stack([newton_schulz(m, dtype=dtype) for m in x.flatten(0, 1)])
    assert stacked.shape == x.shape
    assert (stacked.flatten(0, 1) - singly).abs().max() < 1e-6


def test_orders_are_the_same_polynomial() -> None:
    x = matrix(24, 40)
    gram, product = (newton_schulz(x, order=order, dtype="float32") for order in ORDERS)
    assert (gram - product).abs().max() < 1e-5


def test_zero_stays_zero_and_the_dtype_is_kept() -> None:
    assert torch.equal(newton_schulz(torch.zeros(3, 5)), torch.zeros(3, 5))
    assert newton_schulz(matrix(3, 5).bfloat16()).dtype == torch.bfloat16
