"""A job of several processes in which something goes wrong on rank 1 (for test_processes.py).

torchrun ... job.py WHAT,WHAT,... FOLDER        one for each time that torchrun starts it
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runtime.errors import ConfigError
from runtime.guard import Guard
from runtime.processes import Apart, DecidedElsewhere, join, rank_in_environment

TIMEOUT = 12.0  # on a machine with other work one process may start so much after the other


def fail() -> None:
    raise ZeroDivisionError("the true reason")


def mistake() -> None:
    raise ConfigError("a mistake that all processes find")


def hang() -> None:
    time.sleep(600)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


WHAT: dict[str, Callable[[], None]] = {f.__name__: f for f in (fail, hang, die)}


def main(each: str, folder: Path) -> None:
    apart = Apart(rank_in_environment())
    all_ = join(TIMEOUT)
    print(f"hello from {all_.rank} of {all_.size}", flush=True)
    if each == "undecided":
        all_.decide(mistake)
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    run = all_.decide(lambda: folder / f"run_{attempt}")
    apart.keep(run / "logs")
    guard = Guard(all_.rank, all_.size, run / "errors", TIMEOUT, apart.terminal, (ConfigError,))
    with guard:
        for step in range(6):
            guard.beat(step, "work")
            if step == 3 and all_.rank == 1:
                (run / "began").touch()
                WHAT[each.split(",")[attempt]]()
            assert all_.gather(step) == [step] * all_.size


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]))
    except (ConfigError, DecidedElsewhere) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
