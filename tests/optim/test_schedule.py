"""The schedule equals the formulas of the code it stands for."""

from __future__ import annotations

import itertools
import math

import pytest

from optim.schedule import SHAPES, Schedule


def nanogpt(it: int, lr: float, min_lr: float, warmup: int, decay: int) -> float:
    if it < warmup:
        return lr * (it + 1) / (warmup + 1)
    if it > decay:
        return min_lr
    ratio = (it - warmup) / (decay - warmup)
    return min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (lr - min_lr)


@pytest.mark.parametrize("step", [0, 1, 9, 10, 11, 55, 99, 100, 101, 500])
def test_cosine_is_nanogpts(step: int) -> None:
    schedule = Schedule(100, 10, "nanogpt", 1.0, "cosine", 6e-5 / 6e-4)
    assert 6e-4 * schedule(step) == pytest.approx(nanogpt(step, 6e-4, 6e-5, 10, 100), rel=1e-12)


def test_mars_warmup_starts_at_zero() -> None:
    schedule = Schedule(100, 10, "mars", 1.0, "cosine", 0.1)
    assert [schedule(s) for s in (0, 1, 5, 10)] == [0, 0.1, 0.5, 1]


def test_wsd_is_flat_then_falls_in_its_last_part() -> None:
    schedule = Schedule(100, 10, "nanogpt", 0.2, "linear", 0.0)
    assert {schedule(s) for s in range(10, 81)} == {1.0}
    assert schedule(90) == pytest.approx(0.5)
    assert schedule(100) == 0.0


def test_constant_never_falls() -> None:
    schedule = Schedule(100, 0, "nanogpt", 0.0, "linear", 1.0)
    assert {schedule(s) for s in range(200)} == {1.0}


@pytest.mark.parametrize("shape", SHAPES)
def test_decay_shapes_fall_from_one_to_final(shape: str) -> None:
    schedule = Schedule(50, 5, "nanogpt", 1.0, shape, 0.1)
    values = [schedule(s) for s in range(5, 51)]
    assert values[0] == 1.0
    assert values[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(values))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"warmup_steps": 200}, "train.steps"),
        ({"decay_shape": "cosin"}, "expected one of cosine"),
        ({"warmup": "slow"}, "expected one of nanogpt"),
        ({"final": 1.5}, "given 1.5"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_refuses(change: dict[str, object], said: str) -> None:
    good = {
        "steps": 100,
        "warmup_steps": 10,
        "warmup": "mars",
        "decay_fraction": 1.0,
        "decay_shape": "cosine",
        "final": 0.1,
    }
    with pytest.raises(ValueError, match=said):
        Schedule(**{**good, **change})  # type: ignore[arg-type]
