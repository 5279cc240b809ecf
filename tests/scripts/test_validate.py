"""A mistake in the settings is met once, before torchrun starts and restarts its processes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from forks import ROOT
from system import module

STUB = """#!/usr/bin/env bash
echo "$@" >> {calls}
[[ "$2" == scripts.validate ]] && exit {code}
echo "shutdown timeout $TORCH_ELASTIC_SHUTDOWN_TIMEOUT" >> {calls}
"""
SCRIPTS = {
    "ddp.sh": ("1 3 parallel=ddp", "--nproc_per_node=3 --max-restarts=3 train.py parallel=ddp"),
    "fsdp.sh": ("1 3 parallel=fsdp", "--nproc_per_node=3 --max-restarts=3 train.py parallel=fsdp"),
    "nodes.sh": ("2:4 3", "--nnodes=2:4 --nproc_per_node=3 --max-restarts=10"),
}


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    good = ("1", "2", "parallel=ddp")
    for words, expected in {
        good: None,
        (*good, "seed=1,2", "-m"): None,
        ("2:4", "2", "parallel=hsdp", "train.global_batch=48"): None,
        ("1", "2", "train.steps=4"): "parallel=none, but torchrun started 2 processes",
        (*good, "train.stpes=3"): "unknown configuration key train.stpes: did you mean train.steps",
        (*good, "--train.steps=3"): "unknown option --train.steps=3",
        ("2:4", "2", "parallel=ddp"): "on 3 of 2:4 machines: train.global_batch=16 does not divide",
    }.items():
        outcome = module("scripts.validate", *words, folder=tmp_path)
        if expected is None:
            assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
        else:
            assert outcome.error.startswith(expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_look_first(tmp_path: Path, script: str) -> None:
    """With an interpreter that only writes down what it is asked to run."""
    looked, started = SCRIPTS[script]
    for code in (1, 0):
        python, calls = tmp_path / "python", tmp_path / f"calls_{code}"
        python.write_text(STUB.format(calls=calls, code=code))
        python.chmod(0o755)
        own = {"PYTHON": str(python), "PROCESSES": "3", "HEAD": "localhost", "NODES": "2:4"}
        command = ["bash", str(ROOT / "scripts" / script), "train.steps=7"]
        assert subprocess.run(command, env={**os.environ, **own}).returncode == code
        first, *more = calls.read_text().splitlines()
        assert first == f"-m scripts.validate {looked} train.steps=7"
        if code:
            assert not more, "torchrun is started all the same"
        else:
            assert started in more[0] and more[0].endswith(" train.steps=7")
            assert more[1] == "shutdown timeout 240"
