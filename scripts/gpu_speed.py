"""The training step on a GPU: tokens per second, its parts, memory and compile time by model size.

Our side is scripts/bench_train.py, case by case. *plain* is the same network as nanoGPT trains it:
erf GELU, no biases, the spare rows of the vocabulary in the softmax, bf16 autocast,
``torch.compile``, torch's fused AdamW and clip, torch's own choice of an attention kernel. *plain
mars* is that with attention as a matrix of weights and MARS-AdamW as a Python loop with a branch on
each norm, which is how MARS's authors train.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.corpus import open_corpus
from model import GPT2
from runtime.attention import attention
from runtime.config import AUTO, Config, model_config, schedule
from runtime.device import DTYPES, Device, matmul_flops
from scripts import bench_train
from scripts.bench_optim import MarsLoop
from scripts.gpu_invariants import SameBatch
from scripts.gpu_invariants import configuration as composed
from scripts.gpu_parts import Part, Row, toy
from scripts.gpu_wrappers import turns
from scripts.training import configuration

PLAIN = ("model.bias=false", "model.exact_gelu=true", "model.mask_padding=false")
LAYERS = {"small": 12, "medium": 24, "large": 36, "xl": 48}
# sequences of a micro-batch, of which 480 is a multiple: first tries, on a card of 80 GB
MICRO = {"small": 32, "medium": 32, "large": 32, "xl": 16}
BATCH = 480


@dataclass(frozen=True)
class Setting:
    """One row: ``kind`` of side, ``optimizer`` of ours, ``step_s`` a guess at one update of 480
    sequences on an H100, for the plan of the time."""

    size: str
    kind: str  # of MEASURE
    compile: bool
    step_s: float
    optimizer: str = "adamw"


ORDER = (  # what is asked for most often first
    Setting("small", "ours", True, 1.0),
    Setting("small", "plain", True, 1.5),
    Setting("small", "start", True, 1.0),
    Setting("large", "ours", True, 5.0),
    Setting("medium", "ours", True, 2.5),
    Setting("small", "wrappers", False, 2.0),
    Setting("small", "ours", False, 2.0),
    Setting("small", "ours", True, 1.0, "mars_adamw"),
    Setting("small", "plain mars", True, 4.0),
    Setting("small", "ours", True, 1.0, "muon"),
    Setting("xl", "ours", True, 10.0),
    Setting("medium", "plain", True, 3.5),
    Setting("large", "plain", True, 7.0),
)
STEPS = 5  # updates of a row: the one that compiles, one to warm up, three turns


def measure_speed(part: Part) -> None:
    """Each row with what was found before: the micro-batch that fits, seconds to compile a layer,
    and how much faster or slower than the guess this card is."""
    micro: dict[str, int] = {}
    per_layer, pace = 2.0, 1.0  # until there is a reading
    for setting in ORDER:
        size, known = setting.size, setting.size in micro and setting.kind == "ours"
        compiling = per_layer * LAYERS[size] * (0.3 if known else 1.0) * setting.compile
        needed = 5 + compiling + pace * setting.step_s * STEPS
        row: Row = {"size": size, "setting": setting.kind, "optimizer": setting.optimizer}
        row["compile"] = setting.compile
        if part.left() < needed and not part.smoke:
            part.report(**row, skipped=f"{needed:.0f} s needed, {part.left():.0f} left")
            continue
        with part.attempt(**row) as result:
            result |= MEASURE[setting.kind](part, setting, micro.get(size))
            if "step_ms" not in result:
                continue
            micro[size] = result["micro_batch"]
            pace = 1e-3 * result["step_ms"] * BATCH / result["global_batch"] / setting.step_s
            if setting.compile and not known:
                per_layer = result["first_step_s"] / LAYERS[size]
        part.clear()


def ours(part: Part, setting: Setting, micro: int | None) -> Row:
    """A row of bench_train; the micro-batch that is tried first, else what train.micro_batch=auto
    finds."""
    tries: list[int | str] = [2] if part.smoke else [micro or MICRO[setting.size], AUTO]
    rows: list[Row] = []
    for size in tries:
        count = BATCH // size if isinstance(size, int) and not part.smoke else 2
        with contextlib.redirect_stdout(sys.stderr):  # its table, into the log
            (row,) = bench_train.run([
                *("--models", f"gpt2_{setting.size}", "--optimizers", setting.optimizer),
                *("--micro-batches", str(size), "--accumulation", str(count)),
                *("--compile", str(setting.compile and not part.smoke).lower()),
                *("--warm-up", "1", "--steps", "1", "--repeat", "1" if part.smoke else "3"),
                *("--device", part.device.type, *toy(part.smoke)),
            ])  # fmt: skip
        rows.append(row)
        if "OutOfMemoryError" not in row.get("error", ""):
            break
        part.clear()
    if "error" in rows[-1]:
        raise RuntimeError(rows[-1]["error"])
    kept = ("model", "compile")  # said already
    return {key: value for key, value in rows[-1].items() if key not in kept}


def plain(part: Part, setting: Setting, micro: int | None) -> Row:
    """With the micro-batch of our side, or a half or a quarter of it where that does not fit."""
    size = 2 if part.smoke else micro or MICRO[setting.size]
    for tried in (size, size // 2):
        with contextlib.suppress(torch.OutOfMemoryError):
            return plain_with(part, setting, tried)
        part.clear()
    return plain_with(part, setting, size // 4)


def plain_with(part: Part, setting: Setting, micro: int) -> Row:
    batch = 4 if part.smoke else BATCH
    overrides = [f"model=gpt2_{setting.size}", "model.vocab_size=50257", *PLAIN, *toy(part.smoke)]
    overrides += [f"train.global_batch={batch}", f"train.micro_batch={micro}"]
    overrides += [f"train.device={part.device.type}"]
    optimizer, kernel = {"plain": (fused_adamw, "default"), "plain mars": (mars_loop, "math")}[
        setting.kind
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(Path(folder), overrides)
    device, shape = Device.choose(config.train), model_config(config, 50257)
    torch.manual_seed(0)
    with torch.device(device.device):
        model = GPT2(shape)
    batches = SameBatch(batch, shape, device.device)
    step = plain_step(config, model, batches, device, optimizer(model, config.optim["lr"]))
    with attention(kernel):
        first = part.seconds(lambda: step(0))
        step(1)
        seconds = part.median(lambda: step(2), 3)
    tokens = batch * shape.context
    rate = matmul_flops(device.device, DTYPES[device.precision])
    flops = model.flops_per_token(shape.context)
    return {
        "micro_batch": micro,
        "global_batch": batch,
        "precision": device.precision,
        **bench_train.shares(device, flops, tokens / seconds, rate),
        "memory_gb": device.memory_gb(),
        "step_ms": 1e3 * seconds,
        "first_step_s": first,
    }


def start(part: Part, setting: Setting, micro: int | None) -> Row:
    """Seconds from the start of ``python train.py`` to the end of its first update: data prepared,
    and compiled by the rows before."""
    micro = 2 if part.smoke else micro or MICRO[setting.size]
    kernel = next((row["attention"] for row in part.own if "attention" in row), "auto")
    settings = [
        *(f"model=gpt2_{setting.size}", "model.vocab_size=50257", *toy(part.smoke)),
        *(f"train.device={part.device.type}", f"train.compile={str(not part.smoke).lower()}"),
        *(f"train.global_batch={micro}", f"train.micro_batch={micro}", "train.steps=1"),
        *(f"train.attention={kernel}", "train.eval_every=0", "train.checkpoint_every=0"),
        *("train.sample_tokens=0", "logging.every=1", "logging.picture=false"),
    ]
    open_corpus(composed(*settings).data)  # prepares it
    with tempfile.TemporaryDirectory() as folder:
        return {"start_s": bench_train.first_step(Path(folder) / "run", settings)}


def wrappers(part: Part, setting: Setting, micro: int | None) -> Row:
    """Tokens per second of one process in DDP and in FSDP2, where there is nothing to gain, as
    shares of the unwrapped model's, in turns."""
    batch = 4 if part.smoke else 32
    settings = [f"model=gpt2_{setting.size}", f"train.device={part.device.type}", *toy(part.smoke)]
    settings += [f"train.global_batch={batch}", f"train.micro_batch={batch // 2}"]
    times = turns(settings, 3 if part.smoke else 20)
    return {
        name: statistics.median(b / a for a, b in zip(taken, times["none"], strict=True))
        for name, taken in times.items()
        if name != "none"
    }


