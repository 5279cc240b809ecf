"""Intervals over seeds, by scipy.stats. Every interval is a 95 % confidence interval.

Seeds are few (two to five), so means and differences have Student's t intervals, which know how
few they are. Runs of the same seed share initial values and data order; where two settings have
seeds in common the difference is taken seed by seed, which removes what that seed does to both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 2000

METHOD = (
    "Mean of n seeds: Student's t interval (scipy.stats.ttest_1samp). Difference to the baseline: "
    "with two or more seeds in common, the t interval of the differences seed by seed "
    "(scipy.stats.ttest_rel); else Welch's, of independent samples of unequal variance "
    "(scipy.stats.ttest_ind). p: of the same test, two-sided, adjusted by Holm's method for the "
    "number of settings compared. Speed-up: tokens (or seconds) that the baseline's run takes to "
    "its own final loss, divided by those that the setting's run takes to the same loss, linear "
    "between evaluations, at the first crossing; with two or more seeds in common, the t interval "
    "of the logarithm of the ratios seed by seed; with no seed in common, the percentile bootstrap "
    "over seeds (scipy.stats.bootstrap, 2,000 resamples), which is too narrow for fewer than about "
    "five seeds. One seed has no interval. All intervals: 95 %."
)


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; `low` and `high` are None where there is none. `n`: seeds."""

    value: float
    low: float | None
    high: float | None
    n: int
    method: str  # t | paired t | Welch t | bootstrap | single
    p: float | None = None


def mean(values: Sequence[float]) -> Estimate:
    """The mean and its t interval."""
    center = float(np.mean(values))
    if len(values) < 2:
        return Estimate(center, None, None, len(values), "single")
    if np.ptp(values) == 0:
        return Estimate(center, center, center, len(values), "t")
    interval = stats.ttest_1samp(values, 0.0).confidence_interval(LEVEL)
    return Estimate(center, float(interval.low), float(interval.high), len(values), "t")


def difference(base: Mapping[int, float], other: Mapping[int, float]) -> Estimate | None:
    """other - base, each seed -> value; None if either is empty."""
    if not base or not other:
        return None
    if len(common := sorted(base.keys() & other.keys())) >= 2:
        a, b = [other[seed] for seed in common], [base[seed] for seed in common]
        center, result, n, method = float(np.mean(a) - np.mean(b)), None, len(common), "paired t"
        if np.ptp(np.subtract(a, b)) > 0:  # all equal: a spread of zero has no t distribution
            result = stats.ttest_rel(a, b)
    elif len(base) >= 2 and len(other) >= 2:
        a, b = list(other.values()), list(base.values())
        center, n, method = float(np.mean(a) - np.mean(b)), min(len(a), len(b)), "Welch t"
        result = stats.ttest_ind(a, b, equal_var=False)
    else:
        seeds = (common, common) if common else (base, other)
        a, b = [other[seed] for seed in seeds[1]], [base[seed] for seed in seeds[0]]
        return Estimate(float(np.mean(a) - np.mean(b)), None, None, 1, "single")
    if result is None:
        return Estimate(center, center, center, n, method)
    interval = result.confidence_interval(LEVEL)
    return Estimate(
        center, float(interval.low), float(interval.high), n, method, float(result.pvalue)
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment; None stays None."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        adjusted[index] = highest
    return adjusted


@dataclass(frozen=True, eq=False)
class LossPath:
    """A loss curve: cost (n,), increasing (tokens or seconds), and loss (n,)."""

    cost: np.ndarray
    loss: np.ndarray

    def cost_to(self, target: float) -> float | None:
        """The cost at which the loss first reaches `target`, linear between points; None: never."""
        reached = np.flatnonzero(self.loss <= target)
        if reached.size == 0:
            return None
        i = int(reached[0])
        if i == 0:
            return float(self.cost[0])
        drop = self.loss[i - 1] - self.loss[i]
        part = (self.loss[i - 1] - target) / drop
        return float(self.cost[i - 1] + part * (self.cost[i] - self.cost[i - 1]))


@dataclass(frozen=True)
class SpeedUp:
    """`ratio`: how many times less a setting needs for the baseline's final loss. None if some run
    never reached it: `reached` of `n` did."""

    ratio: Estimate | None
    reached: int
    n: int


def speed_up(base: Mapping[int, LossPath], other: Mapping[int, LossPath]) -> SpeedUp | None:
    """From the curves by seed of two settings' finished runs; None if either has none."""
    if not base or not other:
        return None
    common = sorted(base.keys() & other.keys())
    if not common:
        return _unpaired(list(base.values()), list(other.values()))
    pairs = [_times(base[seed], other[seed]) for seed in common]
    times = [t for t in pairs if t is not None]
    if len(times) < len(pairs):
        return SpeedUp(None, len(times), len(pairs))
    logs = mean([float(np.log(a / b)) for a, b in times])
    method = "paired t" if logs.n > 1 else "single"
    return SpeedUp(_exp(logs, method), len(pairs), len(pairs))


def _times(base: LossPath, other: LossPath) -> tuple[float, float] | None:
    """Costs to the base's final loss, its own and the other's."""
    target = float(base.loss[-1])
    own, its = base.cost_to(target), other.cost_to(target)
    return (own, its) if own and its else None  # neither None nor, for a ratio, zero


def _unpaired(base: list[LossPath], other: list[LossPath]) -> SpeedUp:
    target = float(np.mean([path.loss[-1] for path in base]))
    reached = sum(path.cost_to(target) is not None for path in other)
    times = _times(_average(base), _average(other))
    if times is None or reached < len(other):
        return SpeedUp(None, reached, len(other))
    center = float(times[0] / times[1])
    if len(base) < 2 or len(other) < 2:
        return SpeedUp(Estimate(center, None, None, 1, "single"), reached, len(other))

    def log_ratio(of_base: np.ndarray, of_other: np.ndarray) -> float:
        found = _times(
            _average([base[int(i)] for i in of_base]), _average([other[int(i)] for i in of_other])
        )
        return float(np.log(found[0] / found[1])) if found else np.nan

    draws = stats.bootstrap(
        (np.arange(len(base)), np.arange(len(other))),
        log_ratio,
        n_resamples=RESAMPLES,
        vectorized=False,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    ).bootstrap_distribution
    if not np.isfinite(draws).all():  # some resample never reaches its target
        return SpeedUp(Estimate(center, None, None, len(other), "single"), reached, len(other))
    low, high = np.exp(np.percentile(draws, [50 * (1 - LEVEL), 50 * (1 + LEVEL)]))
    n = min(len(base), len(other))
    return SpeedUp(Estimate(center, float(low), float(high), n, "bootstrap"), reached, len(other))


def _average(paths: Sequence[LossPath]) -> LossPath:
    """The mean curve, on the first one's costs as far as all of them go."""
    end = min(path.cost[-1] for path in paths)
    cost = np.append(paths[0].cost[paths[0].cost < end], end)
    return LossPath(cost, np.mean([np.interp(cost, p.cost, p.loss) for p in paths], axis=0))


def _exp(logs: Estimate, method: str) -> Estimate:
    low, high = (None if bound is None else float(np.exp(bound)) for bound in (logs.low, logs.high))
    return Estimate(float(np.exp(logs.value)), low, high, logs.n, method)
