"""The best learning rate of a sweep, by a local quadratic in log lr, and how sure that is.

Near its minimum the final loss is close to a parabola in log lr:

    loss(lr, seed) = best + curvature * (ln lr - ln optimum)^2 + offset(seed)

It is fitted (scipy.optimize.curve_fit) to the trials of the lowest learning rate and its neighbours
on the grid: one to either side, and a second one where its mean loss is at most `NEAR` above the
lowest, because further out the curve is no parabola. The offset is what a seed does to all learning
rates alike (they share initial values and data order); taking it out leaves the noise that decides
between learning rates. Intervals are Student's t with the degrees of freedom that are left.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats

from report.statistics import LEVEL

NEAR = 0.1  # nats
RISE = 0.01  # nats: the rise of the loss that defines how sensitive it is to the learning rate


@dataclass(frozen=True)
class Trial:
    """A finished trial's final loss, in nats per token."""

    lr: float
    seed: int
    loss: float


@dataclass(frozen=True)
class Optimum:
    """`lr` is the fitted optimum, or the best of the grid where no parabola fits (`fitted` False).
    Bounds are None where the trials leave no freedom to estimate them."""

    lr: float
    low: float | None
    high: float | None
    loss: float  # mean over the seeds, at `lr`
    loss_low: float | None
    loss_high: float | None
    curvature: float | None  # nats per unit of (ln lr)^2
    fitted: bool
    window: tuple[float, ...]  # learning rates that were fitted
    best_tried: float
    warnings: tuple[str, ...]

    @property
    def factor(self) -> float | None:
        """By what lr may be multiplied or divided before the fitted loss rises by `RISE`."""
        return float(np.exp(np.sqrt(RISE / self.curvature))) if self.curvature else None

    def predict(self, lr: np.ndarray) -> np.ndarray:
        """The parabola, (n,)."""
        assert self.curvature is not None
        return self.loss + self.curvature * np.log(lr / self.lr) ** 2


def means(trials: Sequence[Trial]) -> dict[float, float]:
    """Learning rate -> mean loss over seeds, in order of the learning rate."""
    return {
        lr: float(np.mean([trial.loss for trial in trials if trial.lr == lr]))
        for lr in sorted({trial.lr for trial in trials})
    }


def find_optimum(trials: Sequence[Trial], failed: Mapping[float, str]) -> Optimum:
    """From at least one finished trial; `failed`: learning rate -> status, of those learning rates
    of which some trial diverged or failed. ValueError without trials."""
    if not trials:
        raise ValueError("no finished trial")
    table = means(trials)
    best = min(table, key=lambda lr: table[lr])
    window = _window(table, best)
    said = _edge(table, best, failed)
    fit = _fit([trial for trial in trials if trial.lr in window]) if len(window) >= 3 else None
    if fit is None or not np.log(window[0]) <= fit.center <= np.log(window[-1]):
        if len(window) >= 3:
            said.append("no parabola with a minimum inside the grid fits: the best tried is given")
        none = (None, None, None)
        return Optimum(
            best, None, None, table[best], *none, False, window, best, tuple(said)
        )  # fmt: skip
    low, high = fit.interval(fit.center, fit.error)
    if low is None or high is None:
        said.append("no interval: add seeds or learning rates around the optimum")
    elif high - low > np.log(window[-1] / window[0]):
        said.append("the interval is wider than the grid around it: add seeds")
    return Optimum(
        float(np.exp(fit.center)), _exp(low), _exp(high),
        fit.lowest, *fit.interval(fit.lowest, fit.lowest_error), fit.curvature,
        True, window, best, tuple(said),
    )  # fmt: skip


def _window(table: Mapping[float, float], best: float) -> tuple[float, ...]:
    lrs = list(table)
    at, limit = lrs.index(best), table[best] + NEAR
    chosen = lrs[max(at - 1, 0) : at + 2]
    if at >= 2 and table[lrs[at - 2]] <= limit:
        chosen.insert(0, lrs[at - 2])
    if at + 2 < len(lrs) and table[lrs[at + 2]] <= limit:
        chosen.append(lrs[at + 2])
    return tuple(chosen)


