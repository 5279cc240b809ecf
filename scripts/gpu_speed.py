"""The training step on a GPU: tokens per second, its parts, memory and compile time by model size.

Our side is scripts/bench_train.py, case by case. *plain* is the same network as nanoGPT trains it:
erf GELU, no biases, the spare rows of the vocabulary in the softmax, bf16 autocast,
``torch.compile``, torch's fused AdamW and clip, torch's own choice of an attention kernel. *mars
pair* holds our step with MARS-AdamW against that with attention as a matrix of weights and
MARS-AdamW as a Python loop with a branch on each norm, which is how MARS's authors train; both of a
quarter of GPT-2 small. Which rows there are and in which order: scripts/gpu_plan.py.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.corpus import open_corpus
from model import GPT2
from optim import create_optimizer
from runtime.attention import attention
from runtime.config import AUTO, Config, model_config, schedule
from runtime.device import DTYPES, Device, matmul_flops
from runtime.kernels import kernels
from runtime.parallel import parallelize
from runtime.processes import Processes
from scripts import bench_train
from scripts.bench_optim import MarsLoop
from scripts.gpu_invariants import SameBatch
from scripts.gpu_invariants import configuration as composed
from scripts.gpu_parts import Part, Row, toy
from scripts.gpu_plan import BATCH, MICRO, ORDER, QUARTER, TOY_ORDER, Plan, Setting
from scripts.gpu_wrappers import turns
from scripts.training import configuration
from train import update

PLAIN = ("model.bias=false", "model.exact_gelu=true", "model.mask_padding=false")
COMPILE = {
    "whole": ("train.compile=true",),
    "blocks": ("train.compile=true", "train.compile_blocks=true"),
    "no": ("train.compile=false",),
}


def measure_speed(part: Part) -> None:
    """Each row with what was found before: the micro-batch that fits, seconds to compile a layer,
    and how much faster or slower than the guess this card is."""
    micro: dict[str, int] = {}
    plan = Plan()
    for setting in TOY_ORDER if part.smoke else ORDER:
        needed = plan.needed(setting)
        if part.left() < needed and not part.smoke:
            part.report(**setting.own, skipped=f"{needed:.0f} s needed, {part.left():.0f} left")
            continue
        with part.attempt(**setting.own) as result:
            result |= MEASURE[setting.kind](part, setting, micro.get(setting.size))
            if setting.kind in LEARNT and not setting.extra:
                micro[setting.size] = result["micro_batch"]
                scale = setting.sequences / result["global_batch"]  # another where little fits
                plan.learn(setting, 1e-3 * scale * result["step_ms"], result["first_step_s"])
        part.clear()


def ours(part: Part, setting: Setting, micro: int | None) -> Row:
    """A row of bench_train; the micro-batch that is tried first, else what train.micro_batch=auto
    finds."""
    tries: list[int | str] = [2] if part.smoke else [micro or MICRO[setting.size], AUTO]
    rows: list[Row] = []
    for size in tries:
        own = BATCH // size if isinstance(size, int) else 1  # of auto bench_train knows
        count = setting.micro_batches or (2 if part.smoke else own)
        with contextlib.redirect_stdout(sys.stderr):  # its table, into the log
            (row,) = bench_train.run([
                *("--models", f"gpt2_{setting.size}", "--optimizers", setting.optimizer),
                *("--micro-batches", str(size), "--accumulation", str(count)),
                *("--compile", str(setting.compile != "no" and not part.smoke).lower()),
                *("--warm-up", "0", "--steps", "1", "--repeat", "1" if part.smoke else "3"),
                *("--device", part.device.type, *toy(part.smoke)),
                *overrides_of(part, setting)[1:],  # bench_train says itself whether it compiles
            ])  # fmt: skip
        rows.append(row)
        if "OutOfMemoryError" not in row.get("error", ""):
            break
        part.clear()
    if "error" in rows[-1]:
        raise RuntimeError(rows[-1]["error"])
    return {key: value for key, value in rows[-1].items() if key not in ("model", "compile")}


def overrides_of(part: Part, setting: Setting) -> list[str]:
    """How it is compiled, and what the row is about."""
    compile = COMPILE["no" if part.smoke else setting.compile]
    return [*compile, *([setting.extra] if setting.extra else [])]


def plain(part: Part, setting: Setting, micro: int | None) -> Row:
    """With the micro-batch of our side, or a half or a quarter of it where that does not fit."""
    size = 2 if part.smoke else micro or MICRO[setting.size]
    for tried in (size, size // 2):
        with contextlib.suppress(torch.OutOfMemoryError):
            return plain_with(part, setting, tried)
        part.clear()
    return plain_with(part, setting, size // 4)


def plain_with(part: Part, setting: Setting, micro: int) -> Row:
    own = plain_side(part, setting, micro, (), fused_adamw)
    first = part.seconds(own.step)
    seconds = part.median(own.step, 1 if part.smoke else 3)
    tokens = own.config.train.global_batch * own.model.config.context
    rate = matmul_flops(part.device, DTYPES[own.device.precision])
    flops = own.model.flops_per_token(own.model.config.context)
    return {
        "micro_batch": micro,
        "global_batch": own.config.train.global_batch,
        "precision": own.device.precision,
        **bench_train.shares(own.device, flops, tokens / seconds, rate),
        "memory_gb": own.device.memory_gb(),
        "step_ms": 1e3 * seconds,
        "first_step_s": first,
    }


def mars_pair(part: Part, setting: Setting, micro: int | None) -> Row:
    """A quarter of the model (`QUARTER`) with MARS-AdamW, ours and plain with attention as a matrix
    of weights, in turns."""
    micro = 2 if part.smoke else micro or MICRO[setting.size]
    theirs = plain_side(part, setting, micro, QUARTER, mars_loop)
    mine = our_side(part, setting, micro, QUARTER)
    with attention("math"):
        plain_first = part.seconds(theirs.step)
    first = part.seconds(mine.step)
    turns: list[tuple[float, float]] = []
    for _ in range(1 if part.smoke else 3):
        with attention("math"):
            slow = part.seconds(theirs.step)
        turns.append((slow, part.seconds(mine.step)))
    seconds = statistics.median(own for _, own in turns)
    return {
        "micro_batch": micro,
        "global_batch": mine.config.train.global_batch,
        "precision": mine.device.precision,
        "tokens_per_s": mine.config.train.global_batch * mine.model.config.context / seconds,
        "step_ms": 1e3 * seconds,
        "plain_ms": 1e3 * statistics.median(slow for slow, _ in turns),
        "times_plain": statistics.median(slow / own for slow, own in turns),
        "first_step_s": first,
        "plain_first_step_s": plain_first,
    }


def found_attention(part: Part) -> str:
    """The kernel that a row of ours has measured to be the fastest."""
    return next((row["attention"] for row in part.own if "attention" in row), "default")


def start(part: Part, setting: Setting, micro: int | None) -> Row:
    """Seconds from the start of ``python train.py`` to the end of its first update, data prepared:
    with nothing compiled, then with what that start has compiled. The rows after it find that, too:
    the cache is theirs."""
    micro = 2 if part.smoke else micro or MICRO[setting.size]
    settings = [
        *(f"model=gpt2_{setting.size}", "model.vocab_size=50257", *toy(part.smoke)),
        *(f"train.device={part.device.type}", *overrides_of(part, setting)),
        *(f"train.global_batch={micro}", f"train.micro_batch={micro}", "train.steps=1"),
        *("train.eval_every=0", "train.checkpoint_every=0", "train.sample_tokens=0"),
        *("logging.every=1", "logging.picture=false"),
        f"train.compile_cache={os.environ['TORCHINDUCTOR_CACHE_DIR']}",
    ]
    open_corpus(composed(*settings).data)  # prepares it
    with tempfile.TemporaryDirectory() as folder:
        cold = bench_train.first_step(Path(folder) / "cold", settings)
        part.report(**setting.own, start_cold_s=cold)  # also if there is no time for the other
        return {
            "start_cold_s": cold,
            "start_warm_s": bench_train.first_step(Path(folder) / "warm", settings),
        }


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
    "one micro-batch": ours,
    "start": start,
    "wrappers": wrappers,
    "plain": plain,
    "mars pair": mars_pair,
}
LEARNT = ("ours", "plain")  # of which a later row's time and micro-batch can be told


@dataclass(frozen=True)
class Side:
    """A model that is trained: `step` makes one update, on the same batch again and again."""

    config: Config
    device: Device
    model: GPT2
    step: Callable[[], None]


def settled(
    part: Part, setting: Setting, micro: int, overrides: Sequence[str]
) -> tuple[Config, Device]:
    batch = 4 if part.smoke else BATCH
    own = [f"train.global_batch={batch}", f"train.micro_batch={micro}", *overrides]
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(
            Path(folder),
            [
                *(f"model=gpt2_{setting.size}", f"train.device={part.device.type}"),
                *("model.vocab_size=50257", *own, *toy(part.smoke)),
            ],
        )
    return config, Device.choose(config.train)


def our_side(part: Part, setting: Setting, micro: int, overrides: Sequence[str]) -> Side:
    """train.py's own update, compiled as a whole."""
    own = [f"optim={setting.optimizer}", *overrides_of(part, setting), *overrides]
    own += [f"train.attention={found_attention(part)}"]
    config, device = settled(part, setting, micro, own)
    torch.manual_seed(0)
    model = device.prepare(GPT2(model_config(config, 50257)), config.train)
    parallel = parallelize(
        model, config.parallel, Processes(), device.device, config.train.compiling
    )
    optimizer = create_optimizer(
        named_parameters=model.named_parameters(), compile=config.train.compile, **config.optim
    )
    batches = SameBatch(config.train.global_batch, model.config, device.device)
    parts = (parallel.forward, optimizer, schedule(config), batches, device, parallel)

    def step() -> None:
        with kernels(config.train):
            update(config, 0, *parts)

    return Side(config, device, model, step)


