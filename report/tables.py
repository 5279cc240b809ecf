"""Tables as CSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from runtime.files import atomic_path


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One line a row, in one step; the first row names the columns. None is an empty field."""
    table = list(rows)
    with (
        atomic_path(path, durable=False) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, list(table[0]) if table else [])
        writer.writeheader()
        writer.writerows(table)
