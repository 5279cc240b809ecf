"""Processes agree, and end together with the reason on top."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from system import module
from workers import run

from runtime.device import Device, best_device
from runtime.errors import ConfigError
from runtime.guard import Guard, is_consequence
from runtime.launch import common
from runtime.processes import DecidedElsewhere, Processes, check_gpus, join
from scripts.compose import compose_config

JOB = Path(__file__).with_name("job.py")


def torchrun(what: str, folder: Path, *options: str, size: int = 2) -> tuple[int, str]:
    """Exit code, and what was printed on the terminal."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={size}", *options, str(JOB), what, str(folder)]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout


# ---- one process ---------------------------------------------------------------------------------


def test_one_process_initializes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    all_ = join()
    assert (all_.rank, all_.size, all_.control) == (0, 1, None)
    assert not dist.is_initialized()
    assert all_.decide(lambda: 3) == 3
    assert all_.gather("x") == ["x"]
    assert all_.any(True) and not all_.any(False)
    all_.barrier()
    all_.leave()


def test_one_process_raises_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Guard(0, 1, tmp_path / "errors", 1.0):
        raise KeyError("x")
    assert not (tmp_path / "errors").exists()


# ---- many ----------------------------------------------------------------------------------------


def decide_things(folder: str) -> tuple[int, str, list[int], bool]:
    rank, size = dist.get_rank(), dist.get_world_size()
    store = dist.FileStore(f"{folder}/store", size)
    all_ = Processes(rank, size, rank, 30.0, dist.group.WORLD, store)
    first = all_.decide(lambda: rank + 10)

    def refuse() -> None:
        raise ValueError("no")

    try:
        all_.decide(refuse)
        said = ""
    except (ValueError, DecidedElsewhere) as error:
        said = f"{type(error).__name__}: {error}"
    return first, said, all_.gather(rank), all_.any(rank == size - 1)


def test_rank_0_decides(tmp_path: Path) -> None:
    results = run(4, decide_things, str(tmp_path))
    assert [r[0] for r in results] == [10] * 4
    assert results[0][1] == "ValueError: no"
    assert {r[1] for r in results[1:]} == {"DecidedElsewhere: rank 0: ValueError: no"}
    assert [r[2] for r in results] == [[0, 1, 2, 3]] * 4
    assert all(r[3] for r in results)


def disagree(settings: dict[int, list[str]]) -> str:
    rank, size = dist.get_rank(), dist.get_world_size()
    all_ = Processes(rank, size, rank, 30.0, dist.group.WORLD)
    try:
        all_.agree(common(compose_config(settings.get(rank, []))), "settings")
        return ""
    except ConfigError as error:
        return str(error)


def test_one_configuration_for_all() -> None:
    """What shapes the run is the same everywhere; where its files lie is each machine's own."""
    places = ["data.dir=/b", "paths.runs=/c", "train.threads=3", "run.dir=/d", "data.cache=/e"]
    assert run(2, disagree, {1: places}) == [""] * 2
    for setting in ("seed=2", "train.steps=6", "train.micro_batch=2", "parallel.divide=none"):
        said = set(run(2, disagree, {1: [setting, *places]}))
        key, _, value = setting.partition("=")
        assert len(said) == 1, "ranks say different things"
        assert f"rank 1 on {socket.gethostname()} has other settings than rank 0" in (*said,)[0]
        assert f": {key} is {value} against " in (*said,)[0]


def test_a_gpu_for_each_process() -> None:
    check_gpus([("a", 0, 2), ("a", 1, 2), ("b", 0, 2), ("b", 1, 2)])
    check_gpus([("a", 0, 0), ("a", 1, 0)])
    check_gpus([("a", 0, 1), ("a", 0, 1)])  # one is shown to each, as its only one
    with pytest.raises(
        ConfigError, match="started 3 processes on b, which has 2 GPUs: use --nproc"
    ):
        check_gpus([("a", 0, 4), ("b", 0, 2), ("b", 1, 2), ("b", 2, 2)])
    with pytest.raises(ConfigError, match="b has no GPU that torch can use, a has"):
        check_gpus([("a", 0, 1), ("b", 0, 0)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_many_processes_without_cuda_use_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    train = compose_config([]).train
    assert best_device() == "mps"
    assert Device.choose(train, Processes(0, 2)).device.type == "cpu"


def test_consequences_are_told_from_reasons() -> None:
    assert is_consequence(RuntimeError("[gloo/...] Connection closed by peer [127.0.0.1]:1234"))
    assert is_consequence(RuntimeError("Timed out waiting 5000ms for recv operation to complete"))
    assert is_consequence(RuntimeError("Ranks 2 failed to pass monitoredBarrier in 3000 ms"))
    assert not is_consequence(RuntimeError("CUDA out of memory"))
    assert not is_consequence(ValueError("connection"))


# ---- under torchrun ------------------------------------------------------------------------------


@pytest.mark.slow
def test_death_hang_and_error(tmp_path: Path) -> None:
    """One job that torchrun starts three times: rank 1 dies, then hangs, then fails."""
    code, out = torchrun("die,hang,fail", tmp_path, "--max-restarts=2")
    assert code == 1
    died, hung, failed = (tmp_path / f"run_{attempt}" for attempt in range(3))  # one for all ranks
    assert (died / "began").exists()

    assert "no progress (parallel.timeout=12)" in out
    assert "in hang" in out  # the function of the stack that hangs
    assert json.loads((hung / "errors/rank_1.json").read_text())["kind"] == "hang"
    began, ended = (path.stat().st_mtime for path in (hung / "began", hung / "errors/rank_1.json"))
    assert ended - began < 12 + 10

    last = out[out.index("no progress") :]
    assert "ZeroDivisionError: the true reason\n" in last
    assert last.index("rank 1 on", last.index("in hang")) < last.index("ChildFailedError")
    assert json.loads((failed / "errors/rank_1.json").read_text())["step"] == 3

    assert "hello from 0 of 2" in out and "hello from 1" not in out  # but in the log of its run:
    assert (failed / "logs/rank_1.log").read_text().startswith("hello from 1 of 2\n")


@pytest.mark.slow
def test_what_rank_0_cannot_decide_is_told_once(tmp_path: Path) -> None:
    outcome = module("job", "undecided", str(tmp_path), folder=tmp_path, ranks=2)
    assert outcome.code == 1
    assert outcome.err.count("error: a mistake that all processes find") == 1
    assert "job.py" not in outcome.err, "a process has shown where it failed"
    assert "ChildFailedError" in outcome.err
