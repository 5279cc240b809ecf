"""Writing files so that a reader never sees half of one.

A training job is killed without warning: by the scheduler, by a full disk, by a power cut. So
nothing here writes into a file that somebody may be reading. The new content goes to a temporary
file beside the target, is forced to the disk, and takes the target's name in one step
(`os.replace`): at every moment the name shows the whole old content or the whole new one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what was written there becomes `path` at the end.

    If the body raises, the temporary file is removed and `path` keeps its old content. `durable`
    also forces file and directory to the disk, which only a crash of the whole machine needs: a
    killed process loses nothing that it has written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            fsync(temporary)
        os.replace(temporary, path)
        if durable:
            fsync(path.parent)  # the new name lives in the directory, which is a file too
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str, durable: bool = True) -> None:
    """Replace the content of `path` by `text` (UTF-8) in one step."""
    with atomic_path(path, durable) as temporary:
        temporary.write_bytes(text.encode())


def write_json(path: Path, obj: Any, durable: bool = True) -> None:
    """Replace `path` by `obj` as indented JSON; see `json_safe` for NaN and infinities."""
    text = json.dumps(json_safe(obj), indent=2, allow_nan=False, default=str)
    atomic_write_text(path, text + "\n", durable)


def json_safe(obj: Any) -> Any:
    """`obj` with every NaN and infinity replaced by None.

    JSON has no such numbers; Python would write a bare `NaN`, which `jq`, JavaScript and pandas
    refuse. A diverged run must stay readable, so they become `null`: "there is no value here".
    """
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, Mapping):
        return {key: json_safe(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [json_safe(value) for value in obj]
    return obj


def fsync(path: Path) -> None:
    """Force a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
