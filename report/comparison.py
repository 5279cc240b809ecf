"""What a comparison of runs finds: settings in order, and each measured against a baseline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from report.figures import AXES, METRICS, band
from report.reference import Curve, matching
from report.runs import TRAIN, VAL, Run
from report.settings import Group, group
from report.statistics import Estimate, LossPath, SpeedUp, difference, holm, mean, speed_up


@dataclass(frozen=True, eq=False)
class Row:
    """What is known of one setting; None where there is nothing finished to know it from."""

    group: Group
    final: Estimate | None
    difference: Estimate | None  # to the baseline; None for itself
    p: float | None  # of the difference, adjusted for the number of settings
    tokens: SpeedUp | None
    seconds: SpeedUp | None
    step_ms: float | None
    memory_gb: float | None
    state_bytes: int | None


@dataclass(frozen=True, eq=False)
class Comparison:
    """All that the page and the tables show; `rows` best first."""

    metric: str
    baseline: Group
    rows: list[Row]
    skipped: list[str]
    references: list[tuple[Curve, str]]  # and the label of the setting that each belongs to

    @property
    def groups(self) -> list[Group]:
        return [row.group for row in self.rows]


def compare(
    runs: Sequence[Run],
    baseline: str | None = None,
    metric: str = VAL,
    skipped: Sequence[str] = (),
    references: bool = True,
) -> Comparison:
    """Group, order and measure. ValueError for no runs, an unknown metric or baseline."""
    if metric not in METRICS:
        raise ValueError(f"metric={metric}: expected one of {', '.join(METRICS)}")
    if not runs:
        raise ValueError("no run that can be read" + "".join(f"; {line}" for line in skipped))
    if metric == VAL and not any(run.curve(VAL).size for run in runs):
        metric = TRAIN
    groups = group(runs)
    finals = {each.label: each.finals(metric) for each in groups}
    groups.sort(key=lambda g: np.mean([*finals[g.label].values()] or [np.inf]))
    base = _baseline(groups, runs[0], baseline)
    others = [each.label for each in groups if each is not base]
    differences = {label: difference(finals[base.label], finals[label]) for label in others}
    p_values = holm([found.p if found else None for found in differences.values()])
    adjusted = dict(zip(others, p_values, strict=True))
    rows = [
        Row(
            group=each,
            final=mean([*values.values()]) if (values := finals[each.label]) else None,
            difference=differences.get(each.label),
            p=adjusted.get(each.label),
            tokens=_speed_up(base, each, metric, "tokens"),
            seconds=_speed_up(base, each, metric, "seconds"),
            step_ms=_median([run.step_seconds for run in each.runs], 1e3),
            memory_gb=_median([run.memory_gb for run in each.runs]),
            state_bytes=each.runs[0].state_bytes,
        )
        for each in groups
    ]
    found = [(c, g.label) for g in groups for c in matching(g.settings)] if references else []
    once = list({curve.curve: (curve, label) for curve, label in reversed(found)}.values())[::-1]
    return Comparison(metric, base, rows, list(skipped), once)


def _baseline(groups: Sequence[Group], first: Run, asked: str | None) -> Group:
    """`groups` are ordered, best first, so the first of an optimizer is its best; where none is
    asked for, the best of those with the most seeds."""
    if asked is None:
        adamw = [each for each in groups if each.optimizer == "adamw"]
        return (
            max(adamw, key=lambda each: len(each.finished()))
            if adamw
            else next(each for each in groups if first in each.runs)
        )
    folder = Path(asked).resolve()
    tests = (
        lambda each: each.label == asked,
        lambda each: each.optimizer == asked,
        lambda each: any(run.dir.resolve() == folder for run in each.runs),
    )
    for test in tests:
        for each in groups:
            if test(each):
                return each
    raise ValueError(f"baseline={asked}: expected one of {', '.join(g.label for g in groups)}")


def _speed_up(base: Group, other: Group, metric: str, axis: str) -> SpeedUp | None:
    if other is base:
        return None
    return speed_up(_paths(base, metric, axis), _paths(other, metric, axis))


def _paths(each: Group, metric: str, axis: str) -> dict[int, LossPath]:
    """Seed -> loss curve of a finished run, smoothed if it is the training loss."""
    which = next(a for a in AXES if a.name == axis)
    curves = {run.seed: band([run], metric, which) for run in each.finished()}
    return {
        seed: LossPath(curve.x, curve.mean) for seed, curve in curves.items() if curve is not None
    }


def _median(values: Iterable[float | None], scale: float = 1.0) -> float | None:
    known = [value * scale for value in values if value is not None]
    return float(np.median(known)) if known else None
