"""The fitted optimum lies where the parabola was put, and its interval covers it."""

from __future__ import annotations

import numpy as np
import pytest

from report.optimum import Trial, find_optimum, tolerated

GRID = (3e-4, 6e-4, 1.2e-3, 2.4e-3, 4.8e-3)


def trials(
    optimum: float, noise: float, seeds: int = 3, seed_noise: float = 0.2, draw: int = 0
) -> list[Trial]:
    rng = np.random.default_rng(draw)
    offsets = seed_noise * rng.standard_normal(seeds)
    return [
        Trial(lr, s, 3.0 + 0.06 * np.log(lr / optimum) ** 2 + offsets[s] + noise * rng.normal())
        for lr in GRID
        for s in range(seeds)
    ]


def test_without_noise_it_is_exact() -> None:
    found = find_optimum(trials(1.0e-3, 0.0, seed_noise=0.0), {})
    assert found.fitted and not found.warnings
    assert found.lr == pytest.approx(1.0e-3, rel=1e-6)
    assert found.loss == pytest.approx(3.0, abs=1e-9)
    assert found.factor == pytest.approx(np.exp(np.sqrt(0.01 / 0.06)), rel=1e-6)
    moved = found.predict(
        np.array([found.lr * (found.factor or 0), found.lr / (found.factor or 1)])
    )
    np.testing.assert_allclose(moved, 3.01, atol=1e-9)


def test_what_a_seed_does_to_all_learning_rates_does_not_blur_the_optimum() -> None:
    """Offsets a hundred times the noise: the interval stays narrow, and covers."""
    found = find_optimum(trials(1.0e-3, 0.002), {})
    assert found.low is not None and found.high is not None
    assert found.low < 1.0e-3 < found.high < 1.15 * found.low


def test_its_interval_covers_as_often_as_it_says() -> None:
    draws = [find_optimum(trials(1.0e-3, 0.005, draw=draw), {}) for draw in range(300)]
    covered = [f.low < 1.0e-3 < f.high for f in draws if f.low and f.high]
    assert len(covered) == 300
    assert np.mean(covered) == pytest.approx(0.95, abs=0.045)  # 3.6 standard errors


def test_one_seed_on_three_learning_rates_has_an_optimum_and_no_interval() -> None:
    few = [t for t in trials(1.0e-3, 0.0, seeds=1) if 5e-4 < t.lr < 3e-3]
    found = find_optimum(few, {})
    assert found.lr == pytest.approx(1.0e-3, rel=1e-6) and found.low is None
    assert any("add seeds" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("optimum", "failed", "said"),
    [
        (1e-4, {}, "lower edge: add optim.lr=0.00015"),
        (2e-2, {}, "upper edge: add optim.lr=0.0096"),
        (2e-2, {9.6e-3: "diverged"}, "lr 0.0096, the next, diverged: add optim.lr=0.0068"),
        (1e-3, {1.2e-3: "failed"}, "a trial at lr 0.0012 failed"),
    ],
)
def test_an_optimum_that_is_not_enclosed_is_said(
    optimum: float, failed: dict[float, str], said: str
) -> None:
    found = find_optimum(trials(optimum, 0.0), failed)
    assert any(said in warning for warning in found.warnings), found.warnings
    assert found.fitted == (optimum == 1e-3)
    assert found.lr == pytest.approx(found.best_tried, rel=0.5)


def test_points_far_up_the_wall_do_not_bend_the_fit() -> None:
    """Beyond 0.1 nats the loss of real sweeps is no parabola: those points are left out."""
    steep = [t if t.lr < 4e-3 else Trial(t.lr, t.seed, 9.0) for t in trials(1.0e-3, 0.0)]
    assert find_optimum(steep, {}).lr == pytest.approx(1.0e-3, rel=1e-6)


def test_fewer_than_three_learning_rates_and_none() -> None:
    one = find_optimum([Trial(1e-3, 1, 3.0)], {})
    assert not one.fitted and "optim.lr=0.0005,0.002" in one.warnings[0]
    two = find_optimum([Trial(1e-3, 1, 3.0), Trial(2e-3, 1, 3.1)], {})
    assert not two.fitted and two.lr == 1e-3 and "lower edge" in two.warnings[0]
    with pytest.raises(ValueError, match="no finished trial"):
        find_optimum([], {})


def test_the_measured_range_is_linear_between_trials() -> None:
    line = [Trial(1e-3, 1, 3.0), Trial(2e-3, 1, 3.02), Trial(4e-3, 1, 3.5)]
    low, high = tolerated(line)
    assert low is None and high == pytest.approx(1e-3 * 2**0.5)
