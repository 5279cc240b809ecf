"""Command lines of the form `PATH... key=value...`, typed by a frozen dataclass as in eval/."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from eval.options import read_options

T = TypeVar("T")


def run_command(
    cls: type[T], run: Callable[[list[str], T], int | None], doc: str | None, words: Sequence[str]
) -> int:
    """Call `run(paths, options)`: words that begin with an option's name and `=` are options of
    `cls`, others are paths (which may hold a `=`, as Hydra's folders do). Returns the exit code: 1,
    and one line on standard error, for what a user can cause."""
    if not words or {"-h", "--help"} & set(words):
        print((doc or "").strip())
        return 0 if words else 2
    names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    try:
        options = [word for word in words if _is_option(word, names)]
        paths = [word for word in words if word not in options]
        return run(paths, read_options(cls, options)) or 0
    except (ValueError, OSError) as error:
        line = re.sub(r"\s*\n\s*", " ", str(error)) or type(error).__name__
        print(f"error: {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _is_option(word: str, names: set[str]) -> bool:
    key, equals, _ = word.partition("=")
    return bool(equals) and (key in names or not Path(word).exists())
