"""Intervals cover, pairing helps, speed-ups are what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from report.statistics import LossPath, difference, holm, mean, speed_up


def test_mean_is_students() -> None:
    estimate = mean([2.0, 2.1, 2.3])
    half = stats.t.ppf(0.975, 2) * np.std([2.0, 2.1, 2.3], ddof=1) / math.sqrt(3)
    assert estimate.low == pytest.approx(estimate.value - half)
    assert estimate.high == pytest.approx(estimate.value + half)
    assert mean([2.0]).low is None


def test_the_interval_of_the_mean_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    found = [mean(rng.normal(3.0, 0.1, 3).tolist()) for _ in range(1000)]
    covered = np.mean([e.low < 3.0 < e.high for e in found if e.low and e.high])
    assert covered == pytest.approx(0.95, abs=0.025)  # 3.6 standard errors


def test_pairing_by_seed_removes_what_the_seed_does() -> None:
    """A difference of 0.01 under offsets of 0.5 is seen by the paired test and no other."""
    base = {1: 3.0, 2: 3.5, 3: 2.5, 4: 3.2}
    other = {seed: loss - 0.01 - 0.001 * seed for seed, loss in base.items()}
    paired = difference(base, other)
    shifted = difference(base, {seed + 10: loss for seed, loss in other.items()})
    assert paired is not None and paired.method == "paired t" and paired.n == 4
    assert paired.high is not None and paired.high < 0 and paired.p is not None and paired.p < 0.01
    assert shifted is not None and shifted.method == "Welch t"
    assert shifted.low is not None and shifted.high is not None and shifted.low < 0 < shifted.high
    assert paired.value == pytest.approx(shifted.value)


def test_differences_without_intervals() -> None:
    one = difference({1: 3.0, 2: 3.4}, {2: 3.3})
    assert one is not None and one.value == pytest.approx(-0.1) and one.low is None  # common seed
    other = difference({1: 3.0, 2: 3.4}, {9: 3.1})
    assert other is not None and other.value == pytest.approx(-0.1) and other.method == "single"
    same = difference({1: 3.0, 2: 3.4}, {1: 3.0, 2: 3.4})
    assert same is not None and same.value == same.low == same.high == 0 and same.p is None
    assert difference({}, {1: 3.0}) is None


def test_holm() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == [pytest.approx(0.03), None, 0.06, 0.06]
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def power_law(speed: float, end: float = 100.0) -> LossPath:
    """Falls as 3 + 1 / (speed * cost): a curve twice as fast needs half the cost for any loss."""
    cost = np.linspace(1.0, end, 4000)
    return LossPath(cost, 3 + 1 / (speed * cost))


def test_cost_to_a_target_is_linear_between_points() -> None:
    path = LossPath(np.array([0.0, 10.0, 20.0]), np.array([4.0, 2.0, 1.0]))
    assert path.cost_to(3.0) == pytest.approx(5.0)
    assert path.cost_to(1.5) == pytest.approx(15.0)
    assert path.cost_to(4.5) == 0.0
    assert path.cost_to(0.5) is None


def test_a_run_twice_as_fast_has_a_speed_up_of_two() -> None:
    base = {seed: power_law(1.0) for seed in (1, 2, 3)}
    other = {seed: power_law(2.0 + 0.1 * seed) for seed in (1, 2, 3)}
    found = speed_up(base, other)
    assert found is not None and found.ratio is not None and found.ratio.method == "paired t"
    ratio = found.ratio
    assert ratio.value == pytest.approx((2.1 * 2.2 * 2.3) ** (1 / 3), rel=1e-3)
    assert ratio.low is not None and ratio.high is not None and ratio.low < 2.1 < ratio.high
    unpaired = speed_up(base, {seed + 9: path for seed, path in other.items()})
    assert unpaired is not None and unpaired.ratio is not None
    assert unpaired.ratio.method == "bootstrap"
    assert unpaired.ratio.value == pytest.approx(2.2, rel=0.01)
    assert unpaired.ratio.low == pytest.approx(2.1, rel=0.02)


def test_a_target_that_is_not_reached_has_no_ratio() -> None:
    base = {1: power_law(1.0), 2: power_law(1.0)}
    found = speed_up(base, {1: power_law(2.0), 2: power_law(0.5)})
    assert found is not None and found.ratio is None and (found.reached, found.n) == (1, 2)
    assert speed_up(base, {}) is None
