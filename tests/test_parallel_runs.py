"""The same run on any number of processes: losses, weights, resumption, evaluation.

It goes through train.py's own `train`, on processes that stay (workers.py).
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from system import (
    Command,
    checkpoints,
    determined,
    losses,
    metrics,
)
from test_same_curve import MARGIN, configuration, perturbed, settings
from torch import Tensor
from workers import run

import train
from runtime import checkpoint
from runtime.guard import Guard
from runtime.processes import Processes
from runtime.run import open_for_all

Layout = tuple[str, int]  # strategy, processes
ONE: Layout = ("none", 1)

EXACT = "exact_mars_adamw"
STEPS = ("train.steps=20", "train.global_batch=8", "train.eval_every=10", "run.name=test")
slow = pytest.mark.slow
_jobs = itertools.count()


def job(overrides: Command) -> dict[str, Any]:
    """Train on this process among those of its pool, or on it alone; returns the summary."""
    import torch.distributed as dist

    processes = Processes()
    if dist.is_initialized():
        store = dist.PrefixStore(f"job {next(_jobs)}", dist.distributed_c10d._get_default_store())
        place = (dist.get_rank(), dist.get_world_size())
        processes = Processes(*place, 0, 60.0, dist.group.WORLD, store)
    config = configuration(*overrides)
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
    x, y = determined(weights(one)), determined(weights(other))
    assert x.keys() == y.keys()
    apart = max(float((x[n] - y[n]).abs().max()) for n in x if n.startswith("model."))
    return float((a / b - 1).abs().max()), apart


def assert_same_curve(command: Command, layout: Layout, how: Command, folder: Path) -> None:
    """To 1e-5, or where the rule itself amplifies rounding, as tests/test_same_curve.py has it."""
    alone = run_on(ONE, *command, folder=folder / "one")
    assert_near(run_on(layout, *command, *how, folder=folder / "many"), alone, command)


def assert_near(many: Path, alone: Path, command: Command) -> None:
    found = distance(many, alone)
    if max(found) > 1e-5:
        with perturbed(0):
            noise = distance(run_on(ONE, *command, folder=alone.with_name("noise")), alone)
        for value, amplified in zip(found, noise, strict=True):
            assert value <= max(1e-5, MARGIN * amplified), f"{found}; noise {noise}"


@pytest.mark.parametrize(
    ("rule", "layout", "micro_batch"), [("muon", ("ddp", 2), 4), (EXACT, ("fsdp", 2), 2)]
)
def test_the_curve_does_not_depend_on_the_number_of_processes(
    tiny: Command, tmp_path: Path, rule: str, layout: Layout, micro_batch: int
) -> None:
    """Through the whole trainer; every optimizer is held to it in tests/test_same_curve.py."""
    how = (f"train.micro_batch={micro_batch}",)
    assert_same_curve((*tiny, *STEPS, *settings(rule)), layout, how, tmp_path)
    one, many = tmp_path / "one", tmp_path / "many"  # state: that of all processes together
    assert (one / "parameters.txt").read_text() == (many / "parameters.txt").read_text()
    sizes = {json.loads((run / "summary.json").read_text())["state_bytes"] for run in (one, many)}
    assert len(sizes) == 1


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
        *(pytest.param(r, LONG_CHAIN, id=r, marks=slow) for r in ("adamw", "came", "soap")),
    ],
)
def test_a_run_goes_on_in_another_layout(
    tiny: Command, tmp_path: Path, rule: str, layouts: list[Layout]
) -> None:
    total = 2 * len(layouts)
    command = (*tiny, *STEPS, *settings(rule), f"schedule.decay_steps={total}")
    whole = (*command, f"train.steps={total}", "train.eval_every=0")
    alone = run_on(ONE, *whole, folder=tmp_path / "one")
    assert_near(chain(command, layouts, tmp_path / "chain"), alone, whole)


@pytest.mark.parametrize(
    ("rule", "strategy"), [(EXACT, "ddp"), ("shampoo", "ddp"), ("muon", "fsdp"), ("came", "fsdp")]
)
def test_the_same_layout_goes_on_bit_for_bit(
    tiny: Command, tmp_path: Path, rule: str, strategy: str
) -> None:
    layout = (strategy, 2)
    command = (*tiny, *STEPS, *settings(rule), "schedule.decay_steps=4", "model.dropout=0.1")
    whole = run_on(layout, *command, "train.steps=4", "train.eval_every=0", folder=tmp_path / "one")
    parts = chain(command, [layout, layout], tmp_path / "chain")
    assert losses(parts) == losses(whole)
    one, other = weights(parts), weights(whole)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- evaluation ----------------------------------------------------------------------------------


@slow
def test_hellaswag_of_sharded_weights(tiny: Command, tmp_path: Path) -> None:
    rows = Path(__file__).parent / "goldens/eval/hellaswag_100.jsonl"
    evaluated = (f"eval.hellaswag.data_file={rows}", "eval.hellaswag.limit=10")
    corpus = ("data.tokenizer=gpt2", f"data.dir={tmp_path}/gpt2", "model.context=128")
    short = ("train.steps=2", "train.eval_every=1", "train.checkpoint_every=0")
    command = (*tiny, *corpus, *short, "eval.hellaswag.every=1", *evaluated, "run.name=test")
    alone = run_on(ONE, *command, folder=tmp_path / "one")
    many = run_on(("fsdp", 2), *command, folder=tmp_path / "many")
    keys = ("eval/hellaswag_acc", "eval/hellaswag_acc_norm", "eval/hellaswag_acc_norm_stderr")
    found = [[[line[key] for key in keys] for line in metrics(run)] for run in (alone, many)]
    assert len(found[0]) == 3
    assert found[1] == found[0]
