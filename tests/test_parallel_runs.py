"""The same run on any number of processes: losses, weights, resumption, failure.

Most of it goes through train.py's own `train` on processes that stay (workers.py); what concerns
torchrun is run by torchrun.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from system import ROOT, TRAIN, Command, checkpoints, losses, metrics, until
from torch import Tensor
from workers import run

import train
from optim import list_optimizers
from runtime import checkpoint
from runtime.config import Config, load
from runtime.guard import Guard
from runtime.processes import Processes
from runtime.run import open_for_all

Layout = tuple[str, int]  # strategy, processes
ONE: Layout = ("none", 1)

# Orthogonalization in float32: in bfloat16 its rounding would hide everything else.
FP32 = dict.fromkeys(
    ("muon", "normuon", "moonlight", "mars_m", "mars_shampoo"), ("optim.ns_dtype=float32",)
)
EXACT = "exact_mars_adamw"
RULES = {name: (f"optim={name}", *FP32.get(name, ())) for name in list_optimizers()} | {
    EXACT: ("optim=mars_adamw", "optim.mars.exact=true"),
    "sophia_g": ("optim=sophia_g", "optim.tokens=256"),
}
FOUR = [(("ddp", 4), 1), (("fsdp", 4), 2)]  # layouts and micro-batches that the rules share
STEPS = ("train.steps=20", "train.global_batch=8", "train.eval_every=10", "run.name=test")
slow = pytest.mark.slow
_jobs = itertools.count()


def configuration(overrides: Command) -> Config:
    groups_first = sorted(overrides, key=lambda o: "." in o.split("=")[0])
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return load(compose("train", overrides=groups_first))


def job(overrides: Command) -> dict[str, Any]:
    """Train on this process among those of its pool, or on it alone; returns the summary."""
    import torch.distributed as dist

    processes = Processes()
    if dist.is_initialized():
        store = dist.PrefixStore(f"job {next(_jobs)}", dist.distributed_c10d._get_default_store())
        place = (dist.get_rank(), dist.get_world_size())
        processes = Processes(*place, 0, 60.0, dist.group.WORLD, store)
    config = configuration(overrides)
    opened = open_for_all(config, processes)
    guard = Guard(0, 1, opened.dir / "errors", 60.0)
    with contextlib.redirect_stdout(io.StringIO()), guard:
        result = train.train(config, opened, processes, guard)
    opened.close()
    processes.barrier()
    return result


def run_on(layout: Layout, *overrides: str, folder: Path) -> Path:
    """Train in ``folder`` (resolved: the pool has a current folder of its own)."""
    strategy, size = layout
    command = (*overrides, f"parallel={strategy}", f"run.dir={folder.resolve()}")
    job(command) if layout == ONE else run(size, job, command)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    """The last checkpoint's weights and optimizer state, whole."""
    return checkpoint.load(checkpoints(folder)[-1])[0]


def distance(one: Path, other: Path) -> tuple[float, float]:
    """Largest relative difference of losses, and absolute one of final weights."""
    a, b = torch.tensor(losses(one)), torch.tensor(losses(other))
    assert a.shape == b.shape
    x, y = weights(one), weights(other)
    assert x.keys() == y.keys()
    apart = max(float((x[n] - y[n]).abs().max()) for n in x if n.startswith("model."))
    return float((a / b - 1).abs().max()), apart


