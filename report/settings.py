"""Which runs are repetitions of one setting, and in what the settings differ.

Two runs belong to one group if they differ in nothing but the seed (and in what cannot move a
loss: where files lie, how the batch is cut). A group is what has a mean and an interval.

A difference between groups is of one of three kinds. That the optimizer differs is what is being
compared. A difference of speed makes seconds incomparable, not losses. Any other difference means
that the losses compare more than the optimizers, and reports show it in red.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from report.runs import FINISHED, Run

# Prefixes of settings that decide neither losses nor speed.
IRRELEVANT = (
    *("run.", "paths.", "logging.", "seed", "data.dir", "data.cache", "data.worker", "data.check"),
    *("data.processes", "data.threads", "data.shard_tokens", "train.resume", "train.sample_tokens"),
    *("train.checkpoint_every", "train.keep_checkpoints", "train.eval_every", "eval."),
)
SPEED = (
    *("train.micro_batch", "train.threads", "train.compile", "train.device", "parallel."),
    *("train.attention", "train.symmetric", "train.cpu_linear", "train.profile", "model.loss_"),
    "data.prefetch",
)
OPTIMIZER = ("optim.",)
KINDS = {"optimizer": OPTIMIZER, "speed": SPEED}


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one setting, by seed. `label` is unique among the groups of a report."""

    label: str
    runs: tuple[Run, ...]

    @property
    def optimizer(self) -> str:
        return self.runs[0].optimizer

    @property
    def settings(self) -> dict[str, Any]:
        return self.runs[0].settings

    def finals(self, metric: str) -> dict[int, float]:
        """Seed -> final loss, of the runs that finished."""
        losses = {run.seed: run.final(metric) for run in self.runs}
        return {seed: loss for seed, loss in sorted(losses.items()) if loss is not None}

    def finished(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.status == FINISHED)


@dataclass(frozen=True)
class Difference:
    """A setting with more than one value. `values`: group label -> value, as text."""

    key: str
    kind: str  # optimizer | speed | other
    values: dict[str, str]


def relevant(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that can move a loss, without the seed."""
    return {
        key: value for key, value in settings.items() if not key.startswith((*IRRELEVANT, *SPEED))
    }


def split_by(runs: Iterable[Run], free: Sequence[str] = ()) -> list[tuple[Run, ...]]:
    """Runs with equal settings, but for the seed and the keys in `free`, together."""
    alike: dict[str, list[Run]] = {}
    for run in runs:
        settings = {k: v for k, v in relevant(run.settings).items() if k not in free}
        alike.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(run)
    return [tuple(members) for members in alike.values()]


def group(runs: Iterable[Run]) -> list[Group]:
    """Groups of repetitions, in the order in which they first appear. A seed that appears twice in
    a setting counts once, the latest run of it."""
    parts = [tuple({run.seed: run for run in part}.values()) for part in split_by(runs)]
    return [
        Group(label, part) for label, part in zip(labels([p[0] for p in parts]), parts, strict=True)
    ]


def labels(settings: Sequence[Run], free: Sequence[str] = ()) -> list[str]:
    """A unique name for each of several settings: the optimizer's, and where several settings share
    one, as many of the settings that they differ in as tell them apart: "adamw lr=0.003"."""
    keys = {
        name: _telling([relevant(run.settings) for run in settings if run.optimizer == name], free)
        for name in {run.optimizer for run in settings}
    }
    names = []
    for one in settings:
        parts = [f"{_short(k)}={show(one.settings.get(k))}" for k in keys[one.optimizer]]
        names.append(" ".join([one.optimizer, *parts]))
    return [
        name if names.count(name) == 1 else f"{name} #{index + 1}"
        for index, name in enumerate(names)
    ]


def differences(groups: Sequence[Group]) -> list[Difference]:
    """Every setting that differs between or within groups, other than seeds and places of files;
    those that are neither of the optimizer nor of speed first."""
    tables = [
        {k: v for k, v in run.settings.items() if not k.startswith(IRRELEVANT)}
        for each in groups
        for run in each.runs
    ]
    found = []
    for key in _differing(tables):
        kind = next((name for name, keys in KINDS.items() if key.startswith(keys)), "other")
        values = {
            each.label: ", ".join(dict.fromkeys(_shown(run.settings, key) for run in each.runs))
            for each in groups
        }
        found.append(Difference(key, kind, values))
    return sorted(found, key=lambda d: ("other", "speed", "optimizer").index(d.kind))


def show(value: Any) -> str:
    """A setting's value as it would be typed."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return f"[{','.join(map(show, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return show(settings[key]) if key in settings else "-"


def _differing(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for table in tables for key in table)
    return [key for key in keys if len({_shown(table, key) for table in tables}) > 1]


def _telling(tables: Sequence[Mapping[str, Any]], free: Sequence[str]) -> list[str]:
    """The first differing keys, lr before all, by which no two tables are equal."""
    differing = [key for key in _differing(tables) if key not in free]
    differing.sort(key=lambda key: (key != "optim.lr", not key.startswith(OPTIMIZER)))
    chosen: list[str] = []
    for key in differing:
        distinct = {tuple(show(table.get(k)) for k in chosen) for table in tables}
        if len(distinct) == len(tables):
            break
        finer = {tuple(show(table.get(k)) for k in [*chosen, key]) for table in tables}
        if len(finer) > len(distinct):
            chosen.append(key)
    return chosen


def _short(key: str) -> str:
    return key.removeprefix("optim.")
