"""Inverse roots are inverse roots."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optim.matrix_roots import eigenvectors, inverse_root, inverse_square_root


def positive(*shape: int) -> Tensor:
    x = torch.randn(*shape[:-1], 2 * shape[-1], generator=torch.Generator().manual_seed(0))
    a = x @ x.mT
    return a / a.norm(dim=(-2, -1), keepdim=True)


def test_newton_schulz_root() -> None:
    a = positive(3, 8, 8)
    root = inverse_square_root(a, steps=25)
    assert torch.allclose(root @ a @ root, torch.eye(8).expand(3, 8, 8), atol=1e-4)
    assert torch.allclose(root[1], inverse_square_root(a[1], steps=25), atol=1e-5)


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
def test_root_by_eigendecomposition(exponent: float) -> None:
    a = positive(3, 8, 8).double()
    root, failed = inverse_root(a, exponent, 1e-12, torch.eye(8).expand(3, 8, 8))
    power = torch.linalg.matrix_power(root, round(1 / exponent))
    assert failed == 0
    assert torch.allclose(root, root.mT)
    assert torch.allclose(power @ a, torch.eye(8).double().expand(3, 8, 8), atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_root_of_a_singular_matrix_stays_moderate(scale: float) -> None:
    x = torch.randn(8, 1, generator=torch.Generator().manual_seed(0))
    a = (x @ x.mT * scale).unsqueeze(0)
    root, _ = inverse_root(a, 0.25, 1e-38, torch.eye(8).unsqueeze(0))
    largest = torch.linalg.eigvalsh(a.double())[0, -1].float()
    assert root.isfinite().all()
    assert root.norm() < 3 * (largest * torch.finfo(torch.float32).eps) ** -0.25


def test_a_failed_root_keeps_the_old_one_and_is_counted() -> None:
    a = positive(3, 8, 8)
    a[1, 0, 0] = torch.nan
    old = torch.full((3, 8, 8), 7.0)
    with pytest.warns(UserWarning, match="8 x 8 preconditioner factor failed in float64 too"):
        root, failed = inverse_root(a, 0.25, 1e-12, old)
    assert failed == 1
    assert torch.equal(root[1], old[1])
    assert torch.equal(root[0], inverse_root(a[:1], 0.25, 1e-12, old[:1])[0][0])


def test_a_decomposition_that_fails_in_float32_is_repeated_in_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, eigh = positive(1, 8, 8), torch.linalg.eigh

    def fails_in_float32(x: Tensor) -> object:
        if x.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(x)

    expected, _ = inverse_root(a, 0.25, 1e-12, a)
    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    with pytest.warns(UserWarning, match="failed in float32, and was repeated in float64"):
        root, failed = inverse_root(a, 0.25, 1e-12, a)
    assert failed == 1
    assert torch.allclose(root, expected, rtol=1e-3, atol=1e-4)
    with pytest.warns(UserWarning, match="failed in float32"):
        basis = eigenvectors(a)
    assert torch.allclose(basis.mT @ basis, torch.eye(8), atol=1e-5)
