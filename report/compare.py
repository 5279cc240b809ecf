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
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from report import pages
from report.comparison import Comparison, compare
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
from report.runs import FINISHED, VAL, read_runs
from report.settings import Group
from report.statistics import Estimate
from report.tables import write_csv

SHOWN = 30  # settings in the picture of final losses


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
