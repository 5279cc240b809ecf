"""metrics.jsonl: the one true record of a run.

One JSON object per line, one line per step: `step` (optimizer updates completed), `tokens` (seen
so far), `time_s` (seconds of training) and whatever was measured: `train/loss`, `val/loss`, `lr`,
`grad_norm`, `tokens_per_s`, ... Losses are in nats per token. Everything else that shows a run
(wandb, TensorBoard, the plots of `report/`) is a mirror that can be rebuilt from this file.

The file survives what happens to training jobs. A kill can cost at most a torn last line. A run
resumed from the checkpoint of step s drops the lines after s, which it is about to write again,
so no step appears twice, and the file ends up the same as if nothing had happened (but for the
values that measure time). For that the lines up to s must be on the disk before the checkpoint
of step s is: call `flush()` first.

NaN and infinities are written as `null`: JSON has no such numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from runtime.files import atomic_path, json_safe

FILE_NAME = "metrics.jsonl"

Record = dict[str, Any]


class Mirror(Protocol):
    """Something that shows the records of a run."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one line of metrics.jsonl (`None`: the value was not finite)."""

    def close(self) -> None:
        """Finish; nothing is written afterwards."""


class MetricsLog:
    """Appends records to `run_dir/metrics.jsonl` and hands each one to the mirrors.

    `resume_step` is the step of the checkpoint that the run continues from: lines after it, and a
    torn last line, are dropped. Use 0 to restart a run that died before its first checkpoint, and
    None for a new run, whose directory must not hold a metrics.jsonl yet (FileExistsError).
    """

    def __init__(self, run_dir: Path, mirrors: Sequence[Mirror], resume_step: int | None) -> None:
        self.path = run_dir / FILE_NAME
        self.mirrors = mirrors
        run_dir.mkdir(parents=True, exist_ok=True)
        if resume_step is None and self.path.exists() and self.path.stat().st_size > 0:
            raise FileExistsError(
                f"{self.path} already holds a run: resume it (train.resume=auto) "
                "or give a new one its own directory (run.dir=...)"
            )
        self._kept = _truncate(self.path, resume_step) if resume_step is not None else -1
        self._last = self._kept
        self._file = self.path.open("ab")

    def log(self, step: int, tokens: int, time_s: float, values: Mapping[str, float]) -> None:
        """Append the record of `step`; it reaches the operating system before this returns.

        One record per step, in increasing order (ValueError otherwise). A step that the file
        already held when the run was resumed is skipped: an evaluation repeated at the resumed
        step leaves no second line. A value on the accelerator costs a host sync here.
        """
        if step <= self._kept:
            return
        if step <= self._last:
            raise ValueError(
                f"metrics of step {step} after those of step {self._last}: "
                "expected one record per step, in increasing order"
            )
        record = {"step": step, "tokens": tokens, "time_s": round(time_s, 3)}
        record |= {name: float(value) for name, value in values.items()}
        record = json_safe(record)
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()
        self._last = step
        for mirror in self.mirrors:
            mirror.write(record)

    def flush(self) -> None:
        """Force everything logged so far to the disk (fsync: milliseconds, so not every step)."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close the file, then the mirrors. A second call does nothing."""
        if self._file.closed:
            return
        self.flush()
        self._file.close()
        for mirror in self.mirrors:
            mirror.close()


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics.jsonl, also of one that is being written or was cut off.

    A torn last line is ignored. A bad line anywhere else means that the file was damaged, not
    interrupted: ValueError with its number.
    """
    return [record for _, record in _parse(path)]


def _parse(path: Path) -> list[tuple[bytes, Record]]:
    """(line without its end, record) for every whole line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a run's {FILE_NAME}")
    lines = path.read_bytes().split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not (isinstance(record, dict) and isinstance(record.get("step"), int)):
                raise ValueError("not an object with an integer step")
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with a step, got {line[:60]!r}; "
                "repair or remove the line"
            ) from error
        parsed.append((line, record))
    return parsed


def _truncate(path: Path, step: int) -> int:
    """Drop what lies after `step`; return the last step kept, or -1.

    The kept lines are copied byte for byte: reading and writing a number again could change it.
    """
    if not path.exists():
        return -1
    kept = [(line, record) for line, record in _parse(path) if record["step"] <= step]
    content = b"".join(line + b"\n" for line, _ in kept)
    if content != path.read_bytes():
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    return max((record["step"] for _, record in kept), default=-1)
