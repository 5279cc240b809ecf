"""The hardware under the run: which device, which precision, how fast it could be."""

from __future__ import annotations

import gc
import os
import platform
import re
import resource
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from runtime.config import AUTO, GRAPHS, TrainConfig, accumulation
from runtime.cpu_linear import is_faster, linear, use_onednn
from runtime.errors import ConfigError
from runtime.processes import Processes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Dense bf16 peak in FLOP/s, with sums in float32 (fp16 of V100 and T4, which have no bf16), by
# words of torch's device name: NVIDIA's datasheets and white papers
PEAKS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A100 PCIe": 312e12,
    "A40": 150e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "4090": 165e12,
    "3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}
# Words that make another card of it, or a part of one, unless PEAKS has them as well
VARIANTS = {"pcie", "nvl", "mig", "laptop", "ti", "d", "super"}

# As the process began: torch sets it itself once its compiler is imported, which an optimizer does.
CACHE = "TORCHINDUCTOR_CACHE_DIR"
USERS_CACHE = os.environ.get(CACHE)

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Device:
    """A device, the precision of its matrix products, and what differs between kinds of device."""

    device: torch.device
    precision: str
    scaler: torch.amp.GradScaler  # does nothing unless the precision is fp16

    @classmethod
    def choose(cls, train: TrainConfig, processes: Processes | None = None) -> Device:
        """The device that ``train.device`` names ("auto": the best there is); of many processes,
        each has the GPU of its number on its machine. Raises ConfigError for a device or precision
        that this machine does not have."""
        processes = processes or Processes()
        if train.threads is not None:
            torch.set_num_threads(train.threads)
        cut = train.micro_batch == AUTO or accumulation(train, processes.size) > 1
        if train.compile and train.compile_mode in GRAPHS and cut:
            raise ConfigError(
                f"train.compile_mode={train.compile_mode} replays CUDA graphs, whose gradients the "
                f"next micro-batch overwrites: raise train.micro_batch to the whole share of a "
                f"process, or use default or max-autotune-no-cudagraphs"
            )
        if train.compile and train.compile_mode in GRAPHS and train.compile_blocks:
            raise ConfigError(
                f"train.compile_blocks=true runs one graph for every layer, which as a CUDA graph "
                f"(train.compile_mode={train.compile_mode}) would overwrite the layer before: use "
                f"default or max-autotune-no-cudagraphs"
            )
        if train.compile and train.compile_cache is not None and USERS_CACHE is None:
            # What torch compiles is code, to be loaded again: in the user's own folder, where its
            # default is the machine's /tmp. Triton's kernels go there too.
            os.environ[CACHE] = str(Path(train.compile_cache).expanduser().absolute())
        best = best_device()
        if processes.size > 1 and best != "cuda":
            best = "cpu"  # mps tensors do not travel
        device = torch.device(best if train.device == "auto" else _parse(train.device))
        if device.type == "cuda":
            device = _gpu(device.index, processes)
            torch.cuda.set_device(device)
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        precision = best_precision(device) if train.precision == "auto" else train.precision
        if precision == "fp16" and device.type == "cpu":
            raise ConfigError("train.precision=fp16 needs a GPU: use bf16 or fp32 on a CPU")
        scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        return cls(device, precision, scaler)

    def prepare(self, model: Model, train: TrainConfig) -> Model:
        """The model on this device, with the linear layers that are fastest there."""
        if self.device.type == "cpu" and self.precision == "fp32":
            use_onednn(model, train.cpu_linear)
        return model.to(self.device)

    def autocast(self) -> Any:
        """Context in which matrix products run in the chosen precision; weights stay float32."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision])

    def to_device(self, tokens: Tensor) -> Tensor:
        """A copy on the device. On a GPU its own queue makes it, beside the work under way."""
        if self.device.type != "cuda":
            return tokens.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copies):
            tokens = tokens.to(self.device, non_blocking=True)
        current.wait_stream(self._copies)
        tokens.record_stream(current)  # its memory is not used again before the work is done
        return tokens

    @cached_property
    def _copies(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    @property
    def name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{platform.machine()} CPU" if self.device.type == "cpu" else self.device.type

    @property
    def peak_flops(self) -> float | None:
        """Datasheet peak in FLOP/s, or None where it is not known."""
        return peak_of(self.name)

    def memory_gb(self) -> float:
        """Largest memory held so far, in 10^9 bytes: the GPU's, or the process's on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

    def forget_trials(self) -> None:
        """Give back the memory of what was only tried on this GPU; `memory_gb` leaves it out."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)


def peak_of(name: str) -> float | None:
    """The datasheet's peak of a card, by torch's name for it."""
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    for key, peak in PEAKS.items():
        own = set(key.lower().split())
        if own <= words and words & VARIANTS <= own:
            return peak
    return None


def matmul_flops(device: torch.device, dtype: torch.dtype, repeat: int = 10) -> float:
    """Measured rate of a large square matrix product, in FLOP/s: what no training step exceeds.
    float32 as training has it: TF32 on a GPU, the faster library on a CPU."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    onednn = device.type == "cpu" and dtype == torch.float32 and is_faster()
    product = linear if onednn else nn.functional.linear
    calls = 10 if device.type == "cuda" else 1  # between two waits, each some 10 microseconds
    seconds = []
    for _ in range(repeat):
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            product(a, b)
        _wait(device)
        seconds.append((time.perf_counter() - start) / calls)
    return 2 * n**3 / statistics.median(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def best_precision(device: torch.device) -> str:
    """bf16 on GPUs that have it, else fp16 there; fp32 elsewhere, where it is the safe choice."""
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _gpu(index: int | None, processes: Processes) -> torch.device:
    """The GPU of this process; ``index`` is that which the user asked for."""
    if index is not None and processes.size > 1:
        raise ConfigError(
            f"train.device=cuda:{index} is one GPU for {processes.size} processes: use cuda or "
            f"auto, and choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    index, there = processes.local_rank if index is None else index, torch.cuda.device_count()
    if index >= there:
        raise ConfigError(
            f"this machine has {there} GPUs, fewer than processes: use torchrun "
            f"--nproc_per_node={there}"
        )
    return torch.device("cuda", index)


def _parse(name: str) -> str:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"train.device is {name!r}: expected auto, cpu, cuda or mps") from None
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}
    if (device.index or 0) >= there.get(device.type, 0):
        raise ConfigError(f"train.device is {name!r}, which this machine does not have: use auto")
    return name


def seed_step(seed: int, step: int, micro_batch: int = 0) -> None:
    """Make torch's random numbers (dropout) a function of (seed, step, number of the micro-batch in
    the global batch), so that a resumed run needs no generator state, and any number of processes
    draws the same."""
    torch.manual_seed((seed * 1_000_003 + step + micro_batch * 0x9E3779B97F4A7C15) % 2**63)


def uniform(seed: int, step: int, shape: tuple[int, ...]) -> Tensor:
    """Numbers in [0, 1) that are a function of (seed, step) alone, on the CPU: those of a global
    batch, of which every process takes its rows."""
    own = (seed * 1_000_003 + step + 0x5851F42D4C957F2D) % 2**63
    return torch.rand(shape, generator=torch.Generator().manual_seed(own))
