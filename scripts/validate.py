"""Look at the settings of train.py in one process, before torchrun starts many, again and again.

    python -m scripts.validate MACHINES PROCESSES SETTINGS...

MACHINES: how many, or the fewest and the most of an elastic job, as torchrun's --nnodes has them
(4, or 2:4); PROCESSES of each. A mistake is told in one line, with exit code 1: torchrun does not
tell one from a crash, and with --max-restarts meets it once more each time. What shows only when
data and model are built is not looked at, nor are sweeps (-m).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from runtime.cli import run_command
from runtime.errors import ConfigError
from runtime.launch import check_together
from runtime.processes import Processes
from scripts.compose import compose_config


def validate(machines: str, processes: str, settings: Sequence[str]) -> None:
    """Raises Hydra's errors, and ConfigError where the settings, or a number of machines that the
    job may come to run on, do not fit."""
    if any(word.startswith("-") for word in settings):
        return  # --help, a sweep: train.py deals with them
    config = compose_config(settings)
    os.environ["LOCAL_WORLD_SIZE"] = processes  # which torchrun will say
    fewest, _, most = machines.partition(":")
    for number in range(int(fewest), int(most or fewest) + 1):
        size = number * int(processes)
        try:
            if size > 1:
                check_together(config, Processes(size=size))
        except ConfigError as error:
            where = f"on {number} of {machines} machines: " if most else ""
            raise ConfigError(f"{where}{error}") from None


def main() -> None:
    machines, processes, *settings = sys.argv[1:]
    sys.argv[1:] = settings  # where run_command looks
    run_command(lambda: validate(machines, processes, settings))


if __name__ == "__main__":
    main()
