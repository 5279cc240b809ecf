"""A run of several processes that is killed, stopped or told nonsense, with the real commands."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from system import TRAIN, Command, checkpoints, here, losses, start, start_agent, until
from test_parallel_runs import run_on

from runtime import checkpoint

C10D = ("--rdzv-backend=c10d",)
slow = pytest.mark.slow
Popen = subprocess.Popen[str]


def torchrun(*overrides: str) -> Popen:
    """The real thing: each process imports torch, which takes seconds."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*launcher, "--nproc_per_node=2", str(TRAIN), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def workers_of(agent: BaseProcess) -> list[int]:
    """Process ids of an agent's workers, by rank."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return [int(pid) for pid in children]


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
    return port


def lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def ended_differently(*of_each: Command, folder: Path) -> str:
    """What rank 0 says where ranks are started with settings of their own, as by hand they can."""
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    job["MASTER_PORT"] = str(free_port())
    ranks = [
        start(*own, output=folder / f"out_{rank}", RANK=str(rank), LOCAL_RANK=str(rank), **job)
        for rank, own in enumerate(of_each)
    ]
    ranks[0].join(60)
    for process in ranks:  # rank 1 leaves rank 0 time to speak
        process.kill()
        process.join()
    assert ranks[0].exitcode == 1
    out = (folder / "out_0").read_text()
    assert out.count("error: ") == 1 and out.startswith("error: rank 1 on "), out
    return out


def test_two_ranks_with_different_settings_or_texts(tiny: Command, tmp_path: Path) -> None:
    """Each rank reads its own settings and its own files; one run is made of the same."""
    command = (*tiny, "parallel=ddp")
    out = ended_differently(command, (*command, "optim.lr=0.25"), folder=tmp_path)
    assert "has other settings than rank 0 on " in out and "optim.lr is 0.25 against " in out
    Path("other.txt").write_text("words\n" * 3000)
    other = ("data.files=[other.txt]", "data.dir=other")
    out = ended_differently(command, (*command, *other), folder=tmp_path)
    assert "has other tokens (data.files, data.dir) than rank 0" in out
    assert not list(Path("runs").glob("*"))


def test_a_strategy_without_torchrun(tiny: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process trains alone, and says that it does."""
    short = ("train.steps=1", "train.eval_every=0", "train.checkpoint_every=0")
    note = "this is one process: torchrun starts many (docs/distributed.md)"
    assert note not in here(*tiny, *short).out
    out = here(*tiny, *short, "parallel=ddp").out
    assert note in out and "Slurm" not in out
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert "they are 8 separate runs" in here(*tiny, *short, "parallel=fsdp").out


@slow
def test_a_sweep_up_to_a_mistake(tiny: Command) -> None:
    """All ranks go through the trials in step; what is wrong with the third is told once."""
    short = ("train.steps=2", "train.eval_every=0", "hydra.sweep.dir=sweep")
    process = torchrun("-m", "model.vocab_size=null,300,10", *tiny, *short, "parallel=ddp")
    out, err = process.communicate(timeout=120)
    results = [json.loads(line) for line in out.splitlines() if line.startswith('{"run_dir"')]
    assert [(r["run_dir"], r["step"]) for r in results] == [("sweep/0", 2), ("sweep/1", 2)]
    assert all(Path(f"sweep/{trial}/logs/rank_1.log").exists() for trial in (0, 1))
    assert process.returncode == 1
    assert len(re.findall(r"^.*error: ", err, re.MULTILINE)) == 1, err
    assert "but the model's vocabulary is 10: set model.vocab_size to 257 or more" in err
    assert not Path("sweep/2/config.yaml").exists()


