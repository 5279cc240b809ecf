"""The answer of a learning-rate sweep: the best learning rate of each optimizer, and its interval.

    python -m report.sweep DIR [DIR ...] out=DIR [metric=val/loss]

DIR is the folder of a sweep: every run below it is a trial. Trials that differ in nothing but
optim.lr and the seed are one sweep with one answer: the optimum by a local quadratic fit in log lr,
its interval, a warning where it is not enclosed by trials, how far lr may move before the loss
rises by 0.01, what diverged or failed, and the line to paste.

Writes sweep.html, sweep.png, sweep.csv (one row a sweep) and trials.csv (one row a trial). Trials
that cannot be read are skipped, with a line that says why; so are those of scripts/sweep.py that
failed before they had a run directory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from report.figures import COLORS, INK, METRICS, MUTED, drawing, legend, save
from report.optimum import NEAR, RISE, Optimum, Trial, find_optimum, means, tolerated
from report.options import run_command
from report.page import (
    Cell,
    box,
    code,
    details,
    heading,
    paragraph,
    pictures,
    table,
    write_page,
)  # fmt: skip
from report.runs import DIVERGED, FAILED, FINISHED, TRAIN, UNFINISHED, VAL, Run, read_runs
from report.settings import labels, show, split_by
from report.statistics import Estimate, mean
from report.tables import write_csv
from runtime.describe import aligned

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LR = "optim.lr"
JOURNAL = "trials.jsonl"  # of scripts/sweep.py: a line for each trial that ended
LOST = (DIVERGED, FAILED, UNFINISHED)
PANELS = 24  # sweeps that get a picture
METHOD = (
    "A parabola in log lr, with an offset for each seed, fitted by least squares "
    "(scipy.optimize.curve_fit) to the lowest mean loss of the grid and its neighbours: one on "
    f"each side, and the second where its mean lies at most {NEAR} nats above the lowest. "
    "Intervals: 95 %, Student's t with the degrees of freedom left; they say how well these trials "
    "fix the optimum at this size and length of training, not at another. Sensitivity: the factor "
    "by which lr may be multiplied or divided before the fitted loss rises by "
    f"{RISE}; the measured range is where the mean loss, linear in log lr between trials, stays "
    "within that. The loss at the best tried lr has a t interval over seeds and was chosen as the "
    "lowest, so it looks slightly better than it is."
)


@dataclass(frozen=True, eq=False)
class Sweep:
    """Trials that differ in lr and seed alone. `optimum` is None if none finished."""

    label: str
    runs: tuple[Run, ...]
    trials: tuple[Trial, ...]
    optimum: Optimum | None
    best: Estimate | None  # final loss at the best tried lr, over its seeds
    tolerated: tuple[float | None, float | None]

    def count(self, status: str) -> int:
        return sum(run.status == status for run in self.runs)

    @property
    def seeds(self) -> int:
        return len({run.seed for run in self.runs})

    def bad(self) -> dict[float, str]:
        """Learning rate -> what happened to a trial of it that did not finish for its own fault."""
        return {run.lr: run.status for run in self.runs if run.status in (DIVERGED, FAILED)}


def analyse(runs: Sequence[Run], metric: str = VAL) -> list[Sweep]:
    """The sweeps among the runs, best first. ValueError for no runs or an unknown metric."""
    if metric not in METRICS:
        raise ValueError(f"metric={metric}: expected one of {', '.join(METRICS)}")
    if not runs:
        raise ValueError("no trial that can be read")
    parts = split_by(runs, free=[LR])
    names = labels([part[0] for part in parts], free=[LR])
    sweeps = [_sweep(name, part, metric) for name, part in zip(names, parts, strict=True)]
    return sorted(sweeps, key=lambda s: s.best.value if s.best else np.inf)


def _sweep(label: str, runs: tuple[Run, ...], metric: str) -> Sweep:
    runs = tuple({(run.lr, run.seed): run for run in runs}.values())  # a repeated trial counts once
    trials = tuple(
        Trial(run.lr, run.seed, loss) for run in runs if (loss := run.final(metric)) is not None
    )
    if not trials:
        return Sweep(label, runs, (), None, None, (None, None))
    failed = {run.lr: run.status for run in runs if run.status in (DIVERGED, FAILED)}
    optimum = find_optimum(trials, failed)
    best = mean([trial.loss for trial in trials if trial.lr == optimum.best_tried])
    return Sweep(label, runs, trials, optimum, best, tolerated(trials))


def with_journal(
    runs: Sequence[Run], skipped: Sequence[str], folders: Iterable[Path]
) -> tuple[list[Run], list[str]]:
    """Runs and skipped lines, with what scripts/sweep.py wrote of each trial that ended: why a run
    stopped that does not say so itself, and which trials left no run."""
    found, lines = {run.dir: run for run in runs}, list(skipped)
    for file in sorted(file for folder in folders for file in folder.rglob(JOURNAL)):
        *whole, _ = file.read_text(errors="replace").split("\n")  # a kill may tear the last line
        for number, text in enumerate(whole, start=1):
            try:
                record = json.loads(text)
                trial, status = file.parent / record["trial"], record["status"]
            except (ValueError, KeyError, TypeError):
                lines.append(f"{file}, line {number}: not the record of a trial")
                continue
            said = f"{status}: {record['error']}" if record.get("error") else str(status)
            run = found.get(trial)
            if run is not None and run.status == UNFINISHED and status != FINISHED:
                known = status if status in LOST else UNFINISHED
                found[trial] = replace(run, status=known, note=said)
            elif run is None and not any(line.startswith(f"{trial}:") for line in lines):
                lines.append(f"{trial}: {said}")
    return list(found.values()), lines


def paste(sweep: Sweep, sweeps: Sequence[Sweep]) -> str:
    """The overrides that choose the optimum: optimizer, what sets this sweep apart from others of
    the same optimizer, learning rate."""
    run = sweep.runs[0]
    same = [s.runs[0].settings for s in sweeps if s.runs[0].optimizer == run.optimizer]
    apart = [
        f"{key}={show(value)}"
        for key, value in run.settings.items()
        if key.startswith("optim.")
        and key != LR
        and len({show(settings.get(key)) for settings in same}) > 1
    ]
    assert sweep.optimum is not None
    return " ".join([f"optim={run.optimizer}", *apart, f"{LR}={sweep.optimum.lr:.2g}"])


# ---- output --------------------------------------------------------------------------------------

_HEADERS = (
    "sweep", "best lr", "interval", "loss there", "best tried", "its loss",
    "factor that costs 0.01", "measured range", "trials", "seeds", "not finished",
)  # fmt: skip


def _cells(sweep: Sweep) -> list[str]:
    found, best = sweep.optimum, sweep.best
    lost = [f"{n} {status}" for status in LOST if (n := sweep.count(status))]
    counts = [str(len(sweep.runs)), str(sweep.seeds), ", ".join(lost) or "0"]
    if found is None or best is None:
        return [sweep.label, *["-"] * 7, *counts]
    low, high = ("open" if bound is None else f"{bound:.2g}" for bound in sweep.tolerated)
    return [
        sweep.label,
        f"{found.lr:.3g}" if found.fitted else "-",
        _interval(found.low, found.high, ".3g"),
        f"{found.loss:.4f}" if found.fitted else "-",
        f"{found.best_tried:g}",
        f"{best.value:.4f} {_interval(best.low, best.high, '.4f')}".removesuffix(" -"),
        f"{found.factor:.2f}" if found.factor else "-",
        f"{low} to {high}",
        *counts,
    ]


def _interval(low: float | None, high: float | None, form: str) -> str:
    return "-" if low is None or high is None else f"[{low:{form}}, {high:{form}}]"


def as_text(sweeps: Sequence[Sweep]) -> str:
    """Table, warnings and the lines to paste, for the terminal."""
    lines = [aligned([_HEADERS, *map(_cells, sweeps)]), ""]
    for sweep in sweeps:
        if sweep.optimum is None:
            lines.append(f"# {sweep.label}: no trial finished")
            continue
        lines += [f"# {sweep.label}: {warning}" for warning in sweep.optimum.warnings]
        lines.append(paste(sweep, sweeps))
    return "\n".join(lines)


def write(
    sweeps: Sequence[Sweep], metric: str, skipped: Sequence[str], out: Path, command: str
) -> Path:
    """Write page, picture and tables into `out`; returns the page's path."""
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    drawn = [sweep for sweep in sweeps if sweep.trials][:PANELS]
    limits = _limits(drawn)
    shown = []
    for index, sweep in enumerate(drawn):
        figure = Figure(figsize=(5.6, 4.0), layout="constrained")
        _panel(figure.add_subplot(), sweep, metric, COLORS[index % len(COLORS)], limits)
        legend(figure, figure.axes)
        shown.append((save(figure, out / f"sweep_{index + 1}.png"), _caption(sweep)))
    if drawn:
        _overview(drawn, metric, limits, out / "sweep.png")
    write_csv(out / "sweep.csv", (_row(sweep, sweeps, metric) for sweep in sweeps))
    write_csv(out / "trials.csv", _trial_rows(sweeps, metric))
    known = [sweep for sweep in sweeps if sweep.optimum is not None]
    said = [f"{s.label}: {text}" for s in known if s.optimum for text in s.optimum.warnings]
    lost = [
        f"{run.dir}: {run.status} at lr {run.lr:g}, seed {run.seed}; {run.note}"
        for sweep in sweeps
        for run in sweep.runs
        if run.status != FINISHED
    ]
    parts = [
        paragraph(f"{sum(len(s.runs) for s in sweeps)} trials, {METRICS[metric]}."),
        box("alarm", "Not enclosed, or not certain:", said) if said else "",
        box("note", "Skipped", skipped) if skipped else "",
        heading("Answer"),
        table(_HEADERS, map(_cells, sweeps)),
        code("\n".join(paste(sweep, sweeps) for sweep in known)),
        pictures(shown),
        paragraph(
            f"The first {PANELS} of {len(sweeps)} sweeps; sweep.csv has all.", "small"
        )
        if len(sweeps) > PANELS
        else "",
        details(f"{len(lost)} trials that did not finish", box("note", "", lost)) if lost else "",
        heading("Method"),
        paragraph(METHOD),
        details("All trials", table(("run", "sweep", "lr", "seed", "status", "final loss"), (
            [Cell(str(r["run"]), "text"), r["sweep"], f"{r['lr']:g}", str(r["seed"]), r["status"],
             "-" if r["final"] is None else f"{r['final']:.4f}"]
            for r in _trial_rows(sweeps, metric)
        ))),
        code(command),
    ]  # fmt: skip
    page = out / "sweep.html"
    write_page(page, f"Learning rates of {len(sweeps)} sweeps", parts)
    return page


