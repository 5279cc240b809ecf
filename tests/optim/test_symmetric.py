"""A symmetric product is the product, and symmetric, whichever way it is computed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from optim.symmetric import BLOCK, blocks, syrk, use

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(1, 1, 5), (2, 7, 3), (3, 16, 40), (2, 33, 33), (1, 100, 10)]


@pytest.mark.parametrize("block", [1, 4, 16, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_the_product(block: int, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        plus = torch.randn(shape[0], shape[1], shape[1], generator=generator, dtype=torch.float64)
        plus = (plus + plus.mT).to(dtype)
        exact = x.double() @ x.double().mT
        rounding = shape[2] * torch.finfo(dtype).eps
        for found, right in (
            (blocks(x, None, 1.0, 1.0, block), exact),
            (blocks(x, plus, -0.5, 2.0, block), 2 * exact - 0.5 * plus.double()),
        ):
            assert found.dtype == dtype
            assert (found - right).abs().max() <= rounding * exact.abs().max()
            if shape[1] > 2 * block:
                assert torch.equal(found, found.mT)


def test_where_it_gains_it_is_in_blocks() -> None:
    ((device, dtype), size) = next(iter(BLOCK.items()))
    x = torch.randn(1, 2 * size + 1, 9, dtype=dtype, device=device)
    assert torch.equal(syrk(x), blocks(x, None, 1.0, 1.0, size))
    assert torch.equal(syrk(x), syrk(x).mT)
    assert torch.equal(syrk(x.bfloat16()), x.bfloat16() @ x.bfloat16().mT)


def test_the_way_that_is_chosen_is_taken_and_given_back() -> None:
    x = torch.randn(1, 700, 9)
    with use("whole"):
        assert torch.equal(syrk(x), x @ x.mT)
        with use(lambda x, plus, beta, alpha: alpha * x):
            assert torch.equal(syrk(x, alpha=3.0), 3 * x)
        assert torch.equal(syrk(x), x @ x.mT)
    assert torch.equal(syrk(x), blocks(x, None, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"'half'.*whole, blocks, kernel"), use("half"):
        pass


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which GPUs' torch brings")
@pytest.mark.parametrize("how", ["interpreted", "compiled"])
def test_the_kernel_without_a_gpu(how: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "TRITON_INTERPRET": str(int(how == "interpreted")),
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, str(Path(__file__).with_name("kernel_cases.py")), how]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