def perturbed(command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One process whose gradients are changed as rounding does: by 1e-7 of the entry, and of
    the root mean square of all, for entries that are zero but for rounding (key biases)."""
    plain, noise = train.backward, torch.Generator().manual_seed(0)

    def noisy(config: Config, step: int, model: Any, *rest: Any, **options: Any) -> Tensor:
        result = plain(config, step, model, *rest, **options)
        grads = [p.grad for p in model.parameters()]
        size = torch.cat([g.flatten() for g in grads]).square().mean().sqrt()
        for g in grads:
            g += 1e-7 * (g.abs() + size) * torch.randn(g.shape, generator=noise)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(train, "backward", noisy)
        return run_on(ONE, *command, folder=folder)


def assert_same_curve(
    command: Command, layout: Layout, how: Command, folder: Path, patch: pytest.MonkeyPatch
) -> None:
    """To 1e-5, or where the rule itself amplifies rounding (signs, eigenbases) to five times what
    a change of the gradients by 1e-7 does to one process."""
    alone = run_on(ONE, *command, folder=folder / "one")
    assert_near(run_on(layout, *command, *how, folder=folder / "many"), alone, command, patch)


def assert_near(many: Path, alone: Path, command: Command, patch: pytest.MonkeyPatch) -> None:
    loss, weight = distance(many, alone)
    if loss > 1e-5 or weight > 1e-5:
        noise = distance(perturbed(command, alone.with_name("noise"), patch), alone)
        assert loss <= max(1e-5, 5 * noise[0]), f"{loss}; noise {noise}"
        assert weight <= max(1e-5, 5 * noise[1]), f"{weight}; noise {noise}"


@pytest.mark.parametrize(
    ("rule", "layout", "micro_batch"),
    [
        ("adamw", ("ddp", 2), 2),
        ("muon", ("ddp", 2), 4),
        (EXACT, ("fsdp", 2), 2),
        ("soap", ("fsdp", 2), 4),
    ],
)
def test_the_curve_does_not_depend_on_the_number_of_processes(
    tiny: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rule: str,
    layout: Layout,
    micro_batch: int,
) -> None:
    how = (f"train.micro_batch={micro_batch}",)
    assert_same_curve((*tiny, *STEPS, *RULES[rule]), layout, how, tmp_path, monkeypatch)


@slow
@pytest.mark.parametrize(
    ("rule", "layout", "micro_batch"),
    [
        pytest.param(rule, *FOUR[i % 2], id=f"{rule}-{FOUR[i % 2][0][0]}")
        for i, rule in enumerate(RULES)
    ],
)
def test_the_curve_of_every_optimizer(
    tiny: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rule: str,
    layout: Layout,
    micro_batch: int,
) -> None:
    how = (f"train.micro_batch={micro_batch}",)
    assert_same_curve((*tiny, *STEPS, *RULES[rule]), layout, how, tmp_path, monkeypatch)


@pytest.mark.parametrize("layout", [("ddp", 2), ("fsdp", 2)], ids=["ddp", "fsdp"])
def test_dropout_is_that_of_the_micro_batch(tiny: Command, tmp_path: Path, layout: Layout) -> None:
    """Random numbers belong to (seed, step, place in the global batch), not to a process."""
    command = (*tiny, *STEPS, "model.dropout=0.3", "train.micro_batch=2")
    alone = run_on(ONE, *command, folder=tmp_path / "one")
    many = run_on(layout, *command, folder=tmp_path / "many")
    assert max(distance(many, alone)) < 1e-5


def test_the_mars_codes_sum_is_that_of_a_process(tiny: Command, tmp_path: Path) -> None:
    """Summed micro-batches: as many as sum_factor says, on any number of processes."""
    summed = ("train.accumulation=sum", "train.sum_factor=4", "train.micro_batch=2")
    command = (*tiny, *STEPS, *summed, "optim=mars_adamw")
    alone = run_on(ONE, *command, folder=tmp_path / "one")
    many = run_on(("ddp", 2), *command, folder=tmp_path / "many")
    assert max(distance(many, alone)) < 1e-5
    norms = [[line["grad_norm"] for line in metrics(run)[1:]] for run in (alone, many)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


# ---- resumption ----------------------------------------------------------------------------------

SHORT: list[Layout] = [ONE, ("ddp", 2), ("fsdp", 2), ONE]
LONG_CHAIN: list[Layout] = [ONE, ("ddp", 4), ("ddp", 2), ("fsdp", 2), ("fsdp", 4), ONE]


def chain(command: Command, layouts: list[Layout], folder: Path) -> Path:
    """Two steps on each layout, from the checkpoint of the one before."""
    for i, layout in enumerate(layouts):
        more = () if i == 0 else (f"train.resume={folder}",)
        steps = f"train.steps={2 * (i + 1)}"
        run_on(layout, *command, *more, steps, "train.eval_every=0", folder=folder)
    return folder


@pytest.mark.parametrize(
    ("rule", "layouts"),
    [
        pytest.param("muon", SHORT, id="muon"),
        *(pytest.param(r, LONG_CHAIN, id=r, marks=slow) for r in ("adamw", "came", "soap", EXACT)),
    ],
)
def test_a_run_goes_on_in_another_layout(
    tiny: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rule: str,
    layouts: list[Layout],
) -> None:
    total = 2 * len(layouts)
    command = (*tiny, *STEPS, *RULES[rule], f"schedule.decay_steps={total}")
    whole = (*command, f"train.steps={total}", "train.eval_every=0")
    alone = run_on(ONE, *whole, folder=tmp_path / "one")
    assert_near(chain(command, layouts, tmp_path / "chain"), alone, whole, monkeypatch)


@pytest.mark.parametrize(
    ("rule", "strategy"), [(EXACT, "ddp"), ("shampoo", "ddp"), ("muon", "fsdp"), ("came", "fsdp")]
)
def test_the_same_layout_goes_on_bit_for_bit(
    tiny: Command, tmp_path: Path, rule: str, strategy: str
) -> None:
    layout = (strategy, 2)
    command = (*tiny, *STEPS, *RULES[rule], "schedule.decay_steps=4", "model.dropout=0.1")
    whole = run_on(layout, *command, "train.steps=4", "train.eval_every=0", folder=tmp_path / "one")
    parts = chain(command, [layout, layout], tmp_path / "chain")
    assert losses(parts) == losses(whole)
    one, other = weights(parts), weights(whole)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- torchrun ------------------------------------------------------------------------------------


def torchrun(*overrides: str, options: Command = (), size: int = 2) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*launcher, f"--nproc_per_node={size}", *options, str(TRAIN), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )


@slow
@pytest.mark.parametrize(
    ("setting", "said"),
    {
        "train.global_batch=3": "train.global_batch=3 does not divide among 2 processes",
        "+optim.groups.x.match=[nosuch]": "optimizer group pattern 'nosuch' matches no parameter",
    }.items(),
)
def test_a_mistake_is_told_once(tiny: Command, setting: str, said: str) -> None:
    process = torchrun(*tiny, "parallel=ddp", setting)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert len(re.findall(r"^.*error: ", err, re.MULTILINE)) == 1, err
    assert f"error: {said}" in err
    assert not list(Path().glob("runs/*"))


def workers_of(launcher: subprocess.Popen[str]) -> list[int]:
    """Process ids of a torchrun's workers, by rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(pid) for pid in children]


LONG = ("train.steps=150", "train.eval_every=50", "train.checkpoint_every=5", "parallel.timeout=20")


def started(folder: Path, lines: int) -> bool:
    file = folder / "metrics.jsonl"
    return file.exists() and len(file.read_text().splitlines()) > lines


@slow
@pytest.mark.parametrize("layout", [("fsdp", 2)], ids=["fsdp"])
def test_a_killed_rank_ends_all_and_torchrun_starts_them_again(
    tiny: Command, tmp_path: Path, layout: Layout
) -> None:
    strategy, size = layout
    command = (*tiny, *LONG, "optim=muon", f"parallel={strategy}", "run.name=test")
    folder = tmp_path / "killed"
    process = torchrun(*command, f"run.dir={folder}", options=("--max-restarts=2",), size=size)
    until(lambda: started(folder, 20), lambda: process.poll() is None)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert re.search(r"continuing at step [1-9]\d*", out)
    assert json.loads(out.splitlines()[-1])["step"] == 150
    whole = run_on(layout, *command, folder=tmp_path / "whole")
    assert losses(folder) == losses(whole)
    one, other = weights(folder), weights(whole)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not list(folder.glob("**/*.tmp"))


@slow
def test_without_restarts_a_killed_rank_ends_the_job_at_once(tiny: Command, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    process = torchrun(*tiny, *LONG, "parallel=ddp", f"run.dir={folder}", "train.steps=100000")
    until(lambda: started(folder, 20), lambda: process.poll() is None)
    began = time.monotonic()
    os.kill(workers_of(process)[1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - began < 20  # parallel.timeout


@slow
def test_a_signal_to_torchrun_stops_all_after_a_checkpoint(tiny: Command, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    process = torchrun(*tiny, *LONG, "parallel=ddp", f"run.dir={folder}", "train.steps=100000")
    until(lambda: started(folder, 20), lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["stopped_by"] in ("SIGTERM", "another process")
    assert checkpoints(folder)[-1].name == f"step_{summary['step']:08d}"
