"""A run of several processes that is killed, stopped or told nonsense, with the real commands."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from system import TRAIN, Command, checkpoints, losses, start, until
from test_parallel_runs import distance, run_on, weights

from runtime.checkpoint import is_whole

LONG = ("train.steps=150", "train.eval_every=50", "train.checkpoint_every=5", "parallel.timeout=20")
KILLS = 4  # at random moments
slow = pytest.mark.slow
Popen = subprocess.Popen[str]


def torchrun(*overrides: str, options: Command = ("--standalone",), size: int = 2) -> Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    return subprocess.Popen(
        [*launcher, f"--nproc_per_node={size}", *options, str(TRAIN), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )


def workers_of(launcher: Popen) -> list[int]:
    """Process ids of a torchrun's workers, by rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(pid) for pid in children]


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
    return port


def lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def assert_equal_runs(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    x, y = weights(one), weights(other)
    assert x.keys() == y.keys()
    assert all(torch.equal(x[name], y[name]) for name in x)
    assert not list(one.glob("**/*.tmp"))


@slow
def test_a_mistake_is_told_once(tiny: Command) -> None:
    process = torchrun(*tiny, "parallel=ddp", "+optim.groups.x.match=[nosuch]")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert len(re.findall(r"^.*error: ", err, re.MULTILINE)) == 1, err
    assert "error: optimizer group pattern 'nosuch' matches no parameter" in err
    assert not list(Path().glob("runs/*"))


@slow
def test_a_sweep_under_torchrun(tiny: Command) -> None:
    """All ranks go through the trials in step."""
    short = ("train.steps=2", "train.eval_every=0", "hydra.sweep.dir=sweep")
    process = torchrun("-m", "seed=1,2", *tiny, *short, "parallel=ddp")
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    results = [json.loads(line) for line in out.splitlines() if line.startswith('{"run_dir"')]
    assert [(r["run_dir"], r["step"]) for r in results] == [("sweep/0", 2), ("sweep/1", 2)]
    assert all(Path(f"sweep/{trial}/logs/rank_1.log").exists() for trial in (0, 1))


# ---- killed --------------------------------------------------------------------------------------


@slow
def test_a_killed_rank_ends_all_and_torchrun_starts_them_again(
    tiny: Command, tmp_path: Path
) -> None:
    command = (*tiny, *LONG, "optim=muon", "parallel=fsdp", "run.name=test")
    folder = tmp_path / "killed"
    process = torchrun(*command, f"run.dir={folder}", options=("--standalone", "--max-restarts=2"))
    until(lambda: lines(folder) > 20, lambda: process.poll() is None)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert re.search(r"continuing at step [1-9]\d*", out)
    assert json.loads(out.splitlines()[-1])["step"] == 150
    assert_equal_runs(folder, run_on(("fsdp", 2), *command, folder=tmp_path / "whole"))


def start_ranks(command: Command, folder: Path) -> list[BaseProcess]:
    """Two ranks as torchrun would start them, in forks that take a tenth of a second."""
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        start(*command, output=folder.with_name(f"rank_{r}.out"), RANK=r, LOCAL_RANK=r, **job)
        for r in ("0", "1")
    ]


@slow
def test_sigkill_of_one_rank_or_all_changes_no_bit(tiny: Command, tmp_path: Path) -> None:
    """Checkpoints are written in the background after every step; so many kills fall into them."""
    steps = ("train.steps=60", "train.eval_every=30", "train.checkpoint_every=1", "run.name=test")
    command = (*tiny, *steps, "optim=muon", "parallel=fsdp", "parallel.timeout=20")
    folder, chance = tmp_path / "killed", random.Random(1)
    inside = 0
    for _ in range(KILLS):
        before, ranks = lines(folder), start_ranks((*command, f"run.dir={folder}"), folder)
        until(lambda n=before: lines(folder) > n + 1, ranks[0].is_alive)  # type: ignore[misc]
        time.sleep(chance.uniform(0, 0.5))
        for victim in chance.choice([ranks[:1], ranks[1:], ranks]):
            victim.kill()
        for process in ranks:  # whoever is left ends by itself
            process.join(20)
            assert process.exitcode not in (None, 0), "the run ended before the kill"
        inside += any(folder.glob("checkpoints/*.tmp"))
        for path in checkpoints(folder):
            assert path.suffix == ".tmp" or is_whole(path), path
    print(f"{KILLS} kills, {inside} inside a checkpoint write")  # on failure
    for process in (ranks := start_ranks((*command, f"run.dir={folder}"), folder)):
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    last = "train.checkpoint_every=60"
    assert_equal_runs(folder, run_on(("fsdp", 2), *command, last, folder=tmp_path / "whole"))


@slow
def test_a_lost_machine(tiny: Command, tmp_path: Path) -> None:
    """Two torchruns on two addresses, one to two of which make the job: the second is killed with
    its process, the first goes on alone from the last checkpoint, and draws the same curve."""
    # 60 steps, for rounding grows: 2e-6 of the loss there (3e-4 of a weight), 2e-3 at step 150
    short = ("train.steps=60", "train.eval_every=0", "train.checkpoint_every=5")
    command = (*tiny, *short, "parallel=ddp", "parallel.timeout=20", "run.name=test")
    folder, endpoint = tmp_path / "elastic", f"127.0.0.1:{free_port()}"
    fast = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=2"

    def machine(number: int) -> Popen:
        options = ("--nnodes=1:2", "--rdzv-backend=c10d", "--max-restarts=3", "--rdzv-id=test")
        where = (f"--rdzv-endpoint={endpoint}", f"--local-addr=127.0.0.{number}")
        conf = f"--rdzv-conf=is_host={int(number == 1)},{fast}"
        run = (*command, f"run.dir={folder}")
        return torchrun(*run, options=(*options, *where, conf), size=1)

    first, second = machine(1), machine(2)
    until(lambda: lines(folder) > 10, lambda: first.poll() is None)
    for pid in (second.pid, *workers_of(second)):
        os.kill(pid, signal.SIGKILL)
    second.communicate()
    out, err = first.communicate(timeout=120)
    assert first.returncode == 0, err
    assert "= 2 processes x" in out
    assert re.search(r"continuing at step [1-9]\d*", out)
    whole = run_on(("none", 1), *command, folder=tmp_path / "whole")
    assert distance(folder, whole)[0] < 1e-5


@slow
def test_a_signal_to_torchrun_stops_all_after_a_checkpoint(tiny: Command, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    process = torchrun(*tiny, *LONG, "parallel=ddp", f"run.dir={folder}", "train.steps=100000")
    until(lambda: lines(folder) > 20, lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["stopped_by"] in ("SIGTERM", "another process")
    assert checkpoints(folder)[-1].name == f"step_{summary['step']:08d}"
