"""The same seed gives the same run; how a batch is cut changes losses by rounding alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from system import Command, assert_same_run, checkpoints, here, losses, metrics, tensors

OPTIMIZERS = {
    "adamw": ("optim=adamw",),
    "lion": ("optim=lion",),
    "mars_adamw": ("optim=mars_adamw",),
    "exact_mars_adamw": ("optim=mars_adamw", "optim.mars.exact=true"),
}
optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def test_the_same_seed_gives_the_same_bits(tiny: Command) -> None:
    """With other optimizers too: a look at one below is held to a second run without it."""
    one, other = (here(*tiny, f"run.dir={run}").dir for run in ("one", "other"))
    assert_same_run(one, other)


def test_another_seed_gives_another_run(tiny: Command) -> None:
    one, other = (losses(here(*tiny, f"seed={seed}", f"run.dir={seed}").dir) for seed in (1, 2))
    assert all(a != b for a, b in zip(one, other, strict=True))


# Relative. Measured: at most 3e-7 for each optimizer, which is float32's own resolution.
ROUNDING = 3e-6


@optimizers
def test_micro_batches_change_losses_by_rounding_alone(tiny: Command, optimizer: Command) -> None:
    command = (*tiny, *optimizer, "train.global_batch=8", "train.steps=16", "optim.lr=1e-3")
    whole = here(*command, "run.dir=8").dir
    learned = losses(whole)[0] - losses(whole)[-1]
    assert learned > 0.1, "the run learns nothing, so that its losses say nothing"
    for micro_batch in (1, 2, 4):
        how = (f"train.micro_batch={micro_batch}", f"run.dir={micro_batch}")
        cut = here(*command, *how).dir
        assert losses(cut) == pytest.approx(losses(whole), rel=ROUNDING)
        # the updates of these optimizers do not see the gradient's scale, so look at it directly
        norms = [line["grad_norm"] for line in metrics(whole)[1:]]
        assert [line["grad_norm"] for line in metrics(cut)[1:]] == pytest.approx(norms, rel=1e-4)


def test_summed_micro_batches_give_the_mean_times_their_number(tiny: Command) -> None:
    """The MARS code's convention: n times the gradient. A tight clip takes the factor away."""
    command = (*tiny, "train.micro_batch=1", "optim=adamw")
    norms = {}
    for accumulation in ("mean", "sum"):
        how = f"train.accumulation={accumulation}"
        free = here(*command, how, "train.grad_clip=null", f"run.dir={accumulation}").dir
        clipped = here(*command, how, "train.grad_clip=1e-3", f"run.dir=clip_{accumulation}").dir
        norms[accumulation] = metrics(free)[1]["grad_norm"]
        norms[f"{accumulation}, clipped"] = losses(clipped)
    assert norms["sum"] == pytest.approx(4 * norms["mean"], rel=1e-5)
    # (norm + 1e-6 in the divisor of the clip: equal to 1e-6, not to the last bit)
    assert norms["sum, clipped"] == pytest.approx(norms["mean, clipped"], rel=1e-5)
    assert losses(Path("sum")) != losses(Path("clip_sum"))


@optimizers
def test_dropout_resumes_on_the_same_bits(tiny: Command, optimizer: Command) -> None:
    """Random numbers are a function of (seed, step), so there is no generator to restore."""
    command = (*tiny, *optimizer, "model.dropout=0.3", "train.micro_batch=2")
    reference = here(*command, "run.dir=reference").dir
    without = here(*tiny, *optimizer, "train.micro_batch=2", "run.dir=without").dir
    assert losses(reference) != losses(without)
    resumed = here(*command, "run.dir=resumed").dir
    shutil.rmtree(checkpoints(resumed)[-1])
    (resumed / "summary.json").unlink()
    assert "continuing at step 4" in here(*command, "run.dir=resumed").out
    assert_same_run(reference, resumed)


def test_evaluation_leaves_no_trace(tiny: Command) -> None:
    """However often a run is evaluated, sampled from and saved, its weights are the same."""
    command = (*tiny, "model.dropout=0.3")
    often = ("train.eval_every=1", "train.sample_tokens=8", "train.checkpoint_every=1")
    seldom = ("train.eval_every=0", "train.checkpoint_every=8")
    one = here(*command, *often, "run.dir=often").dir
    other = here(*command, *seldom, "run.dir=seldom").dir
    assert tensors(one) == tensors(other)


@optimizers
def test_a_look_at_the_optimizer_changes_nothing(tiny: Command, optimizer: Command) -> None:
    plain = here(*tiny, *optimizer, "run.dir=plain").dir
    seen = here(*tiny, *optimizer, "logging.diagnostics=3", "run.dir=seen").dir
    assert tensors(plain) == tensors(seen)
    looks = {line["step"] for line in metrics(seen) if "optim/matrix/update_rms" in line}
    assert looks == {3, 6}
    with_mars = "mars" in optimizer[0]
    clips = [line for line in metrics(seen) if "optim/matrix/correction_clipped" in line]
    assert bool(clips) == with_mars


def test_bf16_runs_on_a_cpu_and_stays_near_fp32(tiny: Command) -> None:
    command = (*tiny, "train.steps=24", "train.eval_every=24", "optim.lr=1e-3")
    runs = {p: here(*command, f"train.precision={p}", f"run.dir={p}").dir for p in ("fp32", "bf16")}
    fp32, bf16 = (losses(runs[p]) for p in ("fp32", "bf16"))
    assert bf16 != fp32
    assert bf16 == pytest.approx(fp32, abs=3e-3)  # measured 3e-4
    assert json.loads((runs["bf16"] / "summary.json").read_text())["precision"] == "bf16"
    saved = load_file(checkpoints(runs["bf16"])[-1] / "tensors.safetensors")
    weights = {t.dtype for name, t in saved.items() if name.startswith("model.")}
    assert weights == {torch.float32}  # matrix products alone are rounded