@slow
def test_a_killed_rank_and_then_a_signal(tiny: Command, tmp_path: Path) -> None:
    """The death of a rank ends the others, and torchrun starts all again; SIGTERM to torchrun stops
    them after the same step. What they have then is what an undisturbed run has there."""
    every = ("train.checkpoint_every=5", "train.eval_every=0", "schedule.decay_steps=1000")
    command = (*tiny, *every, "optim=muon", "parallel=fsdp", "parallel.timeout=20", "run.name=test")
    folder = tmp_path / "killed"
    process = start_agent(
        *(*command, "train.steps=1000", f"run.dir={folder}"),
        options=("--nproc_per_node=2", *C10D, "--rdzv-endpoint=localhost:0", "--max-restarts=2"),
        output=tmp_path / "out",
    )
    until(lambda: lines(folder) > 12, process.is_alive)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    log = folder / "log.txt"
    until(lambda: "continuing at step" in log.read_text(), process.is_alive)
    again = lines(folder)
    until(lambda: lines(folder) > again + 7, process.is_alive)
    workers = workers_of(process)
    process.terminate()
    until((folder / "summary.json").exists, process.is_alive)
    for pid in (*workers, process.pid):  # forked workers would wait 30 s for their agent's good-bye
        os.kill(pid or 0, signal.SIGKILL)
    process.join()
    assert re.search(r"continuing at step [1-9]\d*", log.read_text())
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["stopped_by"] in ("SIGTERM", "another process")
    assert checkpoints(folder)[-1].name == f"step_{summary['step']:08d}"
    steps = f"train.steps={summary['step']}"
    right = run_on(("fsdp", 2), *command, steps, folder=tmp_path / "whole")
    assert losses(folder) == losses(right)
    (one, _), (other, _) = (checkpoint.load(checkpoints(run)[-1]) for run in (folder, right))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@slow
def test_a_lost_machine_that_returns(tiny: Command, tmp_path: Path) -> None:
    """Two torchruns on two addresses, one to two of which make the job. The second is killed with
    its process, the first goes on alone from the last checkpoint; the second returns, and both go
    on from the step where the first was. They draw the curve of one process: the bits of one
    machine with two processes as long as there were two."""
    # a low lr, so that rounding does not grow: at the usual one it is 2e-3 of the loss at step 150
    low = ("optim.lr=1e-6", "train.checkpoint_every=10", "train.eval_every=0")
    command = (*tiny, *low, "schedule.decay_steps=5000", "parallel=ddp", "run.name=test")
    folder, endpoint = tmp_path / "elastic", f"127.0.0.1:{free_port()}"
    # two silent seconds are no death yet: the agent leaves out every other sign of life
    fast = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=4"

    def machine(number: int) -> BaseProcess:
        options = ("--nnodes=1:2", *C10D, "--max-restarts=3", "--rdzv-id=test")
        where = (f"--rdzv-endpoint={endpoint}", f"--local-addr=127.0.0.{number}")
        conf = f"--rdzv-conf=is_host={int(number == 1)},{fast}"
        return start_agent(
            *(*command, "train.steps=5000", "parallel.timeout=20", f"run.dir={folder}"),
            options=("--nproc_per_node=1", *options, *where, conf),
            output=tmp_path / f"out_{number}",
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )

    def starts() -> list[str]:
        log = folder / "log.txt"
        cuts = re.findall(r" tokens = (2 processes)?", log.read_text()) if log.exists() else []
        return [cut or "alone" for cut in cuts]

    first, second = machine(1), machine(2)
    until(lambda: lines(folder) > 10 and len(checkpoints(folder)) > 1, first.is_alive)
    for pid in (*workers_of(second), second.pid):
        os.kill(pid or 0, signal.SIGKILL)
    second.join()
    until(lambda: starts() == ["2 processes", "alone"], first.is_alive)
    (last,) = workers_of(first)
    second = machine(2)
    until(lambda: "stopped by SIGTERM" in (folder / "log.txt").read_text(), first.is_alive)
    os.kill(last, signal.SIGKILL)  # a forked worker would wait 30 s for its agent's good-bye
    until(lambda: len(starts()) == 3, first.is_alive)
    again = lines(folder)
    until(lambda: lines(folder) > again + 10, first.is_alive)
    for agent in (second, first):
        for pid in (*workers_of(agent), agent.pid):
            os.kill(pid or 0, signal.SIGKILL)
        agent.join()
    assert starts() == ["2 processes", "alone", "2 processes"]
    log = (folder / "log.txt").read_text()
    first_end, second_end = re.findall(r"continuing at step (\d+)", log)
    assert 0 < int(first_end) < int(second_end)
    found = losses(folder)
    command = (*command, f"train.steps={len(found)}")
    together = losses(run_on(("ddp", 2), *command, folder=tmp_path / "together"))
    assert found[: int(first_end)] == together[: int(first_end)]
    alone = losses(run_on(("none", 1), *command, folder=tmp_path / "alone"))
    assert found == pytest.approx(alone, rel=1e-5)
