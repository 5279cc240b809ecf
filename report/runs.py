"""Run directories as arrays: found below folders, read, and judged (finished, diverged, failed).

A folder with a run's files in it is a run; any other folder is searched for runs, so that a run, a
sweep's folder and `runs/` itself can all be named. A run that cannot be read costs one line that
says which and why, never the report: `read_runs` returns those lines beside the runs.

What a run of an older version did not write is found elsewhere (state bytes in parameters.txt,
FLOPs per token in log.txt) or missing; it is never guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from runtime.config import flatten
from runtime.metrics import FILE_NAME, read_metrics

CONFIG, SUMMARY, ENVIRONMENT, LOG = "config.yaml", "summary.json", "environment.json", "log.txt"
PARAMETERS, TRAJECTORY = "parameters.txt", "trajectory.json"
MARKS = (FILE_NAME, CONFIG, SUMMARY, TRAJECTORY, ".run.lock")  # any of them makes a folder a run
REQUIRED = ("optim.name", "optim.lr", "seed", "train.steps")  # what every version's config has

TRAIN, VAL = "train/loss", "val/loss"
SERIES = (TRAIN, VAL, "tokens_per_s", "memory_gb")

FINISHED, UNFINISHED, DIVERGED, FAILED = "finished", "unfinished", "diverged", "failed"

_ENDED = re.compile(r"ended by (\w+): ?(.*)")  # what runtime/record.py says of a run that raised
_FLOPS = re.compile(r"([\d,]+) FLOPs per token")
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster, where libyaml is there


class Malformed(ValueError):
    """A folder that holds no readable run; the message says why."""


@dataclass(frozen=True, eq=False)
class Run:
    """One run. `steps`, `tokens`, `seconds`: float (N,), one entry per line of metrics.jsonl;
    `series`: name -> float (N,), NaN where that line has no finite value. Losses are in nats per
    token, seconds those of training, evaluations included."""

    dir: Path
    settings: dict[str, Any]  # the resolved configuration, "optim.lr" -> value
    status: str  # FINISHED | UNFINISHED | DIVERGED | FAILED
    note: str  # why it is not finished; empty if it is
    steps: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray
    series: dict[str, np.ndarray]
    evaluations: dict[str, float] = field(default_factory=dict)  # last value of each eval/...
    summary: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    state_bytes: int | None = None  # of the optimizer, over all parameters
    flops_per_token: float | None = None  # of one gradient

    @property
    def optimizer(self) -> str:
        return str(self.settings["optim.name"])

    @property
    def lr(self) -> float:
        return float(self.settings["optim.lr"])

    @property
    def seed(self) -> int:
        return int(self.settings["seed"])

    @property
    def flops(self) -> np.ndarray | None:
        """Model FLOPs up to each line, (N,); the optimizer's own arithmetic is not counted."""
        if self.flops_per_token is None:
            return None
        return self.tokens * self.flops_per_token * gradients_per_update(self.settings)

    def curve(self, metric: str) -> np.ndarray:
        """Indices (n,) of the lines that have `metric`."""
        return np.flatnonzero(np.isfinite(self.series[metric]))

    def final(self, metric: str) -> float | None:
        """The loss at the end: validation at the last step, or the mean training loss of the last
        twentieth of the lines. None for a run that did not get there."""
        at = self.curve(metric)
        if self.status != FINISHED or at.size == 0:
            return None
        if metric == VAL:
            return float(self.series[VAL][at[-1]])
        return float(self.series[metric][at[-max(at.size // 20, 1) :]].mean())

    @property
    def step_seconds(self) -> float | None:
        """Median seconds of an update without evaluations; None if that was not measured."""
        rate = self.series["tokens_per_s"]
        rate = rate[np.isfinite(rate) & (rate > 0)]
        if rate.size == 0 or self.steps[-1] <= 0:
            return None
        return float(self.tokens[-1] / self.steps[-1] / np.median(rate))

    @property
    def memory_gb(self) -> float | None:
        """Peak memory of the process (CPU) or the device."""
        values = self.series["memory_gb"][np.isfinite(self.series["memory_gb"])]
        return float(values.max()) if values.size else None


def gradients_per_update(settings: Mapping[str, Any]) -> float:
    """Forward and backward passes over the global batch that an update takes: exact MARS has two,
    Sophia one more every hessian_interval steps."""
    count = 1.0
    if settings.get("optim.correction") == "mars" and settings.get("optim.mars.exact"):
        count += 1
    if interval := settings.get("optim.hessian_interval"):
        count += 1 / interval
    return count


def read_runs(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The runs at or below `paths`, and a line for each that cannot be read.

    Raises FileNotFoundError for a path that does not exist.
    """
    folders, skipped = list[Path](), list[str]()
    for path in paths:
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such folder; expected runs or a sweep's folder")
        found = list(find_runs(path))
        if not found:
            skipped.append(f"{path}: no run in it")
        folders += found
    runs = []
    for folder in tqdm(dict.fromkeys(folders), "reading runs", disable=None, leave=False):
        try:
            runs.append(read_run(folder))
        except Malformed as error:
            skipped.append(f"{folder}: {error}")
    return runs, skipped


def find_runs(folder: Path) -> Iterator[Path]:
    """Folders of runs at or below `folder`, sorted, numbers in their order."""
    if any((folder / name).exists() for name in MARKS):
        yield folder
        return
    below = (path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    for path in sorted(below, key=_natural):
        if not path.name.startswith("."):
            yield from find_runs(path)


def read_run(folder: Path) -> Run:
    """The run in `folder`. Raises Malformed, with the reason."""
    if not (folder / CONFIG).exists() and (said := _last_words(folder)):
        raise Malformed(f"it ended before its first step ({said[0]}: {said[1]})")
    settings = _settings(folder)
    records = _records(folder)
    summary = _json(folder, SUMMARY)
    steps = _column(records, "step")
    if (back := np.flatnonzero(np.diff(steps) <= 0)).size:
        raise Malformed(f"{FILE_NAME} goes back at line {back[0] + 2}: two runs in one file?")
    if summary.get("step", 0) > steps[-1]:
        raise Malformed(
            f"{FILE_NAME} is truncated: it ends at step {steps[-1]:.0f}, the run at "
            f"{summary['step']}"
        )
    series = {name: _column(records, name) for name in SERIES}
    if not any(np.isfinite(series[name]).any() for name in (TRAIN, VAL)):
        raise Malformed(f"{FILE_NAME} has no finite loss")
    status, note = _judge(folder, summary, series)
    return Run(
        dir=folder,
        settings=settings,
        status=status,
        note=note,
        steps=steps,
        tokens=_column(records, "tokens"),
        seconds=_column(records, "time_s"),
        series=series,
        evaluations=_evaluations(records),
        summary=summary,
        environment=_json(folder, ENVIRONMENT),
        state_bytes=summary.get("state_bytes") or _state_bytes(folder),
        flops_per_token=summary.get("flops_per_token") or _flops_per_token(folder),
    )


def _settings(folder: Path) -> dict[str, Any]:
    try:
        tree = yaml.load((folder / CONFIG).read_bytes(), _Loader)
    except FileNotFoundError:
        raise Malformed(f"{CONFIG} is missing") from None
    except (yaml.YAMLError, OSError) as error:
        raise Malformed(f"{CONFIG} is damaged ({_one_line(error)})") from None
    if not isinstance(tree, dict):
        raise Malformed(f"{CONFIG} is damaged (no table)")
    settings = flatten(tree)
    if lacking := [key for key in REQUIRED if settings.get(key) is None]:
        raise Malformed(f"{CONFIG} lacks {', '.join(lacking)}: truncated, or of another program")
    return settings


def _records(folder: Path) -> list[dict[str, Any]]:
    try:
        records = read_metrics(folder / FILE_NAME)
    except FileNotFoundError:
        raise Malformed(f"{FILE_NAME} is missing") from None
    except (ValueError, OSError) as error:
        reason = _one_line(error).removeprefix(f"{folder / FILE_NAME}, ")
        raise Malformed(f"{FILE_NAME} is damaged ({reason})") from None
    if not records:
        raise Malformed(f"{FILE_NAME} is empty")
    if lacking := [r["step"] for r in records if not isinstance(r.get("tokens"), int | float)]:
        raise Malformed(f"{FILE_NAME} has no tokens at step {lacking[0]}: of another version?")
    return records


def _json(folder: Path, name: str) -> dict[str, Any]:
    """The table in a JSON file; an empty one if the file is missing, as it is in a young run."""
    try:
        table = json.loads((folder / name).read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise Malformed(f"{name} is damaged ({_one_line(error)})") from None
    if not isinstance(table, dict):
        raise Malformed(f"{name} is damaged (no table)")
    return table


def _column(records: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """float (N,): NaN where a record has no number of that name."""
    values = [record.get(name) for record in records]
    try:
        column = np.array(values, dtype=float)  # None becomes NaN
    except (TypeError, ValueError):
        raise Malformed(f"{FILE_NAME} has {name} that are no numbers") from None
    column[np.isinf(column)] = np.nan
    return column


def _evaluations(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    last = {}
    for record in records:
        for name, value in record.items():
            if name.startswith("eval/") and value is not None:
                last[name] = float(value)
    return last


def _judge(
    folder: Path, summary: Mapping[str, Any], series: Mapping[str, np.ndarray]
) -> tuple[str, str]:
    """Status and why."""
    if summary.get("finished"):
        for name in (VAL, TRAIN):
            values = series[name][np.isfinite(series[name])]
            if values.size > 1 and values[-1] > values[0]:
                return (
                    DIVERGED,
                    f"{name} ended at {values[-1]:.3f}, above its first {values[0]:.3f}",
                )
        return FINISHED, ""
    if said := _last_words(folder):
        kind, text = said
        return (DIVERGED if kind == "NonFiniteError" else FAILED), f"{kind}: {text}"
    if summary:
        return UNFINISHED, f"stopped at step {summary.get('step')} by {summary.get('stopped_by')}"
    return UNFINISHED, "still running, or killed"


def _last_words(folder: Path) -> tuple[str, str] | None:
    """Kind and text of the error that log.txt ends with."""
    try:
        lines = (folder / LOG).read_text(errors="replace").split("\n")
    except OSError:
        return None
    for line in reversed(lines[-40:]):  # the text of an error may have lines of its own
        if match := _ENDED.match(line):
            return match[1], match[2]
        if line.startswith(("step ", "run ", "finished: ")):  # it was continued since
            return None
    return None


def _state_bytes(folder: Path) -> int | None:
    """Sum of the last column of parameters.txt."""
    try:
        header, *rows = (folder / PARAMETERS).read_text().splitlines()
        return sum(int(row.split()[-1]) for row in rows) if "state_bytes" in header else None
    except (OSError, ValueError, IndexError):
        return None


def _flops_per_token(folder: Path) -> float | None:
    """What the log's header says."""
    try:
        with (folder / LOG).open(errors="replace") as log:
            match = _FLOPS.search(log.read(20_000))
    except OSError:
        return None
    return float(match[1].replace(",", "")) if match else None


def _natural(path: Path) -> list[Any]:
    """Sort key: trial 2 before trial 10."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", path.name)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
