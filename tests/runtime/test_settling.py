"""What a run decides for itself before the first step, and that it decides so once."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from system import Command, here
from torch.nn import attention as torch_attention

from model import GPT2Config
from runtime.attention import BACKENDS, attention, measure
from runtime.device import Device
from runtime.errors import ConfigError
from runtime.fastest import agree
from runtime.micro_batch import largest


@pytest.mark.parametrize("limit", [0, 1, 5, 48, 100])
def test_the_largest_divisor_that_fits(limit: int) -> None:
    divisors, tried = [1, 2, 3, 4, 6, 8, 12, 16, 24, 48], list[int]()

    def fits(n: int) -> bool:
        tried.append(n)
        return n <= limit

    assert largest(divisors, fits) == max((d for d in divisors if d <= limit), default=0)
    assert len(tried) <= 4  # halves: ten divisors are four tries


def test_auto_is_settled_recorded_and_kept(tiny: Command, tmp_path: Path) -> None:
    """4 sequences of 32 tokens are one micro-batch; but a run that began with 2 goes on with 2."""

    def settled(*more: str) -> object:
        run = here(*tiny, f"run.dir={tmp_path}/run{len(more)}", "train.checkpoint_every=2", *more)
        return OmegaConf.load(run.dir / "config.yaml").train.micro_batch

    assert settled("train.micro_batch=auto") == 4
    began = (f"run.dir={tmp_path}/begun", "schedule.decay_steps=8", "train.steps=2")
    assert settled(*began, "train.micro_batch=2") == 2
    more = ("train.steps=4", f"train.resume={tmp_path}/begun", "train.micro_batch=auto")
    assert settled(*began, *more) == 2
    assert "auto: 2, as this run began" in (tmp_path / "begun" / "log.txt").read_text()


def test_what_is_no_micro_batch_is_refused(tiny: Command) -> None:
    for value in ("all", "0", "-2"):
        error = here(*tiny, f"train.micro_batch={value}").error
        assert "expected a positive number of sequences, auto or null" in error
    auto = "train.micro_batch=auto"
    assert "set train.sum_factor" in here(*tiny, auto, "train.accumulation=sum").error
    graphs = ("train.compile=true", "train.compile_mode=reduce-overhead")
    for cut in (auto, "train.micro_batch=2"):
        assert "replays CUDA graphs" in here(*tiny, *graphs, cut).error
    assert "one graph for every layer" in here(*tiny, *graphs, "train.compile_blocks=true").error


def test_kernels_that_fail_or_disagree_are_left_out() -> None:
    cpu = Device(torch.device("cpu"), "fp32", torch.amp.GradScaler("cpu", enabled=False))
    times = measure(cpu, GPT2Config(n_layer=1, n_head=2, n_embd=16, context=32, vocab_size=50))
    assert {"math"} <= set(times) < set(BACKENDS)  # a CPU has no cuDNN
    assert all(t > 0 for t in times.values())
    right = [torch.ones(3)]
    assert agree([right[0] + 1e-4], right, torch.float32)
    assert not agree([right[0] + 1e-2], right, torch.float32)
    assert not agree([right[0] * float("nan")], right, torch.float32)


@pytest.mark.skipif(find_spec("flash_attn_interface") is not None, reason="it is installed")
def test_an_absent_flash_attention_3_is_a_clear_error() -> None:
    message = r"train\.attention=fa3 needs .*flash_attn_interface"
    with pytest.raises(ConfigError, match=message), attention("fa3"):
        pass
    assert torch_attention.current_flash_attention_impl() is None


def test_the_preferred_kernel_goes_first() -> None:
    """In torch's order, which only GPUs look at; outside, it is as it was."""
    before = torch._C._get_sdp_priority_order()
    for name in ("cudnn", "flash", "math"):
        with attention(name):
            assert torch._C._get_sdp_priority_order()[0] == BACKENDS[name].value
    with attention("default"):
        assert torch._C._get_sdp_priority_order() == before
    assert torch._C._get_sdp_priority_order() == before
