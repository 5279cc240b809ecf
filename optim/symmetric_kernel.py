"""alpha x x^T + beta plus in one Triton kernel that multiplies out one triangle of the result.

The result is cut into square tiles. A program computes one tile on or below the diagonal,

    tile (i, j) = sum over k of x[i, k] x[j, k]^T,    j <= i

adds its part of ``plus``, rounds it once, and stores it and its mirror image, so that the result is
exactly symmetric: n (n + 1) / 2 of n^2 tiles, which is what BLAS's syrk saves. Factors are read by
their strides, transposed views as they are, and sums are kept in float32.

The tile is a function of shape and dtype, not of a trial: it does not decide in which order the
products of an entry are added, but a run must not depend on what an autotuner found. What it gains
is measured where it is used (runtime/symmetric.py). Needs triton, which torch's builds for GPUs
bring; in Triton's interpreter (TRITON_INTERPRET=1) it also runs on a CPU, for the tests.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton


class Tile(NamedTuple):
    """Rows of a square tile, columns of x at a time, warps per program, stages of the pipeline."""

    size: int
    depth: int
    warps: int
    stages: int


# the large one, and one for so few tiles that multiprocessors (of which a GPU has about a hundred)
# would be idle; their factors fit in 100 kB of shared memory, the least of GPUs with bfloat16
TILES = {
    torch.bfloat16: (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
    torch.float32: (Tile(64, 32, 4, 3), Tile(32, 32, 4, 3)),
}
FEW = 128


def tile_of(dtype: torch.dtype, n: int, rows: int) -> Tile:
    large, small = TILES[dtype]
    return large if n * triangle(ceil(rows / large.size)) >= FEW else small


def triangle(tiles: int) -> int:
    """Tiles on and below the diagonal."""
    return tiles * (tiles + 1) // 2


@triton.jit
def _triangle_kernel(  # type: ignore[no-untyped-def]  # Triton would take types for values
    x,
    plus,
    out,  # contiguous
    rows,
    cols,
    x_n,  # strides
    x_row,
    x_col,
    plus_n,
    plus_row,
    plus_col,
    beta,
    alpha,
    HAS_PLUS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # number t of the triangle, row by row: t = i (i + 1) / 2 + j; the root may be off by one
    t = tl.program_id(0)
    i = ((tl.sqrt(8.0 * t + 1.0) - 1.0) / 2.0).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
    j = t - i * (i + 1) // 2
    # where the tile begins, as 64-bit numbers: a stack may have more than 2^31 entries
    n = tl.program_id(1).to(tl.int64)
    top, side = i.to(tl.int64) * SIZE, j.to(tl.int64) * SIZE
    r = tl.arange(0, SIZE)
    k = tl.arange(0, DEPTH)
    down, across = r < rows - top, r < rows - side  # what of the tile is in the result
    left, right = x + n * x_n + top * x_row, x + n * x_n + side * x_row
    total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for start in range(0, cols, DEPTH):
        within = k < cols - start
        mask_a, mask_b = down[:, None] & within[None, :], within[:, None] & across[None, :]
        a = tl.load(left + r[:, None] * x_row + k[None, :] * x_col, mask=mask_a, other=0.0)
        b = tl.load(right + k[:, None] * x_col + r[None, :] * x_row, mask=mask_b, other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left += DEPTH * x_col
        right += DEPTH * x_col
    total = alpha * total
    inside = down[:, None] & across[None, :]
    if HAS_PLUS:
        corner = plus + n * plus_n + top * plus_row + side * plus_col
        added = tl.load(corner + r[:, None] * plus_row + r[None, :] * plus_col, mask=inside)
        total += beta * added.to(tl.float32)
    if i == j:  # both halves are one number, in whatever order the GPU adds
        total = tl.where(r[:, None] >= r[None, :], total, tl.trans(total))
    result = total.to(out.dtype.element_ty)
    corner = out + n * rows * rows
    tl.store(corner + top * rows + side + r[:, None] * rows + r[None, :], result, mask=inside)
    tl.store(corner + side * rows + top + r[None, :] * rows + r[:, None], result, mask=inside)


@triton_op("gpt2_optim::syrk", mutates_args=())
def syrk(x: Tensor, plus: Tensor | None, beta: float, alpha: float) -> Tensor:
    """As `optim.symmetric.syrk`, of x (n, rows, cols) and plus (n, rows, rows; of which the lower
    triangle counts) in a dtype of TILES, with any strides; (n, rows, rows), contiguous. In float32
    with TF32 where ``torch.backends.cuda.matmul.allow_tf32`` says so, as torch's own products."""
    n, rows, cols = x.shape
    out = torch.empty((n, rows, rows), dtype=x.dtype, device=x.device)
    tile = tile_of(x.dtype, n, rows)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    wrap_triton(_triangle_kernel)[(triangle(ceil(rows / tile.size)), n)](
        x,
        x if plus is None else plus,
        out,
        rows,
        cols,
        *x.stride(),
        *(x if plus is None else plus).stride(),
        beta,
        alpha,
        HAS_PLUS=plus is not None,
        PRECISION="tf32" if tf32 else "ieee",
        WIDEN=x.device.type == "cpu",  # the interpreter multiplies bfloat16 wrongly
        SIZE=tile.size,
        DEPTH=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out
