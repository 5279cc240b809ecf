"""What a sweep tries: the values asked for, and which trial comes next.

A plan is a function of what has ended (the journal), so a sweep that is killed and started again
goes on as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from runtime.files import atomic_write_text, json_safe

Values = dict[str, str]  # key -> value, as on the command line


@dataclass(frozen=True)
class Trial:
    """One run of the sweep: the folder it lives in and the settings that are its own."""

    name: str
    values: tuple[tuple[str, str], ...]

    @property
    def overrides(self) -> list[str]:
        return [f"{key}={value}" for key, value in self.values]


def trial(values: Values) -> Trial:
    """The trial of these values; its name says them: ``lr-0.001_seed-1``."""
    said = "_".join(f"{k.lstrip('+').rpartition('.')[2]}-{v}" for k, v in values.items())
    name = re.sub(r"[^\w.+-]+", "-", said)
    if len(name) > 100 or name != said:  # two of them could become one
        name = f"{name[:100]}_{hashlib.sha256(repr(values).encode()).hexdigest()[:8]}"
    return Trial(name, tuple(values.items()))


# ---- the journal ---------------------------------------------------------------------------------


class Journal:
    """trials.jsonl: one line per trial that has ended, written when it has.

    ``status``: finished | diverged | failed | pruned; ``val_loss`` of those that finished.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ended: dict[str, dict[str, Any]] = {}
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a kill may have torn the last line
        if whole != text:
            atomic_write_text(path, whole)
        for line in whole.splitlines():
            record: dict[str, Any] = json.loads(line)
            self.ended[record["trial"]] = record

    def add(self, trial: Trial, **record: Any) -> None:
        line = json_safe({"trial": trial.name, "values": dict(trial.values), **record})
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.ended[trial.name] = line

    def forget(self, statuses: Iterable[str]) -> None:
        """Drop the records with these statuses: their trials will run again."""
        kept = {k: v for k, v in self.ended.items() if v["status"] not in set(statuses)}
        atomic_write_text(self.path, "".join(json.dumps(r) + "\n" for r in kept.values()))
        self.ended = kept

    def loss(self, trial: Trial) -> float:
        """Of a trial that has ended; infinite if it did not finish."""
        loss = self.ended[trial.name].get("val_loss")
        return math.inf if loss is None else float(loss)


# ---- what is asked for ---------------------------------------------------------------------------


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], dict[str, Override]]:
    """Overrides that all trials share, and those that are swept: ``optim.lr=1e-3,3e-3``."""
    fixed, swept = [], {}
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    for override, text in zip(parsed, overrides, strict=True):
        if override.is_sweep_override():
            swept[override.get_key_element()] = override
        else:
            fixed.append(text)
    return fixed, swept


def listed(swept: Mapping[str, Override]) -> dict[str, list[str]]:
    """The values of each key. ValueError for an interval, which only a search can draw from."""
    for key, override in swept.items():
        if override.is_interval_sweep():
            raise ValueError(f"{key} is an interval: give a list of values, or add --search N")
    return {key: list(o.sweep_string_iterator()) for key, o in swept.items()}


# ---- the grid ------------------------------------------------------------------------------------


