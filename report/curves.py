"""The loss curve of one run, from its metrics.jsonl: `python -m report.curves RUN_DIR`.

The training loss is shown twice: each step, light, because its scatter is information, and as a
moving average, because the scatter hides the trend. The validation loss has markers, since it was
measured only there. Reference lines (a bigram model, a published result) say what a number of
nats per token is worth.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.files import atomic_path
from runtime.metrics import FILE_NAME, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAIN, VAL, REFERENCE, INK = "#3b6ea8", "#c8502d", "#6b6b6b", "#333333"


def plot_loss(
    run_dir: Path,
    reference: Mapping[str, float] | None = None,
    bits_per_byte: float | None = None,
) -> Path:
    """Draw `run_dir/loss.png` and return its path.

    `reference`: label -> loss in nats per token, drawn as horizontal lines. `bits_per_byte`: the
    factor from nats per token to bits per byte, (tokens / bytes) / ln 2 of the validation text;
    if given, the right axis shows them. Missing, empty and non-finite values are left out.
    """
    from matplotlib.figure import Figure  # the object-oriented API: no pyplot, no global state

    records = read_metrics(run_dir / FILE_NAME)
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()

    train, val = _series(records, "train/loss"), _series(records, "val/loss")
    _draw_train(axes, *train)
    val_tokens, val_loss = val
    if val_loss.size:
        axes.plot(
            val_tokens, val_loss, color=VAL, marker="o", markersize=4, linewidth=0.8,
            label=f"validation (last {val_loss[-1]:.4f})", zorder=4,
        )  # fmt: skip
    for label, value in (reference or {}).items():
        axes.axhline(value, color=REFERENCE, linewidth=1, linestyle=(0, (5, 4)), zorder=1)
        axes.annotate(
            f"{label}  {value:.3f}", (1, value), xycoords=("axes fraction", "data"),
            xytext=(-4, 3), textcoords="offset points", ha="right", fontsize=8, color=REFERENCE,
        )  # fmt: skip

    _scale(axes, [train, val], list((reference or {}).values()))
    _decorate(axes)
    _step_axis(axes, records)
    figure.suptitle(run_dir.resolve().name, x=0.02, ha="left", fontsize=11, color=INK)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    if bits_per_byte:
        _bits_axis(axes, bits_per_byte)
    path = run_dir / "loss.png"
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")  # Agg, whatever backend is configured
    return path


def smooth(values: np.ndarray, half_width: int) -> np.ndarray:
    """Centered moving average over 2 * half_width + 1 values, (N,) -> (N,).

    The window shrinks symmetrically towards the ends, so that the average lags neither behind a
    falling curve nor at its last point, as an exponential one does.
    """
    index = np.arange(values.size)
    half = np.minimum(half_width, np.minimum(index, values.size - 1 - index))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[index + half + 1] - total[index - half]) / (2 * half + 1)


def _series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, values) of the records where `name` is a finite number."""
    points = [(record["tokens"], record[name]) for record in records if name in record]
    points = [(tokens, value) for tokens, value in points if value is not None]
    tokens, values = np.array(points, dtype=float).reshape(-1, 2).T
    return tokens, values


def _draw_train(axes: Axes, tokens: np.ndarray, loss: np.ndarray) -> None:
    if loss.size == 0:
        return
    if loss.size < 30:  # too few to average
        axes.plot(tokens, loss, color=TRAIN, marker=".", linewidth=1.4, label="training")
        return
    axes.plot(tokens, loss, color=TRAIN, alpha=0.25, linewidth=0.7, zorder=2)
    half_width = max(loss.size // 200, 2)
    average = smooth(smooth(loss, half_width), half_width)  # twice: a spike becomes no plateau
    axes.plot(
        tokens, average, color=TRAIN, linewidth=1.6, label="training (and moving average)", zorder=3
    )


def _scale(
    axes: Axes,
    series: Sequence[tuple[np.ndarray, np.ndarray]],
    references: Sequence[float],
) -> None:
    """Limits that show what happened after the first 2 % of a long run, but no later spike.

    The first plunge, from ln(vocabulary) down, would press everything else against the floor.
    """
    tokens, loss = (np.concatenate(parts) for parts in zip(*series, strict=True))
    if tokens.size == 0:
        return
    axes.set_xlim(0, 1.01 * tokens.max() or 1)
    begin = 0.02 * tokens.max() if tokens.size > 100 else 0
    starts = [start for at, values in series for start in values[at >= begin][:1]]
    usual = np.percentile(loss[tokens >= begin], 95)
    top, bottom = max([usual, *starts, *references]), min([loss.min(), *references])
    margin = 0.05 * (top - bottom) or 0.1
    axes.set_ylim(bottom - margin, top + margin)


def _decorate(axes: Axes) -> None:
    axes.set_xlabel("tokens", color=INK)
    axes.set_ylabel("loss (nats per token)", color=INK)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(lambda value, _: short(value))


def _bits_axis(axes: Axes, bits_per_byte: float) -> None:
    def to_bits(y: Any) -> Any:
        return y * bits_per_byte

    def to_nats(y: Any) -> Any:
        return y / bits_per_byte

    right = axes.secondary_yaxis("right", functions=(to_bits, to_nats))
    right.set_ylabel("bits per byte", color=INK)


def _step_axis(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    """Read steps on top where the bottom axis reads tokens, also if the batch grew meanwhile."""
    from matplotlib.ticker import MaxNLocator

    steps = np.array([record["step"] for record in records], dtype=float)
    tokens = np.array([record["tokens"] for record in records], dtype=float)
    if steps.size == 0 or steps[-1] <= 0 or tokens[-1] <= 0:
        return
    # Beyond both ends, where matplotlib probes for ticks, any increasing continuation will do.
    steps = np.concatenate([[-steps[-1], 0], steps, [2 * steps[-1]]])
    tokens = np.concatenate([[-tokens[-1], 0], tokens, [2 * tokens[-1]]])

    def to_steps(x: Any) -> Any:
        return np.interp(x, tokens, steps)

    def to_tokens(x: Any) -> Any:
        return np.interp(x, steps, tokens)

    top = axes.secondary_xaxis("top", functions=(to_steps, to_tokens))
    top.set_xlabel("steps", color=INK)
    top.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    top.xaxis.set_major_formatter(lambda value, _: short(value))


def short(count: float) -> str:
    """1500000 -> "1.5M"; the units of token counts: k, M, B, T."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return f"{count:.4g}"


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 1:
        raise SystemExit("usage: python -m report.curves RUN_DIR")
    try:
        print(plot_loss(Path(arguments[0])))
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
