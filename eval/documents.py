"""The rows of an evaluation's data set: a local file, or the hub's."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import IO, Any

OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}


def read_documents(
    file: str | None,
    hub: str,
    split: str,
    limit: int | None,
    option: str,
    subset: str | None = None,
) -> list[dict[str, Any]]:
    """The first ``limit`` rows (None: all) of ``file``, a .jsonl that may be .xz or .gz, or without
    one of a split of the data set ``hub``, which `datasets` downloads once. ``option`` names the
    file in messages. Raises ValueError or FileNotFoundError in one line."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: expected a positive number, or null for all examples")
    rows = _from_hub(hub, subset, split, limit, option) if file is None else _from_file(file, limit)
    if not rows:
        raise ValueError(f"{option}={file} has no rows")
    return rows


def open_text(path: Path) -> IO[str]:
    """A text file, unpacked while it is read if its name says so."""
    opener = OPENERS.get(path.suffix, open)
    text: IO[str] = opener(path, "rt", encoding="utf-8", newline="\n")
    return text


def _from_file(file: str, limit: int | None) -> list[dict[str, Any]]:
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{file} does not exist: expected a .jsonl, .jsonl.xz or .jsonl.gz")
    rows = []
    try:
        with open_text(path) as lines:
            for number, line in enumerate(islice(lines, limit), start=1):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is no object")
                rows.append(row)
    except (ValueError, OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{file} is not JSON lines: {error}") from None
    return rows


def _from_hub(
    hub: str, subset: str | None, split: str, limit: int | None, option: str
) -> list[dict[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(hub, subset, split=split)
    except Exception as error:  # the hub's libraries have errors of their own
        raise FileNotFoundError(
            f"the data set {hub} ({split}) cannot be had from the hub ({type(error).__name__}): "
            f"give a local file with {option}="
        ) from None
    return [dict(row) for row in islice(rows, limit)]
