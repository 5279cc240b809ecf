"""A symmetric product in blocks is the product, and symmetric."""

from __future__ import annotations

import pytest
import torch

from optim.symmetric import BLOCK, syrk

SHAPES = [(1, 1, 5), (2, 7, 3), (3, 16, 40), (2, 33, 33), (1, 100, 10)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [1, 4, 16, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_the_product(shape: tuple[int, int, int], block: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    plus = torch.randn(shape[0], shape[1], shape[1], generator=generator, dtype=torch.float64)
    plus = (plus + plus.mT).to(dtype)
    exact = x.double() @ x.double().mT
    rounding = shape[2] * torch.finfo(dtype).eps
    for found, right in (
        (syrk(x, block=block), exact),
        (syrk(x, plus, beta=-0.5, alpha=2.0, block=block), 2 * exact - 0.5 * plus.double()),
    ):
        assert found.dtype == dtype
        assert (found - right).abs().max() <= rounding * exact.abs().max()
        if shape[1] > 2 * block:
            assert torch.equal(found, found.mT)


def test_where_it_gains_it_is_in_blocks() -> None:
    ((device, dtype), size) = next(iter(BLOCK.items()))
    x = torch.randn(1, 2 * size + 1, 9, dtype=dtype, device=device)
    assert torch.equal(syrk(x), syrk(x, block=size))
    assert torch.equal(syrk(x), syrk(x).mT)
    assert torch.equal(syrk(x.bfloat16()), x.bfloat16() @ x.bfloat16().mT)
