"""The pictures of reports: one look, a palette that colour-blind readers can tell apart.

Colours are Okabe and Ito's (without their yellow, which is too light for lines on white); markers
and line styles differ as well, so that a print in grey can be read. Each picture is one panel, wide
enough for a phone, and goes out twice from the same figure: PNG as a file, SVG into the page.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from report.curves import short, smooth
from report.reference import Curve
from report.runs import TRAIN, VAL, Run
from report.settings import Group
from report.statistics import Estimate
from runtime.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID, MUTED = "#222222", "#e4e4e4", "#767676"
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)))
MARKERS = "os^DvPX*<>"
DOTTED: tuple[Any, ...] = ((0, (1, 2)), (0, (4, 3)), (0, (6, 2, 1, 2)), (0, (2, 1)))

LEGEND = 8  # more groups than this share a colour by optimizer, and the best one stands out
POINTS = 400  # of a curve that is drawn: more than a picture has pixels for
RC: dict[Any, Any] = {
    "font.size": 11, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True, "legend.frameon": False,
    "legend.fontsize": 9.5, "svg.hashsalt": "report", "path.simplify_threshold": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How the curve of one group is drawn. `label` is None where another curve carries it."""

    color: str
    dash: Any
    marker: str
    width: float
    alpha: float
    label: str | None


@dataclass(frozen=True)
class Axis:
    """What the loss is drawn against: `of` gives float (N,) of a run, or None if it is not known;
    `unit`: divisor and name for a largest value."""

    name: str
    of: Callable[[Run], np.ndarray | None]
    unit: Callable[[float], tuple[float, str]]
    tick: Callable[[float], str]


def _time_unit(largest: float) -> tuple[float, str]:
    for size, name in ((2 * 3600, "hours"), (600, "minutes")):
        if largest >= size:
            return {"hours": 3600.0, "minutes": 60.0}[name], f"training time ({name})"
    return 1.0, "training time (seconds)"


def _plain(name: str) -> Callable[[float], tuple[float, str]]:
    return lambda largest: (1.0, name)


AXES = (
    Axis("tokens", lambda run: run.tokens, _plain("tokens"), short),
    Axis("steps", lambda run: run.steps, _plain("optimizer steps"), short),
    Axis("seconds", lambda run: run.seconds, _time_unit, lambda v: f"{v:g}"),
    Axis(
        "flops", lambda run: run.flops, _plain("model FLOPs"), lambda v: f"{v:.3g}".replace("+", "")
    ),
)
METRICS = {VAL: "validation loss (nats per token)", TRAIN: "training loss (nats per token)"}


def drawing() -> Any:
    """A context in which figures have the look of reports; drawing and saving belong inside."""
    import matplotlib

    return matplotlib.rc_context(RC)


def looks(groups: Sequence[Group], baseline: Group) -> dict[str, Look]:
    """Group label -> how it is drawn. `groups`: best first. Of more than `LEGEND` groups only the
    best of each optimizer and the baseline are named; the others stand behind in the same colour.
    """
    best: dict[str, Group] = {}
    for each in groups:
        best.setdefault(each.optimizer, each)
    many = len(groups) > LEGEND
    front = [g for g in groups if not many or g is baseline or best[g.optimizer] is g]
    styles = itertools.cycle((color, dash) for dash in DASHES for color in COLORS)
    given = zip(styles, itertools.cycle(MARKERS), strict=False)
    style = {each.label: next(given) for each in front}
    found = {}
    for each in groups:
        (color, dash), marker = style.get(each.label) or style[best[each.optimizer].label]
        named = each.label in style
        found[each.label] = Look(
            color, dash, marker, 1.8 if named else 0.7, 1.0 if named else 0.35,
            each.label if named else None,
        )  # fmt: skip
    return found


