"""Products that are symmetric, x x^T, for little more than half of the multiplications.

    x = [a]        x x^T = [a a^T  c^T ]        c = b a^T
        [b]                [c      b b^T]

In blocks, c is computed once and mirrored, the blocks on the diagonal are done in the same way
until they are small, and their lower triangles are mirrored. For a symmetric A this is A^2, too.
What it saves in multiplications it costs in copies: it serves where it was measured to gain
(docs/benchmarks.md). On a GPU a kernel of our own, optim/symmetric_kernel.py, makes no copies.

Which of WAYS it is holds for the whole process, as torch's own flags for products do: `use`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil

import torch
from torch import Tensor

# x (n, rows, cols), plus (n, rows, rows) or None for 0, beta, alpha
Way = Callable[[Tensor, Tensor | None, float, float], Tensor]

# rows of the blocks that are multiplied out, by kind of device and dtype, where blocks were
# measured to gain: bfloat16 on a CPU is slower in blocks, GPUs are not measured
BLOCK = {("cpu", torch.float32): 192}
ELSEWHERE = 256
PARTS = 8  # a matrix is cut into, at most: more gain little, and the compiler takes time for each


def syrk(x: Tensor, plus: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """alpha x x^T + beta plus, as BLAS's syrk, of each matrix of a stack (n, rows, cols), with a
    symmetric ``plus`` (n, rows, rows; None: 0), in the way that `use` has chosen. Exactly symmetric
    unless it is multiplied out whole."""
    return _way(x, plus, beta, alpha)


@contextmanager
def use(way: str | Way) -> Iterator[None]:
    """Within, `syrk` works this way, one of WAYS by its name or another function. What is compiled
    keeps the way that it was compiled with. ValueError for a name that is not there."""
    global _way
    if isinstance(way, str) and way not in WAYS:
        raise ValueError(f"no way {way!r} of symmetric products: expected one of {', '.join(WAYS)}")
    before, _way = _way, WAYS[way] if isinstance(way, str) else way
    try:
        yield
    finally:
        _way = before


def where_it_gains(x: Tensor, plus: Tensor | None, beta: float, alpha: float) -> Tensor:
    """In blocks where BLOCK says so, else whole."""
    known = (x.device.type, x.dtype) in BLOCK
    return (blocks if known else whole)(x, plus, beta, alpha)


def whole(x: Tensor, plus: Tensor | None, beta: float, alpha: float) -> Tensor:
    """As any product."""
    return _product(x, x, plus, beta, alpha)


def blocks(
    x: Tensor, plus: Tensor | None, beta: float, alpha: float, block: int | None = None
) -> Tensor:
    """Blocks of up to ``block`` rows (None: by BLOCK and PARTS) are multiplied out, and matrices of
    two of them or less, where it gains nothing."""
    rows = x.shape[-2]
    if block is None:
        block = max(BLOCK.get((x.device.type, x.dtype), ELSEWHERE), ceil(rows / PARTS))
    if rows <= 2 * block:
        return whole(x, plus, beta, alpha)
    return _blocks(x, plus, beta, alpha, block)


def kernel(x: Tensor, plus: Tensor | None, beta: float, alpha: float) -> Tensor:
    """Our Triton kernel; whole in a dtype that it does not have."""
    from optim import symmetric_kernel  # needs triton, which few machines without a GPU have

    if x.dtype not in symmetric_kernel.TILES:
        return whole(x, plus, beta, alpha)
    product: Tensor = symmetric_kernel.syrk(x, plus, beta, alpha)
    return product


WAYS: dict[str, Way] = {
    "auto": where_it_gains,
    "whole": whole,
    "blocks": blocks,
    "kernel": kernel,
}
_way: Way = where_it_gains


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
