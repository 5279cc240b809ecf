"""What a run says of itself before the first step: the parameter table and the arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtime.config import Config, accumulation

COLUMNS = ("group", "role", "rule", "correction", "mask", "lr", "weight_decay")


def batch_arithmetic(config: Config, context: int, processes: int = 1) -> str:
    """How the global batch is cut and what the run adds up to."""
    train = config.train
    count = accumulation(train, processes)
    micro = train.global_batch // (processes * count)
    cut = f"{count} micro-batches of {micro}"
    if processes > 1:
        cut = f"{processes} processes x {cut}"
    tokens = train.global_batch * context
    return (
        f"global batch {train.global_batch} sequences x {context} = {tokens:,} tokens = "
        f"{cut}; {train.steps:,} steps = "
        f"{train.steps * tokens:,} tokens"
    )


def parameter_table(rows: Sequence[dict[str, Any]]) -> str:
    """Parameters that are treated alike, a line each, as text."""
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        alike.setdefault(tuple(row[column] for column in COLUMNS), []).append(row)
    lines: list[Sequence[str]] = [(*COLUMNS, "tensors", "parameters", "state bytes")]
    for key, members in alike.items():
        counts = (len(members), sum(map(_size, members)), sum(r["state_bytes"] for r in members))
        lines.append((*map(_text, key), *(f"{count:,}" for count in counts)))
    return aligned(lines)


def full_table(rows: Sequence[dict[str, Any]]) -> str:
    """Every parameter, a line each."""
    columns = ("parameter", "shape", *COLUMNS, "state_bytes")
    return aligned([columns, *(tuple(_text(row[c]) for c in columns) for row in rows)])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _size(row: dict[str, Any]) -> int:
    size = 1
    for n in row["shape"]:
        size *= n
    return size


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)
