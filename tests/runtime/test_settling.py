"""What a run decides for itself before the first step, and that it decides so once."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from system import Command, here
from torch import Tensor
from torch.compiler import config as compiler_config
from torch.nn import attention as torch_attention
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GPT2Config
from runtime import micro_batch
from runtime.attention import BACKENDS, attention, measure
from runtime.device import Device
from runtime.errors import ConfigError
from runtime.fastest import agree
from runtime.micro_batch import largest
from runtime.processes import Processes


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


def test_a_micro_batch_is_tried_with_the_kernel_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a GPU, which fits twelve of it: math takes more memory than others do."""
    first: set[int] = set()

    def fits(model: Any, device: Any, context: int, sequences: int, held: int) -> bool:
        first.add(torch._C._get_sdp_priority_order()[0])
        return sequences <= 12

    monkeypatch.setattr(micro_batch, "fits", fits)
    train: Any = SimpleNamespace(
        global_batch=48, micro_batch="auto", attention="math", symmetric="auto"
    )
    run: Any = SimpleNamespace(dir=tmp_path, notes=[])
    parallel: Any = SimpleNamespace(processes=Processes(), mesh=None, model=None)
    optimizer: Any = SimpleNamespace(table=lambda: [])
    gpu: Any = SimpleNamespace(device=torch.device("cuda"), name="a GPU")
    micro_batch.settle_micro_batch(train, run, parallel, optimizer, gpu, context=32)
    assert train.micro_batch == 12 and first == {SDPBackend.MATH.value}


@pytest.mark.slow
def test_the_compilers_cache_keeps_kernels_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not do so by itself: which kernel attention takes is no part of its key."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    query = torch.randn(1, 2, 8, 16)

    def work(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    def ran(name: str) -> bool:
        """Whether the flash kernel did. A CPU heeds no order, only what is allowed."""
        torch.compiler.reset()
        allowed = sdpa_kernel(BACKENDS[name])
        with attention(name), allowed, torch.profiler.profile() as profile:
            torch.compile(work, dynamic=False)(query)
        return any("flash" in event.key for event in profile.key_averages())

    assert [ran(name) for name in ("flash", "math", "flash")] == [True, False, True]
    assert compiler_config.cache_key_tag == ""
