"""Cutting a large matrix into blocks that a preconditioner of their size fits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from torch import Tensor


def blocks(shape: Sequence[int], size: int) -> list[tuple[slice, ...]]:
    """(rows, columns) of each block of a matrix, none larger than ``size``; the last are smaller
    where it does not divide."""
    cuts = [[slice(i, min(i + size, n)) for i in range(0, n, size)] for n in shape]
    return list(product(*cuts))


def as_matrices(stack: Tensor) -> Tensor:
    """A stack of vectors (n, d) as one of matrices with a single column; of matrices, itself."""
    return stack.unsqueeze(-1) if stack.ndim == 2 else stack
