"""Inverse roots of symmetric positive semi-definite matrices, in stacks (n, d, d).

An eigendecomposition that fails is never silent: a warning says so (Python shows it once for each
size of matrix), and callers count.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def inverse_root(a: Tensor, exponent: float, eps: float, old: Tensor) -> tuple[Tensor, int]:
    """(a + eps I)^(-exponent) of each matrix, by eigendecomposition, and how many failed.

    Rounding makes eigenvalues that should be 0 slightly negative. They are raised to 0, and no
    eigenvalue is taken to be smaller than the largest one times the resolution of a's dtype: below
    that it is noise, which a tiny eps (1e-12 is common) would blow up.

    A decomposition that does not converge is repeated in float64. Where that fails as well, for
    instance on NaN, the root in ``old`` is kept. Waits for the device, as torch.linalg.eigh does.
    """
    try:
        return _inverse_root(a, exponent, eps), 0
    except torch.linalg.LinAlgError:
        if len(a) > 1:  # find out which
            singles = zip(a.split(1), old.split(1), strict=True)
            roots = [inverse_root(single, exponent, eps, kept) for single, kept in singles]
            return torch.cat([root for root, _ in roots]), sum(failed for _, failed in roots)
    try:
        root = _inverse_root(a.double(), exponent, eps).to(a.dtype)
    except torch.linalg.LinAlgError:
        _warn(a, "in float64 too: its last inverse root is kept (is the gradient finite?)")
        return old, 1
    _warn(a, f"in {str(a.dtype).removeprefix('torch.')}, and was repeated in float64")
    return root, 1


def _inverse_root(a: Tensor, exponent: float, eps: float) -> Tensor:
    values, vectors = torch.linalg.eigh(a)
    values = values.clamp(min=0) + eps
    values = torch.maximum(values, values[..., -1:] * torch.finfo(a.dtype).eps)
    return vectors * values.unsqueeze(-2) ** -exponent @ vectors.mT


def eigenvectors(a: Tensor) -> Tensor:
    """Orthonormal eigenvectors of each matrix as columns, the largest eigenvalue first. Repeated in
    float64 where it does not converge; where that fails as well, the identity."""
    for dtype in (a.dtype, torch.float64):
        try:
            return torch.linalg.eigh(a.to(dtype)).eigenvectors.flip(-1).to(a.dtype)
        except torch.linalg.LinAlgError:
            _warn(a, f"in {str(dtype).removeprefix('torch.')}: float64, then the identity follow")
    return torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)


def turned(basis: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """One step of power iteration from an orthonormal basis (columns) towards the eigenvectors of
    ``a``: the new basis qr(a basis), and the order of the old columns that it begins with, by
    decreasing variance (SOAP, arXiv 2409.11321, Algorithm 4)."""
    variances = (basis * (a @ basis)).sum(-2)  # diagonal of Q^T A Q
    order = variances.argsort(-1, descending=True)
    columns = torch.take_along_dim(basis, order.unsqueeze(-2), -1)
    return torch.linalg.qr(a @ columns).Q, order


def inverse_square_root(a: Tensor, steps: int, beta: float = 0.5) -> Tensor:
    """a^(-1/2) by the coupled Newton-Schulz iteration, matrix products alone::

        Y = a, Z = I        Y <- beta Y (3 I - Z Y),  Z <- beta (3 I - Z Y) Z

    With beta = 1/2, Y converges to a^(1/2) and Z to a^(-1/2) for eigenvalues in (0, 3); divide by
    the norm first. Directions of eigenvalue 0 grow as 1.5^steps.
    """
    y, z = a, torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    for _ in range(steps):
        factor = -(z @ y) * beta
        factor.diagonal(dim1=-2, dim2=-1).add_(3 * beta)
        y, z = y @ factor, factor @ z
    return z


def _warn(a: Tensor, how: str) -> None:
    rows, cols = a.shape[-2:]
    warnings.warn(
        f"eigendecomposition of a {rows} x {cols} preconditioner factor failed {how}", stacklevel=3
    )