@dataclass
class Grid:
    """Every combination of the values; then, where the best value of ``extend`` lies at an edge,
    the next one beyond it, until it does not; then, ``refine`` times, the values halfway to its
    neighbours; then ``then`` at the best value of each.

    Losses are means over seeds; a trial that did not finish counts as infinitely bad.
    """

    values: dict[str, list[str]]
    journal: Journal
    extend: str | None = None
    limit: int = 6  # values added beyond the edges at most
    then: dict[str, list[str]] = field(default_factory=dict)
    refine: int = 0
    out: set[str] = field(default_factory=set)  # names of trials that have been given out

    def next(self) -> Trial | None:
        """A trial to run now; None if there is none, at least before one that runs has ended."""
        for candidate in self.wanted():
            if candidate.name not in self.journal.ended and candidate.name not in self.out:
                self.out.add(candidate.name)
                return candidate
        return None

    def total(self) -> int:
        """With those that ended before and are not asked for now."""
        return len({candidate.name for candidate in self.wanted()} | set(self.journal.ended))

    def hopeless(self, trial: Trial, folder: Path) -> bool:
        return False

    def ended(self, trial: Trial) -> None:
        self.out.discard(trial.name)

    def wanted(self) -> Iterator[Trial]:
        """All trials that are known to be wanted, given what has ended."""
        yield from (trial(values) for values in product(self.values))
        for rest in product(self._others()):
            yield from self._followed(rest)

    def _followed(self, rest: Values) -> Iterator[Trial]:
        missing, best = self._optimum(rest)
        yield from missing
        yield from () if best is None else self._more_of(best)

    def _optimum(self, rest: Values) -> tuple[list[Trial], Values | None]:
        """What must end before the best value of ``extend`` is known, and the setting with it."""
        if self.extend is None:
            return [], None
        points = sorted(self.values[self.extend], key=float)
        most, left = len(points) + self.limit, self.refine
        while True:
            cells = {point: list(self._seeds({**rest, self.extend: point})) for point in points}
            missing = [t for ts in cells.values() for t in ts if t.name not in self.journal.ended]
            if missing:
                return missing, None
            losses = [self._mean(cells[point]) for point in points]
            if (outside := beyond(points, losses)) is not None:
                new = [outside] if len(points) < most else []
            else:  # from here on the best lies inside, whatever the new values bring
                new, left = around(points, losses) if left > 0 else [], left - 1
            if not new:
                best = points[losses.index(min(losses))]
                return [], {**rest, self.extend: best} if min(losses) < math.inf else None
            points = sorted([*points, *new], key=float)

    def _more_of(self, best: Values) -> Iterator[Trial]:
        for extra in product(self.then) if self.then else ():
            yield from self._seeds({**best, **extra})

    def best(self) -> list[Trial]:
        """The trials at the best value of ``extend``, of each combination of the others; without
        ``extend`` the best trial."""
        if self.extend is None:
            done = [t for t in self.wanted() if t.name in self.journal.ended]
            return [min(done, key=self.journal.loss)] if done else []
        found = [best for rest in product(self._others()) if (best := self._optimum(rest)[1])]
        return [t for best in found for t in (*self._seeds(best), *self._more_of(best))]

    def _others(self) -> dict[str, list[str]]:
        return {k: v for k, v in self.values.items() if k not in (self.extend, "seed")}

    def _seeds(self, values: Values) -> Iterator[Trial]:
        """In the order of keys of the grid, so that names do not depend on the way here."""
        seeds = [] if "seed" in values else self.values.get("seed", [])
        for seed in [{"seed": s} for s in seeds] or [{}]:
            both = {**values, **seed}
            keys = sorted(both, key=[*self.values, *self.then].index)
            yield trial({key: both[key] for key in keys})

    def _mean(self, trials: Sequence[Trial]) -> float:
        return sum(map(self.journal.loss, trials)) / len(trials)


def product(values: Mapping[str, Sequence[str]]) -> Iterator[Values]:
    for combination in itertools.product(*values.values()):
        yield dict(zip(values, combination, strict=True))


def beyond(points: Sequence[str], losses: Sequence[float]) -> str | None:
    """The next value of a sorted grid on the side where its best lies at the edge: geometric, or
    arithmetic where one of the last two is not positive. None if the best lies inside, or is zero,
    where a scale ends. Where nothing finished, the next smaller one."""
    if len(points) < 2:
        return None
    at = losses.index(min(losses)) if min(losses) < math.inf else 0
    neighbor = {0: 1, len(points) - 1: -2}.get(at)
    if neighbor is None or float(points[at]) == 0:
        return None
    last, before = float(points[at]), float(points[neighbor])
    return written(last**2 / before if min(last, before) > 0 else 2 * last - before)


def around(points: Sequence[str], losses: Sequence[float]) -> list[str]:
    """The values halfway between the best of a sorted grid and its neighbours."""
    at = losses.index(min(losses))
    near = points[max(at - 1, 0) : at + 2]
    return [new for a, b in itertools.pairwise(near) if (new := between(a, b)) is not None]


def between(low: str, high: str) -> str | None:
    """The geometric mean, or the arithmetic one where ``low`` is not positive; between integers an
    integer. None if nothing lies between them that can be written."""
    a, b = float(low), float(high)
    middle = math.sqrt(a * b) if a > 0 else (a + b) / 2
    whole = all(re.fullmatch(r"[+-]?\d+", value) for value in (low, high))
    new = f"{round(middle)}" if whole else written(middle)
    return new if a < float(new) < b else None


def written(value: float) -> str:
    """Three significant digits, so that folders have short names: 0.00354, 1410."""
    return f"{float(f'{value:.3g}'):g}"
