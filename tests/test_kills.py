"""SIGKILL of one process of a run, or of all, at random moments: what is left on the disk is whole,
and the run goes on from it to the last bit of an undisturbed one.

    pytest tests/test_kills.py -m slow -s --kills 20        so many under DDP, and under FSDP2

Checkpoints are written in the background after every step, so that many kills fall into one.
"""

from __future__ import annotations

import random
import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from system import Command, checkpoints, losses, start, until
from test_parallel_runs import run_on

from runtime import checkpoint
from runtime.checkpoint import is_whole

EVERY_STEP = ("train.checkpoint_every=1", "train.eval_every=10", "run.name=test")
KEEP_ALL = "train.keep_checkpoints=100000"
STEPS_PER_KILL = 6  # that a life makes at most between its first step and its end


def start_ranks(command: Command, folder: Path) -> list[BaseProcess]:
    """Two ranks as torchrun would start them, in forks that take a tenth of a second."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = str(held.getsockname()[1])
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    run = (*command, f"run.dir={folder}")
    return [
        start(*run, output=folder.with_name(f"rank_{r}.out"), RANK=r, LOCAL_RANK=r, **job)
        for r in ("0", "1")
    ]


def said(folder: Path) -> list[str]:
    """What the run has said so far; each start that comes to training says "run <folder> ..."."""
    log = folder / "log.txt"
    return log.read_text().splitlines() if log.exists() else []


def starts(folder: Path) -> int:
    return sum(line.startswith("run ") for line in said(folder))


def whole(folder: Path) -> list[Path]:
    return [path for path in checkpoints(folder) if path.suffix != ".tmp"]


def lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def assert_equal_checkpoints(found: Path, right: Path) -> None:
    assert is_whole(found), found
    (one, _), (other, _) = checkpoint.load(found), checkpoint.load(right)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one), found


def kill(command: Command, folder: Path, victims: str, chance: random.Random) -> None:
    """Start the run and end it by killing ``victims``: "one" of its processes, any time after its
    first step, or "all" of them, any time at all."""
    before, started = lines(folder), starts(folder)
    ranks = start_ranks(command, folder)
    if victims == "all" and chance.random() < 0.3:
        time.sleep(chance.uniform(0, 2))
    else:
        more = chance.randrange(STEPS_PER_KILL)
        until(lambda: starts(folder) > started, ranks[0].is_alive)
        start_at = lines(folder)  # what is beyond the checkpoint has been cut off
        assert start_at <= before
        until(lambda: lines(folder) > start_at + more, ranks[0].is_alive)
        time.sleep(chance.uniform(0, 0.2))
    for process in ranks if victims == "all" else [chance.choice(ranks)]:
        process.kill()
    for process in ranks:  # whoever is left ends by itself
        process.join(20)
        assert process.exitcode not in (None, 0), "the run ended before the kill, or never"


def resumed(folder: Path, before: int, newest: list[Path]) -> int:
    """How often what the run has said since its first ``before`` words is that it goes on: from
    its newest checkpoint, which was whole."""
    told = said(folder)[before:]
    assert not any("not whole" in line for line in told)
    on = [line.rpartition(": ")[2] for line in told if "continuing at step" in line]
    assert on in ([], [f"continuing at step {int(path.name[5:])}" for path in newest])
    return len(on)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_sigkill_of_one_or_all_changes_no_bit(
    tiny: Command, tmp_path: Path, strategy: str, pytestconfig: pytest.Config
) -> None:
    kills: int = pytestconfig.getoption("kills")
    steps = f"train.steps={(STEPS_PER_KILL + 6) * kills}"
    command = (*tiny, *EVERY_STEP, steps, "optim=muon", "parallel.timeout=20")
    right = run_on((strategy, 2), *command, KEEP_ALL, folder=tmp_path / "whole")
    command, folder = (*command, f"parallel={strategy}"), tmp_path / "killed"
    chance, inside, again = random.Random(1), {"one": 0, "all": 0}, 0
    for i in range(kills):
        newest, before = whole(folder)[-1:], len(said(folder))
        victims = ("one", "all")[i % 2]
        kill(command, folder, victims, chance)
        inside[victims] += any(folder.glob("checkpoints/step_*.tmp"))
        again += resumed(folder, before, newest)
        for path in whole(folder):
            assert_equal_checkpoints(path, right / "checkpoints" / path.name)
    newest, before = whole(folder)[-1:], len(said(folder))
    for process in (ranks := start_ranks(command, folder)):
        process.join(300)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert resumed(folder, before, newest) == 1
    print(f"{strategy}: {kills} kills, inside a write {inside}, resumed {again + 1} times")
    assert losses(folder) == losses(right)
    assert_equal_checkpoints(checkpoints(folder)[-1], checkpoints(right)[-1])
    assert not list(folder.glob("**/*.tmp"))
