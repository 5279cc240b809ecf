"""Search with Optuna: which values to try next, and which running trials are hopeless.

Optuna keeps its own journal beside the sweep's, so that a search goes on after a kill; what it had
begun is continued first. Trials that diverge count as pruned: worse than any that finished, and a
reason not to look there again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from hydra.core.override_parser.types import Override
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from runtime.metrics import read_metrics
from scripts.sweep_plan import Journal, Trial

ENDED = {"finished": TrialState.COMPLETE, "failed": TrialState.FAIL}  # all others: pruned


def distribution(key: str, override: Override) -> BaseDistribution:
    """``interval(1e-4,1e-2)``, with ``tag(log,...)`` in the logarithm; integers stay integers; any
    list of values is a choice."""
    if not override.is_interval_sweep():
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    interval: Any = override.value()
    log = "log" in interval.tags
    if isinstance(interval.start, int) and isinstance(interval.end, int):
        return IntDistribution(interval.start, interval.end, log=log)
    if log and not interval.start > 0:
        raise ValueError(f"{key}: an interval in the logarithm must begin above 0")
    return FloatDistribution(float(interval.start), float(interval.end), log=log)


@dataclass
class Search:
    """``count`` trials drawn by TPE; those worse than the median of the others at the same step,
    after the first five, are stopped."""

    folder: Path
    space: Mapping[str, Override]
    count: int
    journal: Journal
    seed: int = 0
    running: dict[str, optuna.Trial] = field(default_factory=dict)

    def __post_init__(self) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = JournalStorage(JournalFileBackend(str(self.folder / "optuna.journal")))
        self.study = optuna.create_study(
            study_name="sweep", storage=storage, direction="minimize", load_if_exists=True
        )
        begun = len(self.study.trials)
        self.study.sampler = optuna.samplers.TPESampler(seed=self.seed + begun, constant_liar=True)
        self.study.pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_min_trials=3)
        self.distributions = {key: distribution(key, o) for key, o in self.space.items()}
        self.begun = [t for t in self.study.trials if t.state == TrialState.RUNNING]

    def next(self) -> Trial | None:
        while self.begun:  # what a killed search had begun
            frozen = self.begun.pop(0)
            drawn = optuna.Trial(self.study, frozen._trial_id)
            trial = self._trial(drawn)
            if trial.name not in self.journal.ended:
                return trial
            self.ended(trial)
        if len(self.study.trials) >= self.count:
            return None
        return self._trial(self.study.ask(self.distributions))

    def _trial(self, drawn: optuna.Trial) -> Trial:
        values = tuple((key, f"{drawn.params[key]}") for key in self.distributions)
        trial = Trial(f"trial_{drawn.number:04d}", values)
        self.running[trial.name] = drawn
        return trial

    def total(self) -> int:
        return self.count

    def best(self) -> list[Trial]:
        done = [r for r in self.journal.ended.values() if r["status"] == "finished"]
        best = min(done, key=lambda record: record["val_loss"], default=None)
        return [Trial(best["trial"], tuple(best["values"].items()))] if best else []

    def hopeless(self, trial: Trial, folder: Path) -> bool:
        """Whether the run in ``folder``, by its validation losses so far, is one to give up."""
        file, drawn = folder / "metrics.jsonl", self.running[trial.name]
        if not file.exists():
            return False
        frozen = self.study.trials[drawn.number]
        news = False
        for record in read_metrics(file):
            loss, step = record.get("val/loss"), record["step"]
            if loss is not None and step > 0 and step not in frozen.intermediate_values:
                drawn.report(loss, step)
                news = True
        return news and drawn.should_prune()

    def ended(self, trial: Trial) -> None:
        record = self.journal.ended.get(trial.name)
        drawn = self.running.pop(trial.name)
        if record is None:
            return  # stopped with the sweep: it stays begun
        state = ENDED.get(record["status"], TrialState.PRUNED)
        loss = record.get("val_loss") if state == TrialState.COMPLETE else None
        self.study.tell(drawn, loss, state=state)
