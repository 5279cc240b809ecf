"""Norms are right where torch's are not, and clipping keeps directions."""

from __future__ import annotations

import pytest
import torch

from optim.norms import clip_grad_norm, norm, rms


@pytest.mark.parametrize("shape", [(), (7,), (384, 384), (8192, 768), (3, 4, 5)])
def test_norm_equals_float64(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert norm(x).item() == pytest.approx(x.double().norm().item(), rel=5e-7)


def test_norm_of_bf16_is_computed_in_float32() -> None:
    x = torch.randn(300, 300).bfloat16()
    assert norm(x).dtype == torch.float32
    assert norm(x).item() == pytest.approx(x.double().norm().item(), rel=1e-6)


def test_rms_of_ones_is_one() -> None:
    assert rms(torch.ones(6, 7)).item() == pytest.approx(1.0)


def params(scale: float) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.nn.Parameter(torch.zeros(s)) for s in [(5, 4), (9,), (2, 2)]]
    for p in made:
        p.grad = scale * torch.randn(p.shape, generator=generator)
    return made


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_clip_equals_torchs(scale: float) -> None:
    ours, theirs = params(scale), params(scale)
    total = clip_grad_norm(ours, 1.0)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.testing.assert_close(total, expected)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_no_clip_measures_only() -> None:
    ours, untouched = params(10.0), params(10.0)
    assert clip_grad_norm(ours, None) > 1
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, untouched, strict=True))
