"""The comparison of loss curves tells rounding from a change."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.harmless import PLAIN, ROUNDED, Curve, distances, rows_of


def test_distance_is_a_running_mean() -> None:
    a, b = np.zeros(12), np.zeros(12)
    b[11] = -1.0
    assert distances(a, b) == pytest.approx([0, 0, 0.1])


def test_rows_hold_settings_against_rounding_and_seeds() -> None:
    steps, start = np.arange(100), np.full(100, 3.0)
    plain = [Curve(start - seed, 2.0 + 0.1 * seed) for seed in range(3)]

    def drifting(rate: float) -> list[Curve]:
        return [Curve(c.losses + rate * steps, c.val_loss + rate) for c in plain]

    curves = {PLAIN: plain, ROUNDED: drifting(1e-6), "same": plain, "worse": drifting(4e-6)}
    rounded, same, worse = rows_of(curves)
    assert rounded["times"] == "1.00" and same["largest"] == "0.0e+00"
    assert worse["setting"] == "worse" and worse["times"] == "4.00"
    assert worse["first"] == "1.8e-05"  # 4e-6 times the mean of 0 to 9
    assert {row["spread"] for row in (rounded, same, worse)} == {"0.1000"}