def _caption(sweep: Sweep) -> str:
    found = sweep.optimum
    assert found is not None
    if not found.fitted:
        return f"{sweep.label}: best tried {found.best_tried:g}"
    interval = "(no interval)" if found.low is None else _interval(found.low, found.high, ".3g")
    return f"{sweep.label}: {found.lr:.3g} {interval}"


def _overview(drawn: Sequence[Sweep], metric: str, limits: tuple[float, float], path: Path) -> None:
    """All panels in one picture."""
    from matplotlib.figure import Figure

    columns = 2 if len(drawn) in (2, 4) else min(len(drawn), 3)
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(5.0 * columns, 3.6 * rows + 0.5), layout="constrained")
    for index, sweep in enumerate(drawn):
        axes = figure.add_subplot(rows, columns, index + 1)
        _panel(axes, sweep, metric, COLORS[index % len(COLORS)], limits)
        axes.set_title(_caption(sweep), fontsize=10)
    legend(figure, figure.axes)
    save(figure, path)


def _limits(drawn: Sequence[Sweep]) -> tuple[float, float]:
    """One range of losses for all panels: what lies around the optima, not the worst trials."""
    if not drawn:
        return 0.0, 1.0
    bottom = min(trial.loss for sweep in drawn for trial in sweep.trials)
    near = [
        table[lr]
        for s in drawn
        if s.optimum
        for table in [means(s.trials)]
        for lr in s.optimum.window
    ]
    top = max(*near, bottom + 5 * RISE)
    margin = 0.08 * (top - bottom)
    return bottom - margin, top + 2 * margin