def _edge(table: Mapping[float, float], best: float, failed: Mapping[float, str]) -> list[str]:
    """Warnings that the minimum is not enclosed by trials."""
    lrs, said = list(table), list[str]()
    above = sorted(lr for lr in failed if lr > best)
    if len(lrs) == 1:
        said.append(f"one learning rate finished: add optim.lr={best / 2:.2g},{best * 2:.2g}")
    elif best == lrs[0]:
        step = lrs[1] / lrs[0]
        said.append(f"the optimum is at the grid's lower edge: add optim.lr={best / step:.2g}")
    elif best == lrs[-1] and above:
        between = np.sqrt(best * above[0])
        said.append(f"lr {above[0]:g}, the next, {failed[above[0]]}: add optim.lr={between:.2g}")
    elif best == lrs[-1]:
        step = lrs[-1] / lrs[-2]
        said.append(f"the optimum is at the grid's upper edge: add optim.lr={best * step:.2g}")
    if best in failed:
        said.append(f"a trial at lr {best:g} {failed[best]}; its mean is of the others")
    return said


@dataclass(frozen=True)
class _Parabola:
    """lowest + curvature * (ln lr - center)^2, the standard errors of its minimum, and the degrees
    of freedom behind them."""

    center: float
    lowest: float
    curvature: float
    error: float
    lowest_error: float
    freedom: int

    def interval(self, value: float, error: float) -> tuple[float | None, float | None]:
        if self.freedom == 0 or not np.isfinite(error):
            return None, None
        half = float(stats.t.ppf(0.5 + LEVEL / 2, self.freedom)) * error
        return value - half, value + half


def _fit(trials: Sequence[Trial]) -> _Parabola | None:
    """None where there is no minimum, too few trials, or no convergence."""
    x = np.log([trial.lr for trial in trials])
    y = np.array([trial.loss for trial in trials])
    last = max(trial.seed for trial in trials)
    others = sorted({trial.seed for trial in trials} - {last})
    # (n, seeds - 1): offsets that sum to zero over the seeds
    offsets = np.array([[(t.seed == s) - (t.seed == last) * 1.0 for s in others] for t in trials])
    freedom = len(trials) - 3 - len(others)
    guess = np.polyfit(x, y, 2)
    if freedom < 0 or guess[0] <= 0:
        return None

    def loss(_: Any, center: float, lowest: float, curvature: float, *by_seed: float) -> Any:
        return lowest + curvature * (x - center) ** 2 + offsets @ np.array(by_seed)

    def slopes(_: Any, center: float, lowest: float, curvature: float, *by_seed: float) -> Any:
        away = x - center
        return np.column_stack([-2 * curvature * away, np.ones_like(x), away**2, offsets])

    start = [-guess[1] / (2 * guess[0]), float(y.min()), guess[0], *[0.0] * len(others)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optimize.OptimizeWarning)  # no freedom: no covariance
            found, covariance = optimize.curve_fit(loss, x, y, p0=start, jac=slopes)
    except RuntimeError:
        return None
    center, lowest, curvature = map(float, found[:3])
    error, lowest_error = np.sqrt(np.diag(covariance)[:2]).tolist()
    return (
        _Parabola(center, lowest, curvature, error, lowest_error, freedom)
        if curvature > 0
        else None
    )


def _exp(value: float | None) -> float | None:
    return None if value is None else float(np.exp(value))


def tolerated(trials: Sequence[Trial]) -> tuple[float | None, float | None]:
    """The learning rates between which the mean loss stays within `RISE` of the best tried one,
    linear in ln lr between those tried. None: not left on that side within the grid."""
    table = means(trials)
    lrs, losses = np.log(list(table)), np.array(list(table.values()))
    limit, at = losses.min() + RISE, int(losses.argmin())

    def crossing(side: Sequence[int]) -> float | None:
        for inner, outer in itertools.pairwise(side):
            if losses[outer] > limit:
                part = (limit - losses[inner]) / (losses[outer] - losses[inner])
                return float(np.exp(lrs[inner] + part * (lrs[outer] - lrs[inner])))
        return None

    return crossing(range(at, -1, -1)), crossing(range(at, len(lrs)))
