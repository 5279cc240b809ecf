"""The benchmark of techniques times what it says."""

from __future__ import annotations

import time

import pytest

from scripts import bench_techniques
from scripts.bench_techniques import products, quartiles, worked


def test_rows_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_techniques, "SHAPES", ((8, 16),))
    header, *rows = products(3)
    assert [row[:2] for row in rows] == [
        [f"{name}, 8 x 16", dtype]
        for dtype in ("float32", "bfloat16")
        for name in ("x x^T", "Newton-Schulz")
    ]
    assert all(float(row[3].split()[0]) > 0 for row in rows) and len(header) == len(rows[0])


def test_time_that_others_have_is_not_counted() -> None:
    start = worked()
    time.sleep(0.2)
    assert worked() - start < 0.1
    assert quartiles([1.0, 2.0, 3.0]) == "2.00 (1.00 to 3.00)"