def _panel(axes: Axes, sweep: Sweep, metric: str, color: str, limits: tuple[float, float]) -> None:

    found, top = sweep.optimum, limits[1]
    assert found is not None
    axes.set_xscale("log")
    table = means(sweep.trials)
    inside = {lr: loss for lr, loss in table.items() if loss <= top}
    axes.plot(
        [t.lr for t in sweep.trials if t.loss <= top],
        [t.loss for t in sweep.trials if t.loss <= top],
        ".", color=color, alpha=0.45, markersize=6, label="trial",
    )  # fmt: skip
    axes.plot([*inside], [*inside.values()], "o", color=color, markersize=6, label="mean of seeds")
    if found.fitted:
        x = np.geomspace(found.window[0], found.window[-1], 100)
        axes.plot(x, found.predict(x), color=color, linewidth=1.6, label="fit")
        axes.axvline(found.lr, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="optimum")
        if found.low is not None and found.high is not None:
            axes.axvspan(found.low, found.high, color=INK, alpha=0.08, lw=0, label="95 % interval")
    above = [lr for lr, loss in table.items() if loss > top]
    if above:
        axes.plot(
            above, [top] * len(above), "^", color=MUTED, markersize=7, clip_on=False,
            label="higher loss",
        )  # fmt: skip
    if bad := sorted(sweep.bad()):
        axes.plot(
            bad, [top] * len(bad), "X", color="#b3261e", markersize=8, clip_on=False, zorder=5,
            label="diverged or failed",
        )  # fmt: skip
    tried = sorted({run.lr for run in sweep.runs})
    axes.set_xlim(tried[0] / 1.4, tried[-1] * 1.4)
    axes.set_ylim(*limits)
    axes.set_xticks(_ticks(tried))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.minorticks_off()
    axes.set_xlabel("learning rate")
    axes.set_ylabel(f"final {METRICS[metric]}")


