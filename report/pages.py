"""The words and tables of a comparison: as a page, and as text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report.comparison import Comparison, Row
from report.figures import LEGEND
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
from report.runs import FINISHED, TRAIN, VAL, Run, gradients_per_update
from report.settings import Difference, differences
from report.statistics import METHOD, Estimate, SpeedUp
from runtime.describe import aligned

NOTHING = "-"
ABOUT = {
    VAL: "Final loss: of the validation set at the last step, in nats per token.",
    TRAIN: "Final loss: mean training loss of the last twentieth of the logged steps, in nats per "
    "token. It was measured on text that the run trained on.",
}
READING = (
    "Bands reach from the lowest to the highest seed. Training losses are moving averages over one "
    "hundredth of the run to either side. Only ends of finished schedules compare optimizers: "
    "during a run the order depends on the learning rate's decay, so a speed-up read off runs of "
    "one length is not the length that a shorter run would need. A setting chosen as the best of "
    "several by the same runs looks better than it is. FLOPs count the model's products, one "
    "forward and backward pass per gradient, not the optimizer's own work. Seconds include "
    "evaluations; step times do not."
)
EXPECTED = ("device", "precision", "cpu", "torch", "python", "threads", "commit", "data")


def write_comparison(
    comparison: Comparison,
    shown: Sequence[tuple[str, str, str]],
    forest: Sequence[tuple[str, str]],
    path: Path,
    command: str,
) -> Path:
    """`forest`: address and caption of the picture of final losses, if there is one; `shown`:
    (metric, address, caption) of the others."""
    groups, base = comparison.groups, comparison.baseline
    runs = [run for each in groups for run in each.runs]
    found = differences(groups)
    title = f"{len(groups)} settings, {len(runs)} runs against {base.label}"
    parts = [
        paragraph(_intro(comparison)),
        _alarm([d for d in found if d.kind == "other"], len(groups)),
        _slow([d for d in found if d.kind == "speed"], runs),
        box("note", "Skipped", comparison.skipped) if comparison.skipped else "",
        _unfinished(runs),
        heading("Result"),
        table(_HEADERS, [_cells(row, base.label) for row in comparison.rows]),
        paragraph(f"{ABOUT[comparison.metric]} Intervals: 95 %, see Method.", "small"),
        _speed_note(comparison),
        pictures([*forest, *((address, text) for _, address, text in shown[:1])]),
        _many(len(groups)),
        heading("Cost"),
        table(_COSTS, [_cost(row) for row in comparison.rows]),
        *(
            heading(name)
            + pictures([(address, text) for m, address, text in shown[1:] if m == metric])
            for metric, name in ((VAL, "Validation loss"), (TRAIN, "Training loss"))
            if any(m == metric for m, *_ in shown[1:])
        ),
        _references(comparison),
        _evaluations(comparison),
        heading("Settings that differ"),
        _settings(found, [each.label for each in groups]),
        heading("Environment"),
        _environments(runs),
        heading("Method"),
        paragraph(METHOD),
        paragraph(READING),
        details(f"All {len(runs)} runs", _all_runs(comparison)),
        code(command),
    ]
    write_page(path, title, parts)
    return path


def as_text(comparison: Comparison) -> str:
    """The result, a line a setting."""
    lines: list[Sequence[str]] = [_HEADERS[:5]]
    lines += [_cells(row, comparison.baseline.label)[:5] for row in comparison.rows]
    return aligned([[*map(str, line)] for line in lines])


_HEADERS = (
    "setting", "seeds", "final loss", "difference to the baseline", "p (Holm)",
    "token speed-up", "time speed-up",
)  # fmt: skip
_COSTS = ("setting", "step (ms)", "memory (GB)", "optimizer state", "FLOPs per token")


def _cells(row: Row, base: str) -> list[str]:
    finished, runs = len(row.group.finished()), len(row.group.runs)
    itself = row.group.label == base
    return [
        row.group.label,
        str(runs) if finished == runs else f"{finished} of {runs}",
        _estimate(row.final, "{:.4f}") if row.final else _why(row.group.runs),
        "baseline" if itself else _estimate(row.difference, "{:+.4f}"),
        NOTHING if row.p is None else f"{row.p:.2g}",
        "baseline" if itself else _ratio(row.tokens),
        "baseline" if itself else _ratio(row.seconds),
    ]


def _cost(row: Row) -> list[str]:
    first = row.group.runs[0]
    flops = first.flops_per_token and first.flops_per_token * gradients_per_update(first.settings)
    return [
        row.group.label,
        NOTHING if row.step_ms is None else f"{row.step_ms:.3g}",
        NOTHING if row.memory_gb is None else f"{row.memory_gb:.3g}",
        _bytes(row.state_bytes),
        NOTHING if flops is None else f"{flops:,.0f}",
    ]


def _why(runs: Sequence[Run]) -> str:
    return ", ".join(dict.fromkeys(run.status for run in runs))


def _estimate(estimate: Estimate | None, form: str) -> str:
    if estimate is None:
        return NOTHING
    text = form.format(estimate.value)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{form.format(estimate.low)}, {form.format(estimate.high)}]"


def _ratio(speed: SpeedUp | None) -> str:
    if speed is None:
        return NOTHING
    if speed.ratio is None:
        return f"not reached ({speed.reached} of {speed.n})"
    return _estimate(speed.ratio, "{:.2f}")


def _bytes(count: int | None) -> str:
    if count is None:
        return NOTHING
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} B"


def _intro(comparison: Comparison) -> str:
    first = comparison.groups[0]
    runs = [run for each in comparison.groups for run in each.finished() or each.runs]
    budget = [int(run.tokens[-1]) for run in runs]
    tokens = " to ".join(f"{count:,}" for count in dict.fromkeys((min(budget), max(budget))))
    model = ", ".join(
        f"{key.partition('.')[2]} {first.settings[key]}"
        for key in ("model.name", "model.n_layer", "model.n_head", "model.n_embd", "model.context")
        if key in first.settings
    )
    return f"Runs of {tokens} tokens. Model of the best setting: {model}."


def _alarm(found: Sequence[Difference], groups: int) -> str:
    if not found or groups < 2:
        return ""
    lines = [f"{d.key}: {_versus(d)}" for d in found]
    return box("alarm", "More than the optimizer and the seed differs between these runs:", lines)


def _slow(found: Sequence[Difference], runs: Sequence[Run]) -> str:
    lines = [f"{d.key}: {_versus(d)}" for d in found]
    tables = [_environment(run) for run in runs]
    for key in ("device", "precision", "torch", "threads"):
        values = sorted({table[key] for table in tables})
        if len(values) > 1:
            lines.append(f"{key}: {' | '.join(values)}")
    title = "Seconds and step times do not compare: the runs differ in"
    return box("note", title, lines) if lines else ""


def _versus(difference: Difference) -> str:
    values = list(dict.fromkeys(difference.values.values()))
    labels = {
        value: [name for name, its in difference.values.items() if its == value] for value in values
    }
    return " | ".join(
        f"{value} ({', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''})"
        for value, names in labels.items()
    )


def _unfinished(runs: Sequence[Run]) -> str:
    lines = [f"{run.dir}: {run.status}; {run.note}" for run in runs if run.status != FINISHED]
    return box("note", "Runs without a final loss", lines) if lines else ""


def _speed_note(comparison: Comparison) -> str:
    target = next(r.final for r in comparison.rows if r.group is comparison.baseline)
    if target is None:
        return ""
    return paragraph(
        f"Speed-up: times fewer tokens, or seconds, than the baseline to the baseline's final loss "
        f"({target.value:.4f} on the mean); more than 1 is faster.",
        "small",
    )


def _many(groups: int) -> str:
    if groups <= LEGEND:
        return ""
    text = (
        "Colours stand for optimizers; the best setting of each and the baseline are drawn "
        "strongly and named."
    )
    return paragraph(text, "small")


def _references(comparison: Comparison) -> str:
    if not comparison.references:
        return ""
    rows = [
        (c.curve, Cell(label, "text"), Cell(c.label, "wrap"), Cell(c.confidence, "wrap"),
         NOTHING if c.noise is None else f"{c.noise:g}", Cell(c.source, "wrap"))
        for c, label in comparison.references
    ]  # fmt: skip
    headers = ("curve", "setting", "published as", "confidence", "noise (nats)", "source")
    text = (
        "Published by others, not measured here; drawn behind the setting of the same model, data "
        "and optimizer where the runs are long enough. The band is the error of reading plus the "
        "noise of an evaluation. Different sets of one paper are different runs."
    )
    return heading("Published curves") + table(headers, rows) + paragraph(text, "small")


def _evaluations(comparison: Comparison) -> str:
    names = sorted({n for g in comparison.groups for run in g.runs for n in run.evaluations})
    if not names:
        return ""
    rows = [
        (
            each.label,
            *(_mean_of([r.evaluations.get(name) for r in each.finished()]) for name in names),
        )
        for each in comparison.groups
    ]
    return heading("Evaluations") + table(("setting", *names), rows)


def _mean_of(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.4g} ({len(known)})" if known else NOTHING


def _settings(found: Sequence[Difference], labels: Sequence[str]) -> str:
    if not found:
        return paragraph("None.")
    rows = []
    for each in sorted(found, key=lambda d: d.kind == "optimizer"):
        usual = max(labels, key=lambda name: list(each.values.values()).count(each.values[name]))
        rows.append(
            [
                Cell(each.key, "alarm-cell") if each.kind == "other" else each.key,
                Cell({"other": "OTHER", "speed": "speed"}.get(each.kind, "optimizer"), "text"),
                *(
                    Cell(value, "alarm-cell")
                    if each.kind == "other" and value != each.values[usual]
                    else Cell(value, "text")
                    for value in (each.values[label] for label in labels)
                ),
            ]
        )
    headers = ("setting", "kind", *labels)
    text = "In red: neither the optimizer's nor the seed, and unlike most settings here."
    few = sum(each.kind != "optimizer" for each in found)
    return (table(headers, rows[:few]) + paragraph(text, "small") if few else "") + details(
        f"{len(rows) - few} settings of the optimizers", table(headers, rows[few:])
    )


def _environment(run: Run) -> dict[str, str]:
    env, summary = run.environment, run.summary
    torch, git = env.get("torch") or {}, env.get("git") or {}
    cpu = env.get("cpu") or {}
    commit = str(git.get("commit") or "unknown")[:10] + (", changed" if git.get("dirty") else "")
    values: dict[str, Any] = {
        "device": summary.get("device"),
        "precision": summary.get("precision"),
        "cpu": cpu.get("model") and f"{cpu['model']}, {cpu.get('cores')} cores",
        "torch": torch.get("version"),
        "python": env.get("python"),
        "threads": torch.get("threads"),
        "commit": commit,
        "data": str(summary.get("data") or "unknown")[:12],
    }
    return {key: "unknown" if values[key] is None else str(values[key]) for key in EXPECTED}


def _environments(runs: Sequence[Run]) -> str:
    """Each distinct environment once, with how many runs it had."""
    found: dict[tuple[str, ...], int] = {}
    for run in runs:
        key = tuple(_environment(run).values())
        found[key] = found.get(key, 0) + 1
    columns = list(found)
    rows = [
        [name, *(Cell(column[i], "text") for column in columns)] for i, name in enumerate(EXPECTED)
    ]
    return table(("", *(f"{found[column]} runs" for column in columns)), rows)


def _all_runs(comparison: Comparison) -> str:
    rows = []
    for each in comparison.groups:
        for run in each.runs:
            final = run.final(comparison.metric)
            rows.append(
                (
                    Cell(str(run.dir), "text"),
                    Cell(each.label, "text"),
                    str(run.seed),
                    run.status,
                    f"{run.steps[-1]:,.0f}",
                    NOTHING if final is None else f"{final:.4f}",
                    f"{run.seconds[-1]:.4g}",
                )
            )
    headers = ("run", "setting", "seed", "status", "steps", "final loss", "seconds")
    return table(headers, rows)
