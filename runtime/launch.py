"""A run of however many processes, from joining to leaving: what surrounds training.

join -> same settings everywhere, and they fit -> rank 0 opens the run -> logs apart -> guarded work
-> leave
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from runtime.cli import MISTAKES, output
from runtime.config import Config, accumulation, flatten
from runtime.errors import ConfigError
from runtime.guard import Guard
from runtime.parallel import check_fit, check_micro_batches
from runtime.processes import Processes, join, launched
from runtime.run import ERRORS, LOGS, Run, open_for_all

# What each machine may have of its own: where things lie, and how many hands it has for the work.
# Of what lies in files, the corpus is compared by content (train.py); the run is opened by rank 0.
OWN = re.compile(
    r"run\..*|paths\..*|train\.(compile_cache|threads|resume)|eval\.hellaswag\.data_file|"
    r"data\.(mixture\.[^.]+\.)?(dir|cache|files|worker|processes|threads|prefetch|check)"
)


@contextmanager
def together(config: Config) -> Iterator[tuple[Run, Processes, Guard]]:
    """This process among those of the job, its run, and the guard that watches over its work.

    Raises ConfigError where the processes have different settings, where strategy, batch and
    number of processes do not go together, and whatever `open_run` raises; ranks other than 0 then
    DecidedElsewhere.
    """
    processes = join(config.parallel.timeout)
    processes.agree(common(config), "settings")
    if config.train.device != "cpu":
        processes.check_gpus()
    check_together(config, processes)
    run = open_for_all(config, processes)
    if note := alone(config):
        run.notes.append(note)
    apart = output()
    try:
        terminal = None
        if apart is not None:
            apart.keep(run.dir / LOGS)
            terminal = apart.terminal
        folder, timeout = run.dir / ERRORS, config.parallel.timeout
        with Guard(processes.rank, processes.size, folder, timeout, terminal, MISTAKES) as guard:
            guard.pause(0, "building")
            if config.train.compile:  # a sweep's trial before this one did so with its own kernels
                torch.compiler.reset()
            yield run, processes, guard
    finally:
        run.close()
    processes.leave()


def common(config: Config) -> dict[str, Any]:
    """The flat table of settings that must be the same on all processes: all but `OWN`."""
    flat = flatten(asdict(config))
    return {key: value for key, value in flat.items() if not OWN.fullmatch(key)}


def check_together(config: Config, processes: Processes) -> None:
    """ConfigError where strategy, batch and number of processes do not go together."""
    check_fit(config.parallel, processes)
    count = accumulation(config.train, processes.size)
    check_micro_batches(config.parallel, processes, count)
    if config.logging.diagnostics and processes.size > 1:
        raise ConfigError(
            "logging.diagnostics looks at whole updates, which many processes do not have: set it "
            "to 0, or run one process"
        )


def alone(config: Config) -> str | None:
    """A word to who set a strategy and started a single process without torchrun."""
    strategy = config.parallel.strategy
    if strategy == "none" or launched():
        return None
    note = (
        f"parallel={strategy}, but this is one process: torchrun starts many (docs/distributed.md)"
    )
    if (tasks := int(os.environ.get("SLURM_NTASKS", "1"))) > 1:
        note += (
            f". Slurm has {tasks} tasks: if srun started this command for each, they are {tasks} "
            f"separate runs; start one torchrun per machine, as scripts/slurm.sbatch does"
        )
    return note
