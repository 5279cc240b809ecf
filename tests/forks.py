"""One server that has the imports behind it: a process forked from it starts in a tenth of a
second, a fresh one takes three. It starts with the first process that is asked for."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
_LATE = ("_dynamo", "distributed.fsdp", "distributed.checkpoint", "distributed.run")  # of torch

# The only one: multiprocessing has a single such server per process, and one list of its imports.
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(
    [
        "train",
        "safetensors.torch",
        "optim.divided",
        *(f"torch.{name}" for name in _LATE),
        "scripts.sweep",
        "scripts.sweep_search",
    ]
)


def start(function: Callable[..., Any], *args: Any, daemon: bool = False) -> BaseProcess:
    """``function(*args)`` in a new process; both must be importable or picklable."""
    process = forks.Process(target=function, args=args, daemon=daemon)
    with patch.dict(os.environ, {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}):
        process.start()
    return process
