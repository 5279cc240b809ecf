"""The command line around train.py: one clear line for every mistake, no traceback.

Hydra prints its own errors and hides others; here it is told to let them through, so that an unknown
key gets its nearest valid name and every message has one form and exit code 1. With
HYDRA_FULL_ERROR=1 in the environment tracebacks are shown as they are.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from runtime.checkpoint import NonFiniteError
from runtime.config import explain, unknown

MISTAKES = (HydraException, OmegaConfBaseException, ValueError, OSError, NonFiniteError)


def run_command(main: Callable[[], None]) -> None:
    """Run a hydra main and turn what a user can cause into one line on stderr and exit code 1."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        return main()
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        main()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MISTAKES as error:
        print(f"error: {_line(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


def _line(error: BaseException) -> str:
    cause = error.__cause__
    if isinstance(cause, ConfigKeyError) and cause.parent_node is not None:
        key = str(cause.full_key)
        name = key.rpartition(".")[2]
        return unknown(key, name, [str(k) for k in cause.parent_node])
    if isinstance(error, MissingConfigException):
        return _missing(error)
    if isinstance(error, OmegaConfBaseException):
        return explain(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return re.sub(r"\s*\n\s*", " ", str(error)) or type(error).__name__


def _missing(error: MissingConfigException) -> str:
    """optim=adamww: the group's options, nearest first."""
    if error.missing_cfg_file is None or not error.options:
        return str(error).splitlines()[0]
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    return unknown(f"{group}={name}", name, [Path(o).name for o in error.options])
