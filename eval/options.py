"""The command lines of the evaluations: `key=value` words, typed by a frozen dataclass.

The same form as train.py's, without its YAML: a value is taken literally, so that a prompt may hold
any character.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from runtime.cli import MISTAKES, TRACEBACKS

T = TypeVar("T")
BOOLEANS = {"true": True, "false": False}


def run_with_options(
    cls: type[T], run: Callable[[T], None], doc: str | None, words: Sequence[str] | None = None
) -> int:
    """Run a command with the options of `words` (None: the command line); returns its exit code.
    What a user can cause ends in one line on standard error. `doc` is shown for --help."""
    words = sys.argv[1:] if words is None else words
    if "-h" in words or "--help" in words:
        print(f"{doc}\noptions, and their defaults:\n{_table(cls)}")
        return 0
    try:
        run(read_options(cls, words))
    except MISTAKES as error:
        if TRACEBACKS:
            raise
        line = re.sub(r"\s*\n\s*", " ", str(error)) or type(error).__name__
        print(f"error: {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def read_options(cls: type[T], words: Sequence[str]) -> T:
    """An instance of the dataclass `cls` from words such as `tokens=200`; `null` is None where the
    field may be None. Raises ValueError for unknown, missing, repeated or ill-typed options."""
    types = get_type_hints(cls)
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if key not in types:
            near = difflib.get_close_matches(key, types, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(types)}"
            raise ValueError(f"unknown option {key}: {hint}")
        if not equals:
            raise ValueError(f"{key} has no value: write {key}=...")
        if key in values:
            raise ValueError(f"{key} is given twice")
        values[key] = _convert(key, text, types[key])
    required = {f.name for f in fields(cls) if f.default is MISSING}  # type: ignore[arg-type]
    if missing := sorted(required - values.keys()):
        raise ValueError(f"{missing[0]}= is missing")
    return cls(**values)


def _convert(key: str, text: str, kind: Any) -> Any:
    kinds = get_args(kind) or (kind,)
    if NoneType in kinds and text == "null":
        return None
    kind = next(each for each in kinds if each is not NoneType)
    try:
        return BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        expected = "true or false" if kind is bool else f"a value of type {kind.__name__}"
        raise ValueError(f"{key}={text}: expected {expected}") from None


def _table(cls: type[Any]) -> str:
    return "\n".join(f"    {field.name}={_spoken(field.default)}" for field in fields(cls))


def _spoken(value: Any) -> str:
    if value is MISSING:
        return ""
    return {bool: str(value).lower(), NoneType: "null"}.get(type(value), str(value))