@dataclass(frozen=True, eq=False)
class Band:
    """The curve of a group: x, mean, low, high, each (n,): mean, smallest and largest over
    the seeds, as far as all of them have come."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: int


def band(runs: Iterable[Run], metric: str, axis: Axis) -> Band | None:
    """None if no run has the metric on that axis. Training losses are averaged along the run over
    1 % of it to either side; long curves are thinned to `POINTS`."""
    curves = []
    for run in runs:
        at, where = run.curve(metric), axis.of(run)
        if where is None or at.size == 0:
            continue
        x, y = where[at], run.series[metric][at]
        keep = np.isfinite(x)
        x, y = x[keep], y[keep]
        if metric == TRAIN and x.size >= 30:
            y = smooth(y, max(x.size // 100, 2))
        if x.size:
            curves.append((x, y))
    if not curves:
        return None
    end = min(x[-1] for x, _ in curves)
    grid = max((x[x <= end] for x, _ in curves), key=len)
    if grid[-1] < end:
        grid = np.append(grid, end)
    if grid.size > POINTS:
        grid = grid[np.unique(np.linspace(0, grid.size - 1, POINTS).round().astype(int))]
    values = np.array([np.interp(grid, x, y) for x, y in curves])
    return Band(grid, values.mean(0), values.min(0), values.max(0), len(curves))


def loss_figure(
    bands: Mapping[str, Band],
    style: Mapping[str, Look],
    metric: str,
    axis: Axis,
    references: Sequence[tuple[Curve, str]] = (),
) -> Figure:
    """Loss of every group against one axis; `references`: published curves, with the label of the
    group that they belong to."""
    figure, axes = _panel()
    largest = max((b.x[-1] for b in bands.values()), default=1.0)
    divisor, name = axis.unit(largest)
    drawn = _draw_references(axes, references, style, axis, divisor, largest)
    for label, each in bands.items():
        look, x = style[label], each.x / divisor
        if each.seeds > 1 and look.label:
            axes.fill_between(
                x, each.low, each.high, color=look.color, alpha=0.16 * look.alpha, lw=0
            )
        axes.plot(
            x, each.mean, color=look.color, linestyle=look.dash, linewidth=look.width,
            alpha=look.alpha, label=look.label, zorder=3 if look.label else 2,
            marker=look.marker if metric == VAL and look.label and x.size <= 40 else None,
            markersize=4.5, markevery=max(x.size // 12, 1),
        )  # fmt: skip
    _limits(axes, [(b.x / divisor, b.mean) for b in bands.values()], drawn)
    axes.set_xlim(0, 1.02 * largest / divisor or 1)
    axes.set_xlabel(name)
    axes.set_ylabel(METRICS[metric])
    axes.xaxis.set_major_formatter(lambda value, _: axis.tick(value))
    figure.set_figheight(3.6 + 0.22 * legend(figure, [axes]))
    return figure


def _draw_references(
    axes: Axes,
    references: Sequence[tuple[Curve, str]],
    style: Mapping[str, Look],
    axis: Axis,
    divisor: float,
    largest: float,
) -> list[np.ndarray]:
    """Behind the runs, in their group's colour, a line style for each set of runs; the points of a
    table are not joined. Returns the losses that were drawn."""
    sets = list(dict.fromkeys(curve.set for curve, _ in references))
    dashes = dict(zip(sets, itertools.cycle(DOTTED), strict=False))
    crosses = dict(zip(sets, itertools.cycle("+x1|"), strict=False))
    losses, named = [], set[str]()
    for curve, label in references:
        where = {"tokens": curve.tokens, "steps": curve.steps}.get(axis.name)
        inside = None if where is None else np.isfinite(where) & (where <= 1.05 * largest)
        if where is None or inside is None or not inside.any():
            continue
        x, y, margin = where[inside] / divisor, curve.losses[inside], curve.tolerance[inside]
        few = curve.values.size < 6
        look: dict[str, Any] = (
            {"linestyle": "none", "marker": crosses[curve.set], "markersize": 9}
            if few
            else {"linestyle": dashes[curve.set], "linewidth": 1.2}
        )
        color = style[label].color
        if few:
            axes.errorbar(x, y, margin, color=color, alpha=0.8, zorder=2, capsize=2, **look)
        else:
            axes.fill_between(x, y - margin, y + margin, color=color, alpha=0.1, lw=0, zorder=1)
            axes.plot(x, y, color=color, alpha=0.8, zorder=1, **look)
        if curve.set not in named:
            axes.plot([], [], color=MUTED, label=f"published: {curve.set}", **look)
            named.add(curve.set)
        losses.append(y)
    return losses


def forest_figure(
    rows: Sequence[tuple[str, Estimate, Sequence[float], str]], baseline: str, metric: str
) -> Figure:
    """Final losses: (label, mean with interval, the seeds' values, colour), best first; a vertical
    line at the baseline."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 1.3 + 0.4 * max(len(rows), 2)), layout="constrained")
    axes = figure.add_subplot()
    for y, (label, estimate, values, color) in enumerate(rows):
        if label == baseline:
            axes.axvline(estimate.value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        if estimate.low is not None and estimate.high is not None:
            axes.plot([estimate.low, estimate.high], [y, y], color=color, linewidth=2, zorder=2)
        axes.plot(values, [y] * len(values), "|", color=color, markersize=9, zorder=3)
        axes.plot(estimate.value, y, "o", color=color, markersize=6, zorder=4)
    axes.set_yticks(range(len(rows)), [_wrap(row[0]) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    _forest_limits(axes, rows)
    right = axes.get_xlim()[1]
    for y, (_, estimate, _, color) in enumerate(rows):
        if estimate.value > right:
            axes.annotate(
                f"{estimate.value:.3f} →", (1, y), xycoords=("axes fraction", "data"),
                xytext=(-4, 0), textcoords="offset points", ha="right", va="center", color=color,
            )  # fmt: skip
    axes.set_xlabel(f"final {METRICS[metric]}")
    return figure


def _forest_limits(axes: Axes, rows: Sequence[tuple[str, Estimate, Sequence[float], str]]) -> None:
    """Intervals of two seeds are twelve times as wide as their spread, and a bad learning rate far
    off: what lies beyond three times the spread of the better half leaves the picture."""
    values = np.concatenate([[*row[2], row[1].value] for row in rows])
    low, middle = values.min(), float(np.median(values))
    bounds = [b for row in rows for b in (row[1].low, row[1].high) if b is not None]
    reach = 3 * max(middle - low, 1e-3)
    right = min(max([values.max(), *bounds]), middle + reach)
    left = max(min([low, *bounds]), low - reach)
    margin = 0.05 * (right - left) or 0.01
    axes.set_xlim(left - margin, right + margin)


def _panel() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # the object-oriented API: no pyplot, no global state

    figure = Figure(figsize=(5.6, 4.3), layout="constrained")
    return figure, figure.add_subplot()


def _limits(
    axes: Axes, curves: Sequence[tuple[np.ndarray, np.ndarray]], references: Sequence[np.ndarray]
) -> None:
    """From the lowest loss to somewhat above what a usual curve has after a tenth of the run: the
    plunge at the start and a run that went off would press the rest together."""
    curves = [(x, y) for x, y in curves if x.size]
    if not curves:
        return
    begin = 0.1 * max(x[-1] for x, _ in curves)
    early = [float(np.interp(begin, x, y)) for x, y in curves if x[-1] >= begin]
    lowest = min(float(y.min()) for _, y in [*curves, *((r, r) for r in references)])
    usual = float(np.median(early)) if early else max(float(y.max()) for _, y in curves)
    top = usual + 0.35 * max(usual - lowest, 0.02)
    margin = 0.05 * (top - lowest)
    axes.set_ylim(lowest - margin, top + margin)


def legend(figure: Figure, panels: Sequence[Axes]) -> int:
    """One legend below the panels, published curves last; returns how many lines it has."""
    entries = {
        name: handle
        for axes in panels
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    names = sorted(entries, key=lambda name: name.startswith("published"))
    if not names:
        return 0
    texts = [_wrap(name, 62) for name in names]
    widest = max(map(len, names))
    columns = 1 if widest > 32 else 2 if widest > 18 else 3
    figure.legend(
        [entries[name] for name in names], texts, loc="outside lower center", ncols=columns
    )
    return -(-sum(text.count("\n") + 1 for text in texts) // columns)


def _wrap(text: str, width: int = 26) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width, break_long_words=False)) or text


def save(figure: Figure, path: Path) -> str:
    """Write `path` (PNG) and return the same picture as SVG, as a data address for a page."""
    figure.savefig(svg := io.BytesIO(), format="svg", metadata={"Date": None})
    with atomic_path(path, durable=False) as temporary:
        figure.savefig(temporary, format="png", dpi=160)
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.getvalue()).decode()}"