def _ticks(tried: Sequence[float]) -> list[float]:
    """Of the learning rates tried, those whose labels fit beside each other."""
    room = 0.16 * np.log(2 * tried[-1] / tried[0])
    ticks = [tried[0]]
    for lr in tried[1:]:
        if np.log(lr / ticks[-1]) >= room:
            ticks.append(lr)
    return ticks


def _row(sweep: Sweep, sweeps: Sequence[Sweep], metric: str) -> dict[str, Any]:
    found, best = sweep.optimum, sweep.best
    names = ("lr", "low", "high", "loss", "loss_low", "loss_high", "factor", "fitted", "best_tried")
    return {
        "sweep": sweep.label,
        "optimizer": sweep.runs[0].optimizer,
        "metric": metric,
        **{name: getattr(found, name, None) for name in names},
        "best_tried_loss": best and best.value,
        "best_tried_low": best and best.low,
        "best_tried_high": best and best.high,
        "tolerated_low": sweep.tolerated[0],
        "tolerated_high": sweep.tolerated[1],
        "trials": len(sweep.runs),
        "seeds": sweep.seeds,
        **{status: sweep.count(status) for status in (FINISHED, DIVERGED, FAILED, UNFINISHED)},
        "warnings": "; ".join(found.warnings) if found else "no trial finished",
        "paste": paste(sweep, sweeps) if found else None,
    }


def _trial_rows(sweeps: Iterable[Sweep], metric: str) -> Iterable[dict[str, Any]]:
    for sweep in sweeps:
        for run in sorted(sweep.runs, key=lambda r: (r.lr, r.seed)):
            yield {
                "run": str(run.dir), "sweep": sweep.label, "lr": run.lr, "seed": run.seed,
                "status": run.status, "note": run.note, "final": run.final(metric),
                "steps": int(run.steps[-1]),
            }  # fmt: skip


@dataclass(frozen=True)
class Options:
    out: str = "report"
    metric: str = VAL


def main(paths: list[str], options: Options) -> None:
    if not paths:
        raise ValueError("no sweep given: python -m report.sweep DIR out=DIR")
    folders = list(map(Path, paths))
    runs, skipped = with_journal(*read_runs(folders), folders)
    for line in skipped:
        print(f"skipped {line}", file=sys.stderr)
    metric = options.metric
    if metric == VAL and runs and not any(run.curve(VAL).size for run in runs):
        metric = TRAIN
    sweeps = analyse(runs, metric)
    command = f"python -m report.sweep {' '.join(paths)} out={options.out}"
    with drawing():
        page = write(sweeps, metric, skipped, Path(options.out), command)
    print(as_text(sweeps))
    print(page)


if __name__ == "__main__":
    sys.exit(run_command(Options, main, __doc__, sys.argv[1:]))