MEASURE: dict[str, Callable[[Part, Setting, int | None], Row]] = {
    "ours": ours,
    "start": start,
    "wrappers": wrappers,
    "plain": plain,
    "plain mars": plain,
}


def fused_adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    wide = [p for p in model.parameters() if p.ndim > 1]
    narrow = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": wide, "weight_decay": 0.1}, {"params": narrow, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def mars_loop(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return MarsLoop(model.parameters())


def plain_step(
    config: Config,
    model: GPT2,
    batches: SameBatch,
    device: Device,
    optimizer: torch.optim.Optimizer,
) -> Callable[[int], None]:
    """nanoGPT's: compiled model, torch's clip, fused or looped optimizer."""
    forward: Any = torch.compile(model)
    lr_schedule = schedule(config)

    def step(number: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = config.optim["lr"] * lr_schedule(number)
        micros = batches.batch(number).split(config.train.micro_batch or len(batches.tokens))
        for micro in micros:
            tokens = micro.to(device.device, non_blocking=True)
            with device.autocast():
                loss = forward(tokens[:, :-1], tokens[:, 1:]) / len(micros)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def step_seconds(rows: list[Row], size: str, compile: bool = True) -> tuple[float, float] | None:
    """Of one update of 480 sequences with AdamW: in all, and of it the optimizer."""
    found = [
        row
        for row in rows
        if (row["size"], row["setting"], row["optimizer"], row["compile"])
        == (size, "ours", "adamw", compile)
        and "tokens_per_s" in row
    ]
    if not found:
        return None
    row = found[0]
    return BATCH * row["context"] / row["tokens_per_s"], 1e-3 * row["optimizer_ms"]
