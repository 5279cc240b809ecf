"""train.py as its user meets it: commands that succeed or fail, run folders that can be compared.

A command runs in one of three ways. `here` runs the file in this process, which saves three seconds
of imports. `start` runs it in a process forked from one that has the imports behind it, so that it
can be killed at any moment, many times; `module` does so with the other commands, and waits.
`shell` is the real thing.
"""

from __future__ import annotations

import gc
import io
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import forks
import torch
from forks import ROOT
from torch import Tensor

TRAIN = ROOT / "train.py"

# A model of 16 thousand parameters, whose step takes milliseconds, and nothing printed or drawn
# that the test does not look at.
TINY = (
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=32",
    "model.context=32",
    "train.steps=8",
    "train.global_batch=4",
    "train.eval_every=4",
    "train.eval_tokens=640",
    "train.checkpoint_every=4",
    "train.sample_tokens=0",
    "train.device=cpu",
    "train.threads=1",
    "logging.every=1",
    "logging.picture=false",
)

Command = tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """How a command ended: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object in the last line of a command that succeeded."""
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"
        result: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return result

    @property
    def dir(self) -> Path:
        return Path(self.result["run_dir"])

    @property
    def error(self) -> str:
        """The one line that a command that failed has to say for itself."""
        assert self.code == 1, f"exit code {self.code}\n{self.out}\n{self.err}"
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        return lines[0].removeprefix("error: ")


def here(*overrides: str) -> Outcome:
    """Run the command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = _main(overrides)
    return Outcome(code, out.getvalue(), err.getvalue())


def shell(*overrides: str, **options: Any) -> subprocess.Popen[str]:
    """Start the command as from a shell, its output piped; `options` are Popen's."""
    options.setdefault("env", {**os.environ, "OMP_NUM_THREADS": "1"})
    return subprocess.Popen(
        [sys.executable, str(TRAIN), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait(process: subprocess.Popen[str], timeout: float = 60) -> Outcome:
    """How the command ended; one that does not end is killed, and fails the test."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Outcome(process.returncode, out, err)


def until(true: Callable[[], bool], alive: Callable[[], bool], timeout: float = 60) -> None:
    """Wait for something that a living command will do."""
    end = time.monotonic() + timeout
    while not true():
        assert alive() and time.monotonic() < end, "the command ended or hung before its time"
        time.sleep(0.005)


def start(*overrides: str, output: Path, **environment: str) -> BaseProcess:
    """Start the command in a fork, which takes a tenth of a second; what it says goes to a file."""
    return forks.start(_forked, overrides, output, environment)


def start_agent(*overrides: str, options: Command, output: Path, **environment: str) -> BaseProcess:
    """Start the command as torchrun with ``options`` does, and again when a worker fails, but in
    forks: the agent is torchrun's own, its workers do not import torch anew."""
    return forks.start(_forked_agent, overrides, options, output, environment)


def _forked_agent(
    overrides: Command, options: Command, output: Path, environment: dict[str, str]
) -> None:
    from torch.distributed import run
    from torch.distributed.launcher.api import elastic_launch

    os.environ.update(environment)
    config, _, _ = run.config_from_args(run.parse_args([*options, str(TRAIN)]))
    config.start_method = "fork"
    with output.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        elastic_launch(config, _worker)(overrides)


def _worker(overrides: Command) -> None:
    sys.exit(_main(overrides))


def module(name: str, *words: str, folder: Path, ranks: int = 0, timeout: float = 120) -> Outcome:
    """How `python -m name words` ends in that folder, run in a fork; with ``ranks`` in so many, as
    by `torchrun --standalone --nproc_per_node=ranks`."""
    with tempfile.TemporaryDirectory() as kept:
        outputs = [Path(kept, stream) for stream in ("out", "err")]
        process = forks.start(_forked_module, name, words, folder, ranks, outputs)
        process.join(timeout)
        if process.exitcode is None:
            process.terminate()  # which an agent passes on to its workers
            process.join()
            raise TimeoutError(f"{name} did not end in {timeout:g} s\n{outputs[1].read_text()}")
        return Outcome(process.exitcode, *(file.read_text() for file in outputs))


def _forked_module(
    name: str, words: Command, folder: Path, ranks: int, outputs: list[Path]
) -> None:
    from torch.distributed import run
    from torch.distributed.launcher.api import elastic_launch

    os.chdir(folder)
    for number, file in enumerate(outputs, start=1):  # descriptors: workers write there too
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if not ranks:
        _run_module(name, words)
    options = [f"--nproc_per_node={ranks}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    config, _, _ = run.config_from_args(run.parse_args([*options, name]))
    config.start_method = "fork"
    elastic_launch(config, _run_module)(name, words)


def _run_module(name: str, words: Command) -> None:
    sys.argv = [name, *words]
    sys.modules.pop(name, None)  # it may be among what the server has imported
    runpy.run_module(name, run_name="__main__", alter_sys=True)
    sys.exit()


def _forked(overrides: Command, output: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with output.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        sys.exit(_main(overrides))


def _main(overrides: Command) -> int:
    with patch.object(sys, "argv", [str(TRAIN), *overrides]), patch.dict(os.environ):
        os.environ.pop("HYDRA_FULL_ERROR", None)
        gc.freeze()  # training collects garbage first: a third of a second in all that pytest holds
        try:
            runpy.run_path(str(TRAIN), run_name="__main__")
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            gc.unfreeze()
    return 0


# ---- run folders ---------------------------------------------------------------------------------

CLOCK = {"time_s", "tokens_per_s", "memory_gb", "mfu"}  # figures that measure time and the machine


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the figures that measure time."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in metrics(run) if "train/loss" in line]


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step_*[0-9]"))  # not what is being written


def determined(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a GPT-2 that rounding does not decide: all but the biases of keys.

    A bias of keys adds one number to all logits of a query, which the softmax takes away again: its
    gradient is zero in exact arithmetic, and rounding is all there is to it (1e-7 of the gradient
    of the queries' biases). Rules that divide by a gradient's own size, or take its sign, make full
    steps of that, whose direction another order of summation turns around. No loss feels it."""
    return {
        name: torch.cat(w.chunk(3)[::2]) if name.endswith("attn.c_attn.bias") else w
        for name, w in weights.items()
    }


def tensors(run: Path) -> bytes:
    """The last checkpoint's weights and optimizer state, every bit."""
    return (checkpoints(run)[-1] / "tensors.safetensors").read_bytes()


def assert_same_run(one: Path, other: Path) -> None:
    """Final weights, optimizer state and metrics are equal to the last bit, times aside."""
    assert metrics(one) == metrics(other)
    assert checkpoints(one)[-1].name == checkpoints(other)[-1].name
    assert tensors(one) == tensors(other)
