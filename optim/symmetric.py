"""Products that are symmetric, x x^T, for little more than half of the multiplications.

    x = [a]        x x^T = [a a^T  c^T ]        c = b a^T
        [b]                [c      b b^T]

c is computed once and mirrored, the blocks on the diagonal are done in the same way until they are
small, and their lower triangles are mirrored. For a symmetric A this is A^2, too. What it saves in
multiplications it costs in copies: it serves where it was measured to gain (docs/benchmarks.md).
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

# rows of the blocks that are multiplied out, by kind of device and dtype; what is not here is
# multiplied out whole: bfloat16 on a CPU is slower in blocks, GPUs are not measured
BLOCK = {("cpu", torch.float32): 192}
PARTS = 8  # a matrix is cut into, at most: more gain little, and the compiler takes time for each


def syrk(
    x: Tensor,
    plus: Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
    block: int | None = None,
) -> Tensor:
    """alpha x x^T + beta plus, as BLAS's syrk, of each matrix of a stack (n, rows, cols), with a
    symmetric ``plus`` (n, rows, rows; None: 0). Blocks of up to ``block`` rows are multiplied out
    (None: by BLOCK and PARTS), and matrices of two of them or less, where it gains nothing. Of
    larger ones the result is exactly symmetric."""
    rows = x.shape[-2]
    if block is None:
        block = max(BLOCK.get((x.device.type, x.dtype), rows), ceil(rows / PARTS))
    if rows <= 2 * block:
        return _product(x, x, plus, beta, alpha)
    return _blocks(x, plus, beta, alpha, block)


def _blocks(x: Tensor, plus: Tensor | None, beta: float, alpha: float, block: int) -> Tensor:
    rows = x.shape[-2]
    if rows <= block:
        lower = _product(x, x, plus, beta, alpha).tril()
        return lower + lower.tril(-1).mT
    half = rows - rows // 2
    first, second = slice(0, half), slice(half, rows)

    def part(r: slice, c: slice) -> Tensor | None:
        return None if plus is None else plus[..., r, c]

    a, b = x[..., first, :], x[..., second, :]
    corner = _product(b, a, part(second, first), beta, alpha)
    top = (_blocks(a, part(first, first), beta, alpha, block), corner.mT)
    bottom = (corner, _blocks(b, part(second, second), beta, alpha, block))
    return torch.cat([torch.cat(top, -1), torch.cat(bottom, -1)], -2)


def _product(x: Tensor, y: Tensor, plus: Tensor | None, beta: float, alpha: float) -> Tensor:
    if plus is None:
        product = x @ y.mT
        return product if alpha == 1.0 else product * alpha
    return torch.baddbmm(plus, x, y.mT, beta=beta, alpha=alpha)
