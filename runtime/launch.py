"""A run of however many processes, from joining to leaving: what surrounds training.

join -> the strategy fits -> rank 0 opens the run -> logs apart -> guarded work -> leave
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from runtime.cli import MISTAKES, output
from runtime.config import Config, accumulation
from runtime.errors import ConfigError
from runtime.guard import Guard
from runtime.parallel import check_fit
from runtime.processes import Processes, join
from runtime.run import Run, open_for_all


@contextmanager
def together(config: Config) -> Iterator[tuple[Run, Processes, Guard]]:
    """This process among those of the job, its run, and the guard that watches over its work.

    Raises ConfigError where strategy, batch and number of processes do not go together, and
    whatever `open_run` raises; ranks other than 0 then DecidedElsewhere.
    """
    processes = join(config.parallel.timeout)
    check_fit(config.parallel, processes)
    accumulation(config.train, processes.size)
    if config.logging.diagnostics and processes.size > 1:
        raise ConfigError(
            "logging.diagnostics looks at whole updates, which many processes do not have: set it "
            "to 0, or run one process"
        )
    run = open_for_all(config, processes)
    apart = output()
    try:
        terminal = None
        if apart is not None:
            apart.keep(run.dir / "logs")
            terminal = apart.terminal
        folder, timeout = run.dir / "errors", config.parallel.timeout
        with Guard(processes.rank, processes.size, folder, timeout, terminal, MISTAKES) as guard:
            yield run, processes, guard
    finally:
        run.close()
    processes.leave()
