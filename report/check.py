"""Is a run where the paper's run was? At each point that both have, and by how much not.

    python -m report.check RUN [reference=mars/readme-table] [tolerance=0.02]

Without `reference`, every published curve of the run's model, data and optimizer is held against
it, each set of runs for itself; with it, those (a number, set or name of `python -m
report.reference list`), or the curve in a CSV file. Where a paper has several sets that disagree, a
run can be inside one of them only.

A point is inside if it lies within the tolerance of that point: the error of reading the figure (or
of rounding the table) plus the scatter of one evaluation of such a run against another.
`tolerance=` (nats) replaces both. A point is common to both if the run was evaluated within 1 % of
its tokens, or before and after it at most 10 % apart, and then linear between the two.

The last line is a JSON object. Exit code 0: inside (all named curves, or one of several found);
2: outside; 1: there was nothing to compare.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from report.curves import short
from report.options import run_command
from report.reference import Curve, data_name, find, matching, model_name, read_curve
from report.runs import TRAIN, VAL, Malformed, Run, read_run

SAME, BETWEEN = 0.01, 0.10  # relative distances in tokens; see above
SHOWN = 12  # points of a verdict that are printed: all if they are so few, else the worst


@dataclass(frozen=True)
class Point:
    """One point that run and reference have. `at`: tokens, or the step where `axis` says so; losses
    in nats per token."""

    at: float
    reference: float
    run: float
    allowed: float

    @property
    def deviation(self) -> float:
        return self.run - self.reference

    @property
    def inside(self) -> bool:
        return abs(self.deviation) <= self.allowed


@dataclass(frozen=True)
class Verdict:
    """A run against one curve; no points if they have none in common."""

    curve: Curve
    axis: str  # tokens | steps
    points: tuple[Point, ...]
    why_not: str  # if there are none

    @property
    def inside(self) -> bool:
        return bool(self.points) and all(point.inside for point in self.points)

    @property
    def worst(self) -> Point:
        """The point that is furthest out, in units of what is allowed."""
        return max(self.points, key=lambda p: abs(p.deviation) / max(p.allowed, 1e-12))


def check(run: Run, curve: Curve, tolerance: float | None = None) -> Verdict:
    """Hold the run against one curve. ValueError if the curve is no loss."""
    if not curve.is_loss:
        raise ValueError(f"{curve.name} is {curve.metric}, not a loss: nothing of a run to compare")
    axis = "tokens" if np.isfinite(curve.tokens).any() else "steps"
    series = TRAIN if curve.metric == "train_loss" else VAL
    at = run.curve(series)
    x, loss = getattr(run, axis)[at], run.series[series][at]
    if curve.metric == "val_loss_best":
        loss = np.minimum.accumulate(loss)
    where = getattr(curve, axis)
    allowed = curve.tolerance if tolerance is None else np.full(where.shape, tolerance)
    points = tuple(
        Point(float(position), float(reference), value, float(margin))
        for position, reference, margin in zip(where, curve.losses, allowed, strict=True)
        if (value := _value_at(float(position), x, loss)) is not None
    )
    return Verdict(curve, axis, points, "" if points else _why_not(where, x, series, axis))


def _value_at(position: float, x: np.ndarray, loss: np.ndarray) -> float | None:
    """The run's loss there, or None if it has none there."""
    if x.size == 0 or not math.isfinite(position):
        return None
    nearest = int(np.abs(x - position).argmin())
    if abs(x[nearest] - position) <= SAME * position:
        return float(loss[nearest])
    after = int(np.searchsorted(x, position))
    if 0 < after < x.size and x[after] - x[after - 1] <= BETWEEN * position:
        return float(np.interp(position, x, loss))
    return None


def _why_not(where: np.ndarray, x: np.ndarray, series: str, axis: str) -> str:
    if x.size == 0:
        return f"the run has no {series}"
    has = where[np.isfinite(where)]
    return (
        f"no {axis} in common: the run's {series} reaches from {short(x[0])} to {short(x[-1])}, "
        f"the reference from {short(has.min())} to {short(has.max())}"
    )