def plain_side(
    part: Part,
    setting: Setting,
    micro: int,
    overrides: Sequence[str],
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer],
) -> Side:
    """As nanoGPT trains: compiled model, torch's clip, fused or looped optimizer."""
    config, device = settled(part, setting, micro, [*PLAIN, *overrides])
    torch.manual_seed(0)
    with torch.device(device.device):
        model = GPT2(model_config(config, 50257))
    forward: Any = model if part.smoke else torch.compile(model)
    rule, lr_schedule = optimizer(model, config.optim["lr"]), schedule(config)
    batches = SameBatch(config.train.global_batch, model.config, device.device)

    def step() -> None:
        for group in rule.param_groups:
            group["lr"] = config.optim["lr"] * lr_schedule(0)
        micros = batches.tokens.split(micro)
        for some in micros:
            tokens = some.to(device.device, non_blocking=True)
            with device.autocast():
                loss = forward(tokens[:, :-1], tokens[:, 1:]) / len(micros)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rule.step()
        rule.zero_grad(set_to_none=True)

    return Side(config, device, model, step)


def fused_adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    wide = [p for p in model.parameters() if p.ndim > 1]
    narrow = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": wide, "weight_decay": 0.1}, {"params": narrow, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def mars_loop(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return MarsLoop(model.parameters())


def step_seconds(rows: list[Row], size: str, compile: bool) -> tuple[float, float] | None:
    """Of one update of 480 sequences with AdamW: in all, and of it the optimizer; of the fastest
    row there is."""
    own = {"size": size, "setting": "ours", "optimizer": "adamw", "with": ""}
    found = [
        row
        for row in rows
        if all(row[key] == value for key, value in own.items())
        and (row["compile"] != "no") == compile
        and "tokens_per_s" in row
    ]
    if not found:
        return None
    row = max(found, key=lambda row: row["tokens_per_s"])
    return BATCH * row["context"] / row["tokens_per_s"], 1e-3 * row["optimizer_ms"]
