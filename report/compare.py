"""Compare runs: one HTML page that opens anywhere, its pictures as PNG, its numbers as CSV.

    python -m report.compare RUN [RUN ...] out=DIR [baseline=adamw] [metric=val/loss]

RUN is a run's folder, or any folder with runs below it. Runs that differ in nothing but the seed
are one setting, with a mean and an interval. `baseline` is the setting that the others are measured
against: its label, its optimizer (then the best setting of it) or the folder of one of its runs;
without it AdamW (the setting with the most seeds, and of those the best), if it is there,
else the first run named. `metric=train/loss` compares training
losses, as does a comparison without any validation loss. Published curves of the same model, data
and optimizer are drawn behind (`references=false`: not).

Writes report.html, loss_*.png, final.png, settings.csv (one row a setting), runs.csv (one row a
run) and curves.csv. What cannot be read is skipped, with a line that says why.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from report import pages
from report.figures import (
    AXES,
    METRICS,
    Band,
    Look,
    band,
    drawing,
    forest_figure,
    looks,
    loss_figure,
    save,
)  # fmt: skip
from report.options import run_command
from report.reference import Curve, matching
from report.runs import FINISHED, TRAIN, VAL, Run, read_runs
from report.settings import Group, group
from report.statistics import Estimate, LossPath, SpeedUp, difference, holm, mean, speed_up
from report.tables import write_csv

SHOWN = 30  # settings in the picture of final losses


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


# ---- output --------------------------------------------------------------------------------------


def write(comparison: Comparison, out: Path, command: str) -> Path:
    """Write everything into `out`; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    groups = comparison.groups
    style = looks(groups, comparison.baseline)
    shown, curves = [], []
    wanted = [(metric, axis) for metric in METRICS for axis in AXES]
    for metric, axis in tqdm(wanted, "pictures", disable=None, leave=False):
        bands = {
            each.label: found
            for each in groups
            if (found := band(each.finished() or each.runs, metric, axis)) is not None
        }
        if not bands:
            continue
        references = comparison.references if metric == VAL else []
        figure = loss_figure(bands, style, metric, axis, references)
        address = save(figure, out / f"loss_{metric.partition('/')[0]}_{axis.name}.png")
        shown.append((metric, address, f"{METRICS[metric].partition(' (')[0]} against {axis.name}"))
        curves += [(metric, axis.name, label, found) for label, found in bands.items()]
    forest = _forest(comparison, style, out)
    write_csv(out / "settings.csv", _setting_rows(comparison))
    write_csv(out / "runs.csv", _run_rows(groups, comparison.metric))
    write_csv(out / "curves.csv", _curve_rows(curves))
    return pages.write_comparison(comparison, shown, forest, out / "report.html", command)


def _forest(comparison: Comparison, style: dict[str, Look], out: Path) -> list[tuple[str, str]]:
    """Address and caption of the picture of final losses, if any run has one."""
    lines = [
        (row.group.label, row.final, [*values.values()], style[row.group.label].color)
        for row in comparison.rows
        if row.final is not None and (values := row.group.finals(comparison.metric))
    ]
    if not lines:
        return []
    figure = forest_figure(lines[:SHOWN], comparison.baseline.label, comparison.metric)
    more = f"; the best {SHOWN} settings" if len(lines) > SHOWN else ""
    caption = f"final loss: mean, 95 % interval and each seed{more}"
    return [(save(figure, out / "final.png"), caption)]


def _setting_rows(comparison: Comparison) -> Iterable[dict[str, Any]]:
    for row in comparison.rows:
        yield {
            "setting": row.group.label,
            "optimizer": row.group.optimizer,
            "lr": row.group.settings["optim.lr"],
            "runs": len(row.group.runs),
            "finished": len(row.group.finished()),
            "metric": comparison.metric,
            **_columns("final", row.final),
            "baseline": comparison.baseline.label,
            **_columns("difference", row.difference),
            "p_holm": row.p,
            **_columns("token_speedup", getattr(row.tokens, "ratio", None)),
            **_columns("time_speedup", getattr(row.seconds, "ratio", None)),
            "step_ms": row.step_ms,
            "memory_gb": row.memory_gb,
            "state_bytes": row.state_bytes,
        }


def _columns(name: str, estimate: Estimate | None) -> dict[str, Any]:
    parts = ("value", "low", "high", "method")
    names = (name, *(f"{name}_{part}" for part in parts[1:]))
    return {n: getattr(estimate, part, None) for n, part in zip(names, parts, strict=True)}


def _run_rows(groups: Iterable[Group], metric: str) -> Iterable[dict[str, Any]]:
    for each in groups:
        for run in each.runs:
            yield {
                "run": str(run.dir),
                "setting": each.label,
                "optimizer": run.optimizer,
                "lr": run.lr,
                "seed": run.seed,
                "status": run.status,
                "note": run.note,
                "steps": int(run.steps[-1]),
                "tokens": int(run.tokens[-1]),
                "seconds": run.seconds[-1],
                "metric": metric,
                "final": run.final(metric),
                "step_ms": None if run.step_seconds is None else run.step_seconds * 1e3,
                "memory_gb": run.memory_gb,
                "state_bytes": run.state_bytes,
                "flops": None if run.flops is None else run.flops[-1],
                "device": run.summary.get("device"),
            }


def _curve_rows(curves: Iterable[tuple[str, str, str, Band]]) -> Iterable[dict[str, Any]]:
    for metric, axis, label, found in curves:
        for x, center, low, high in zip(found.x, found.mean, found.low, found.high, strict=True):
            yield {
                "setting": label, "metric": metric, "axis": axis, "x": x, "mean": center,
                "min": low, "max": high, "seeds": found.seeds,
            }  # fmt: skip


@dataclass(frozen=True)
class Options:
    out: str = "report"
    baseline: str | None = None
    metric: str = VAL
    references: bool = True


def main(paths: list[str], options: Options) -> None:
    if not paths:
        raise ValueError("no run given: python -m report.compare RUN [RUN ...] out=DIR")
    runs, skipped = read_runs(map(Path, paths))
    for line in skipped:
        print(f"skipped {line}", file=sys.stderr)
    comparison = compare(runs, options.baseline, options.metric, skipped, options.references)
    words = [*paths, *(f"{k}={v}" for k, v in vars(options).items() if v != vars(Options())[k])]
    with drawing():
        page = write(comparison, Path(options.out), f"python -m report.compare {' '.join(words)}")
    print(pages.as_text(comparison))
    count = sum(run.status != FINISHED for run in runs)
    if count:
        print(f"{count} of {len(runs)} runs are not finished and have no final loss")
    print(page)


if __name__ == "__main__":
    sys.exit(run_command(Options, main, __doc__, sys.argv[1:]))