def choose(run: Run, reference: str | None) -> list[Curve]:
    """The curves to hold the run against. ValueError if there are none."""
    if reference is None:
        found = matching(run.settings)
        if not found:
            raise ValueError(
                f"no published curve of model {model_name(run.settings)}, data "
                f"{data_name(run.settings)}, optimizer {run.optimizer}: name one with reference="
            )
        return found
    if Path(reference).is_file():
        return [read_curve(Path(reference))]
    found = [curve for curve in find([reference]) if curve.is_loss]
    same = {curve.curve for curve in matching(run.settings)}
    return [curve for curve in found if curve.curve in same] or found


def report(verdict: Verdict) -> str:
    """The verdict as text."""
    curve = verdict.curve
    head = f"{curve.name} {curve.curve}: {curve.variant or curve.metric} [{curve.confidence}]"
    if not verdict.points:
        return f"{head}\n  NOT COMPARED: {verdict.why_not}"
    deviations = np.array([point.deviation for point in verdict.points])
    count = sum(point.inside for point in verdict.points)
    noise = "evaluation noise unknown" if curve.noise is None else f"noise {curve.noise:g}"
    shown = verdict.points
    if len(shown) > SHOWN:
        ranked = sorted(shown, key=lambda p: -abs(p.deviation) / max(p.allowed, 1e-12))
        shown = tuple(sorted(ranked[:SHOWN], key=lambda p: p.at))
    lines = [
        head,
        f"  {'INSIDE' if verdict.inside else 'OUTSIDE'}: {count} of {len(verdict.points)} points "
        f"inside; mean deviation {deviations.mean():+.4g}, "
        f"largest {deviations[np.abs(deviations).argmax()]:+.4g} nats ({noise})",
        f"  {verdict.axis:>10} {'reference':>10} {'run':>10} {'deviation':>11} {'allowed':>9}",
        *(
            f"  {short(p.at):>10} {p.reference:>10.5f} {p.run:>10.5f} {p.deviation:>+11.5f} "
            f"{p.allowed:>9.3g}{'' if p.inside else f'  out by {abs(p.deviation) - p.allowed:.2g}'}"
            for p in shown
        ),
    ]
    if len(shown) < len(verdict.points):
        lines.append(f"  (the {SHOWN} points that are furthest out)")
    return "\n".join(lines)


def as_json(run: Run, verdicts: Sequence[Verdict], inside: bool) -> str:
    return json.dumps(
        {
            "run_dir": str(run.dir),
            "inside": inside,
            "references": [
                {
                    "curve": v.curve.curve,
                    "name": v.curve.name,
                    "inside": v.inside,
                    "points": len(v.points),
                    "outside": sum(not p.inside for p in v.points),
                    "worst_deviation": v.worst.deviation if v.points else None,
                    "allowed": v.worst.allowed if v.points else None,
                    "at": v.worst.at if v.points else None,
                    "axis": v.axis,
                }
                for v in verdicts
            ],
        }
    )


@dataclass(frozen=True)
class Options:
    reference: str | None = None
    tolerance: float | None = None


def main(paths: list[str], options: Options) -> int:
    if len(paths) != 1:
        raise ValueError(f"expected one run, got {len(paths)}: python -m report.check RUN")
    try:
        run = read_run(Path(paths[0]))
    except Malformed as error:
        raise ValueError(f"{paths[0]}: {error}") from None
    chosen = choose(run, options.reference)
    verdicts = [check(run, curve, options.tolerance) for curve in chosen]
    print(f"{run.dir}: {run.optimizer}, {run.steps[-1]:,.0f} steps, {run.status}")
    for verdict in verdicts:
        print(report(verdict))
    compared = [verdict for verdict in verdicts if verdict.points]
    if not compared:
        raise ValueError("no point in common with any reference")
    decide = any if options.reference is None else all
    inside = decide(verdict.inside for verdict in compared)
    print(as_json(run, verdicts, inside))
    return 0 if inside else 2


if __name__ == "__main__":
    sys.exit(run_command(Options, main, __doc__, sys.argv[1:]))
