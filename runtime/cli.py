"""The command line around train.py: one clear line for every mistake, no traceback.

Hydra prints its own errors and hides others; here it is told to let them through, so that an
unknown key gets its nearest valid name and every message has one form and exit code 1. With
HYDRA_FULL_ERROR=1 in the environment tracebacks are shown as they are.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from runtime.config import explain, flatten, nearest, unknown
from runtime.errors import NonFiniteError
from runtime.processes import Apart, DecidedElsewhere, launched, rank_in_environment

TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1"  # asked for by the user
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
GRACE = 10.0  # seconds in which rank 0 says what all processes met
MISTAKES = (HydraException, OmegaConfBaseException, ValueError, OSError, NonFiniteError)


def run_command(main: Callable[[], None]) -> None:
    """Run a hydra main and turn what a user can cause into one line on stderr and exit code 1; of
    many processes, which all meet the same, rank 0 prints it."""
    global _output
    if launched():
        _output = Apart(rank_in_environment())
    if TRACEBACKS:
        return main()
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        _refuse_unread()
        main()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MISTAKES as error:
        _fail(error)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


_output: Apart | None = None


def output() -> Apart | None:
    """Where this process of many prints; None where it is the only one."""
    return _output


def plain_errors(job: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """Stands between hydra.main and the job, because Hydra puts a line of its own, with all
    overrides, before the error of a job. In a sweep that line says which trial it was, and the
    error is Hydra's to raise, after the other trials have run; failed.jsonl keeps all of them."""

    @wraps(job)
    def run(tree: DictConfig) -> None:
        try:
            job(tree)
        except BrokenPipeError:
            raise
        except DecidedElsewhere:
            time.sleep(GRACE)  # rank 0 is saying why; torchrun ends it when this process ends
            sys.exit(1)
        except MISTAKES as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                _record_failure(error)
                raise
            if TRACEBACKS:
                raise
            _fail(error)

    return run


def _record_failure(error: BaseException) -> None:
    """A line of <sweep>/failed.jsonl: which trial, and why."""
    job = HydraConfig.get()
    failure = {
        "trial": job.sweep.subdir,
        "overrides": list(job.overrides.task),
        "error": one_line(error),
    }
    Path(job.sweep.dir).mkdir(parents=True, exist_ok=True)
    with (Path(job.sweep.dir) / "failed.jsonl").open("a") as file:
        file.write(json.dumps(failure) + "\n")


def _fail(error: BaseException) -> None:
    line = f"error: {one_line(error)}"
    if _output is not None and _output.rank:
        time.sleep(GRACE)  # rank 0 meets the same and ends the job; else it is this rank's to tell
        print(f"rank {_output.rank}: {line}", file=_output.terminal, flush=True)
    print(line, file=sys.stderr)
    sys.exit(1)


def _refuse_unread() -> None:
    """--batch_size=8, as nanoGPT and most programs have it; or settings on both sides of -m."""
    _, unread = get_args_parser().parse_known_args()
    for word in unread:
        name = word.lstrip("-").partition("=")[0]
        raise ValueError(
            f"unknown option {word}: settings have no dashes, write {name}=value "
            f"(python train.py --help lists them)"
            if word.startswith("-")
            else f"{word} stands behind an option such as -m, and other settings before it: put "
            f"all settings on one side"
        )


def one_line(error: BaseException) -> str:
    """What went wrong and what to do, for any of `MISTAKES`."""
    cause = error.__cause__
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.parent_node is not None:
        return _unknown_key(str(cause.full_key), cause.parent_node)
    if isinstance(error, MissingConfigException):
        return _unknown_option(error)
    if isinstance(error, OverrideParseException):
        return (
            f"cannot read {error.override!r}: expected key=value; a value with spaces or signs "
            f"such as ~ = ( takes quotes within quotes, as in 'data.files=[\"~/my book.txt\"]'"
        )
    if isinstance(error, OmegaConfBaseException):
        return explain(error)
    if isinstance(error, NonFiniteError):
        return f"{error}: lower optim.lr or lengthen the warm-up; checkpoints before it are intact"
    if isinstance(error, OSError) and error.errno is not None:
        advice = "; make room, then the same command continues" if error.errno in FULL else ""
        return f"cannot write or read {error.filename or 'a file'}: {error.strerror}{advice}"
    return re.sub(r"\s*\n\s*", " ", str(error)) or type(error).__name__


def _unknown_key(key: str, parent: DictConfig) -> str:
    """train.stpes=3; lr=3e-3, which lies deeper."""
    group, _, name = key.rpartition(".")
    siblings = [str(k) for k in parent]
    if not group and not nearest(name, siblings):
        leaves = flatten(OmegaConf.to_container(parent, resolve=False))
        deeper = [leaf for leaf in leaves if leaf.endswith(f".{name}") and leaf[:6] != "hydra."]
        if deeper:
            return f"unknown configuration key {key}: did you mean {' or '.join(deeper)}?"
    return unknown(key, name, siblings)


def _unknown_option(error: MissingConfigException) -> str:
    """optim=adamww: the group's options, nearest first."""
    if error.missing_cfg_file is None or not error.options:
        return str(error).splitlines()[0]
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    options = [Path(option).name for option in error.options]
    near = nearest(name, options)
    hint = f"did you mean {group}={near}?" if near else f"expected one of {', '.join(options)}"
    return f"there is no {group}={name}: {hint}"
