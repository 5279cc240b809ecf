"""Second moments in O(rows + cols) memory (Adafactor, arXiv 1804.04235, section 3).

Of the running mean of squared entries of a matrix only the means over its rows and columns are
kept: R (over columns) and C (over rows). Their rank-one product R C^T / mean(R) is the closest
approximation of the full table in the generalized Kullback-Leibler divergence. Tensors of one
dimension keep the full table; of more than two, the last two are factored.
"""

from __future__ import annotations

from torch import Tensor

from optim.norms import mean
from optim.rule import State, ema_, zeros


def init(param: Tensor, key: str) -> State:
    """Fresh moments under ``key``, or under ``key``_row and ``key``_col where they factor."""
    if param.ndim < 2:
        return {key: zeros(param)}
    row, col = param.shape[:-1], (*param.shape[:-2], param.shape[-1])
    return {f"{key}_row": zeros(param.new_empty(row)), f"{key}_col": zeros(param.new_empty(col))}


def update_(state: State, key: str, squares: Tensor, beta: float | Tensor) -> None:
    """Average ``squares`` into the moments under ``key``."""
    if squares.ndim < 2:
        ema_(state[key], squares, beta)
    else:
        ema_(state[f"{key}_row"], mean(squares, -1), beta)
        ema_(state[f"{key}_col"], mean(squares, -2), beta)


def inverse_root(state: State, key: str, floor: float | None = None) -> Tensor:
    """1 / sqrt(V), of the parameter's shape. ``floor`` bounds mean(R) and sqrt(V) from below, as
    torch.optim.Adafactor does."""
    if key in state:
        v = state[key]
        return v.rsqrt() if floor is None else v.clamp(min=floor**2).rsqrt()
    row, col = state[f"{key}_row"], state[f"{key}_col"]
    average = mean(row, -1).unsqueeze(-1)
    if floor is None:
        return (row / average).rsqrt().unsqueeze(-1) * col.rsqrt().unsqueeze(-2)
    v = row.unsqueeze(-1) * (col / average.clamp(min=floor)).unsqueeze(-2)
    return v.clamp(min=floor**2).rsqrt()
