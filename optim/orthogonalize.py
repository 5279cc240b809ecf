"""Orthogonalization by matrix products alone: every singular value of a matrix pushed towards 1.

For M = U S V^T the nearest semi-orthogonal matrix is U V^T. An odd polynomial p(x) = a x + b x^3 +
c x^5 applied to a matrix acts on its singular values and leaves U and V alone, so iterating one
that drives (0, 1] towards 1 gives U V^T up to the polynomial's accuracy, without a decomposition::

    X = M / ||M||_F            A = X X^T            X <- a X + (b A + c A^2) X

Coefficients:
  jordan         (Keller Jordan's Muon, 2024) one polynomial for all iterations, with the steepest
                 slope at 0 at the price of accuracy: singular values end in about [0.7, 1.2].
  polar_express  (arXiv 2505.16932, Algorithm 1) the best polynomial for each iteration in turn,
                 made for singular values from 1e-3 up; the last one repeats and converges to 1.

Matrices taller than wide are transposed, which keeps A small. The products run in ``dtype``:
bfloat16 is the authors' choice, and moves the result by 3-5 % whatever the order of the products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from optim.norms import matrix_norm
from optim.symmetric import syrk

Polynomial = tuple[float, float, float]


def _with_margin(polynomials: list[Polynomial], margin: float) -> list[Polynomial]:
    """p(x / margin), all but the last: room for rounding to overshoot 1 (as the paper's code)."""
    shrunk = [(a / margin, b / margin**3, c / margin**5) for a, b, c in polynomials[:-1]]
    return [*shrunk, polynomials[-1]]


COEFFICIENTS: dict[str, list[Polynomial]] = {
    "jordan": [(3.4445, -4.7750, 2.0315)],
    "polar_express": _with_margin(
        [
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
            (1.875, -1.25, 0.375),
        ],
        margin=1.01,
    ),
}


def _gram_first(x: Tensor, gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """a X + (b A + c A^2) X: A^2 is the smaller product where X is wide (Keller Jordan's order)."""
    polynomial = syrk(gram, gram, beta=b, alpha=c)  # A is symmetric: A A^T is A^2
    return torch.baddbmm(x, polynomial, x, beta=a)


def _product_first(x: Tensor, gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """a X + b (A X) + c A (A X): MARS's order (AGI-Arena/MARS mars.py); in bfloat16 it differs."""
    product = torch.bmm(gram, x)
    return torch.baddbmm(x * a + product * b, gram, product, alpha=c)


ORDERS: dict[str, Callable[[Tensor, Tensor, float, float, float], Tensor]] = {
    "gram": _gram_first,
    "product": _product_first,
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def newton_schulz(
    x: Tensor,
    *,
    coefficients: str = "jordan",
    steps: int = 5,
    dtype: str = "bfloat16",
    order: str = "gram",
    eps: float = 1e-7,
) -> Tensor:
    """U V^T, approximately, of each matrix U S V^T in a stack (..., rows, cols); dtype of ``x``.

    A positive factor on a matrix changes nothing, up to ``eps``, which is added to its norm so that
    a matrix of zeros stays one.
    """
    stack = x.reshape(-1, *x.shape[-2:])
    if tall := x.shape[-2] > x.shape[-1]:
        stack = stack.mT
    stack = (stack / (matrix_norm(stack) + eps)).to(DTYPES[dtype])
    polynomials = COEFFICIENTS[coefficients]
    for i in range(steps):
        a, b, c = polynomials[min(i, len(polynomials) - 1)]
        stack = ORDERS[order](stack, syrk(stack), a, b, c)
    return (stack.mT if tall else stack).to(x.dtype).reshape(x.shape)
