"""The parts of scripts/gpu_check.py: functions that report what they measure to a `Part`."""

from __future__ import annotations

import gc
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from model import GPT2
from optim import create_optimizer, list_optimizers
from runtime.config import Config, model_config, schedule
from runtime.device import Device
from scripts.gpu_invariants import (
    SameBatch,
    claims,
    compiling_nothing,
    configuration,
    no_waiting,
)
from train import update

ROOT = Path(__file__).resolve().parents[1]
STEPS, WARM_UP = 10, 3  # timed steps of training, and those before them

Row = dict[str, Any]


@dataclass
class Part:
    """What a part is given: its device, its deadline, and where its rows go."""

    device: torch.device
    deadline: float  # of time.monotonic()
    smoke: bool  # toy sizes, nothing compiled but one claim
    rows: IO[str]

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def report(self, **row: Any) -> None:
        """Print a row and keep it, also if the process dies after it."""
        print("   " + "  ".join(f"{k} {short(v)}" for k, v in row.items()), flush=True)
        self.rows.write(json.dumps(row) + "\n")
        self.rows.flush()

    @contextmanager
    def attempt(self, **row: Any) -> Iterator[Row]:
        """Report ``row`` with what the body adds to it, or with its error."""
        try:
            yield row
        except Exception as error:  # every failure is a finding here
            row["error"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
        self.report(**row)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        """Wall time of one call, from an idle device to an idle device."""
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def median(self, work: Callable[[], object], repeat: int) -> float:
        return statistics.median(self.seconds(work) for _ in range(repeat))

    def clear(self) -> None:
        torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


# ---- card ---------------------------------------------------------------------------------------


def card(part: Part) -> None:
    n, elements = (256, 2**16) if part.smoke else (8192, 2**28)
    a, b = (torch.randn(n, n, device=part.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.zeros(elements, device=part.device, dtype=torch.float32)
    target = torch.empty_like(source)
    for _ in range(3):
        a @ b
        target.copy_(source)
    device = Device.choose(configuration(f"train.device={part.device.type}").train)
    part.report(
        device=device.name,
        precision=device.precision,
        datasheet_tflops=None if device.peak_flops is None else device.peak_flops / 1e12,
        bf16_matmul_tflops=2e-12 * n**3 / part.median(lambda: a @ b, 30),
        copy_tb_per_s=8e-12 * elements / part.median(lambda: target.copy_(source), 10),
        memory_gb=torch.cuda.get_device_properties(0).total_memory / 1e9
        if part.device.type == "cuda"
        else None,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        python=sys.version.split()[0],
    )


# ---- claims -------------------------------------------------------------------------------------


def hold_claims(part: Part) -> None:
    for name, claim in claims(["adamw"] if part.smoke else None).items():
        if part.left() < 0:
            part.report(claim=name, skipped="no time left")
            continue
        with part.attempt(claim=name) as row:
            row["seconds"] = part.seconds(lambda claim=claim: claim(part.device))  # type: ignore[misc]


# ---- optimizers ---------------------------------------------------------------------------------

FIRST = ("adamw", "mars_adamw", "muon", "lion", "mars_lion")  # compiled while there is time


def time_optimizers(part: Part) -> None:
    names = list_optimizers()
    names.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    for size, mode in (("small", "eager"), ("small", "compiled"), ("medium", "eager")):
        config = configuration(*shape_overrides(size, part.smoke))
        torch.manual_seed(0)
        with torch.device(part.device):
            model = GPT2(model_config(config, 50257))
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        fused = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        fused.step()
        for name in names:
            if part.left() < 0:
                part.report(size=size, optimizer=name, mode=mode, skipped="no time left")
                continue
            with part.attempt(size=size, optimizer=name, mode=mode) as row:
                time_optimizer(part, row, model, fused)
            part.clear()


def time_optimizer(part: Part, row: Row, model: nn.Module, fused: torch.optim.Optimizer) -> None:
    """Milliseconds of one update, host included, in turns with torch's fused AdamW."""
    compile = row["mode"] == "compiled" and not part.smoke
    ours = create_optimizer(row["optimizer"], model.named_parameters(), compile=compile, lr=1e-5)
    row["first_s"] = part.seconds(ours.step)
    ours.step()
    mine, other = list[float](), list[float]()
    end, repeat = time.monotonic() + 2, 3 if part.smoke else 30
    while len(mine) < 3 or (len(mine) < repeat and time.monotonic() < end):
        mine.append(part.seconds(ours.step))
        other.append(part.seconds(fused.step))
    row["ms"] = 1e3 * statistics.median(mine)
    row["mean_ms"] = 1e3 * statistics.fmean(mine)  # where it does more every tenth step
    row["fused_adamw_ms"] = 1e3 * statistics.median(other)
    row["times_fused"] = row["ms"] / row["fused_adamw_ms"]
    if part.device.type == "cuda":
        ours.set_lr(2e-5)
        with no_waiting(part.device), compiling_nothing():
            ours.step()
        row["waits"] = row["compiles_again"] = False  # else there is an error now


# ---- training -----------------------------------------------------------------------------------


def train_briefly(part: Part) -> None:
    """train.py from text to summary; asked to stop, as by a scheduler, if time runs out."""
    model = "gpt2_nano" if part.smoke else "gpt2_small"
    steps, rows = (20, 4) if part.smoke else (250, 32)
    with tempfile.TemporaryDirectory() as folder, part.attempt(model=model) as row:
        command = [
            *(sys.executable, "train.py", f"model={model}", "optim.lr=6e-4", "train.compile=false"),
            *(
                f"train.steps={steps}",
                f"train.global_batch={rows}",
                f"train.eval_every={steps // 5}",
            ),
            *("train.eval_tokens=65536", "train.sample_tokens=64", "train.checkpoint_every=0"),
            *("logging.picture=false", f"paths.runs={folder}", f"paths.cache={folder}/cache"),
        ]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            output, _ = process.communicate(timeout=max(part.left() - 15, 5))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=20)
        if process.returncode != 0:
            raise RuntimeError(f"train.py ended with exit code {process.returncode}: see the log")
        result = json.loads(output.splitlines()[-1])
        run = Path(result.pop("run_dir"))
        summary = json.loads((run / "summary.json").read_text())
        kept = ("val_bits_per_byte", "bigram_bits_per_byte", "elapsed_s", "memory_gb", "stopped_by")
        row |= result | {key: summary[key] for key in kept}
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        row["tokens_per_s"] = statistics.median(
            line["tokens_per_s"] for line in lines if "tokens_per_s" in line
        )


# ---- speed --------------------------------------------------------------------------------------

SIZES = {"small": (64, 128), "medium": (32, 64), "large": (16, 32)}  # micro-batch, global batch
PLAIN = (  # what nanoGPT's train.py sets, on our network
    "model.bias=false",
    "model.exact_gelu=true",
    "model.mask_padding=false",
    "train.compile=true",
)
SETTINGS = {"ours eager": (), "ours compiled": ("train.compile=true",), "plain": PLAIN}


def measure_speed(part: Part) -> None:
    """All sizes eager first, which takes seconds and finds the micro-batch that fits."""
    micro = {size: SIZES[size][0] for size in SIZES}
    compiling = 3.0  # seconds per layer; a guess until there is a reading
    for setting, size in [("ours eager", size) for size in SIZES] + [
        (setting, size) for size in SIZES for setting in ("ours compiled", "plain")
    ]:
        layers = configuration(f"model=gpt2_{size}").model["n_layer"]
        needed = 10 if setting == "ours eager" else 10 + compiling * layers
        if part.left() < needed:
            part.report(size=size, setting=setting, skipped=f"{needed:.0f} s needed, not left")
            continue
        with part.attempt(size=size, setting=setting) as row:
            while True:
                measured = try_speed(part, size, SETTINGS[setting], micro[size], setting == "plain")
                part.clear()
                if measured is not None:
                    break
                micro[size] //= 2
            row |= measured
            if setting != "ours eager":
                compiling = measured["first_step_s"] / layers


def try_speed(
    part: Part, size: str, setting: tuple[str, ...], micro: int, plain: bool
) -> Row | None:
    """One row, or None where the micro-batch does not fit."""
    overrides = [*shape_overrides(size, part.smoke), *setting, f"train.device={part.device.type}"]
    rows = SIZES[size][1]
    overrides += [f"train.global_batch={rows}", f"train.micro_batch={micro}"]
    try:
        return speed(part, configuration(*overrides), plain)
    except torch.OutOfMemoryError:
        if micro == 1:
            raise
        return None


def speed(part: Part, config: Config, plain: bool) -> Row:
    device, shape = Device.choose(config.train), model_config(config, 50257)
    torch.manual_seed(0)
    with torch.device(device.device):
        model = GPT2(shape)
    batches = SameBatch(config.train.global_batch, shape, device.device)
    step_of = plain_step if plain else our_step
    one = step_of(config, model, batches, device)
    first = part.seconds(lambda: one(0))
    warm = part.median(lambda: one(1), WARM_UP)
    repeat = max(3, min(STEPS, int(10 / warm)))
    # all steps in one go, as in training, where the host runs ahead of the device
    whole = part.seconds(lambda: [one(2 + i) for i in range(repeat)])
    loss = one(2 + repeat).mean().item()
    tokens = config.train.global_batch * shape.context
    flops = model.flops_per_token(shape.context)
    return {
        "micro_batch": config.train.micro_batch,
        "tokens_per_step": tokens,
        "precision": device.precision,
        "first_step_s": first,
        "step_ms": 1e3 * whole / repeat,
        "tokens_per_s": tokens * repeat / whole,
        "palm_tflops": 1e-12 * flops.palm * tokens * repeat / whole,
        "causal_tflops": 1e-12 * flops.causal * tokens * repeat / whole,
        "memory_gb": device.memory_gb(),
        "loss": loss,  # of one batch repeated: to see that it learns
    }


Step = Callable[[int], torch.Tensor]


def our_step(config: Config, model: GPT2, batches: SameBatch, device: Device) -> Step:
    """train.py's update."""
    optimizer = create_optimizer(
        named_parameters=model.named_parameters(), compile=config.train.compile, **config.optim
    )
    forward: Any = torch.compile(model, dynamic=False) if config.train.compile else model
    lr_schedule = schedule(config)
    return lambda step: (
        update(config, step, forward, optimizer, lr_schedule, batches, device).losses
    )


def plain_step(config: Config, model: GPT2, batches: SameBatch, device: Device) -> Step:
    """nanoGPT's: compiled model, fused AdamW on two groups, torch's clip."""
    wide = [p for p in model.parameters() if p.ndim > 1]
    narrow = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": wide, "weight_decay": 0.1}, {"params": narrow, "weight_decay": 0.0}],
        lr=config.optim["lr"],
        betas=(0.9, 0.95),
        fused=True,
    )
    forward = torch.compile(model)
    lr_schedule = schedule(config)

    def step(number: int) -> torch.Tensor:
        for group in optimizer.param_groups:
            group["lr"] = config.optim["lr"] * lr_schedule(number)
        micros = batches.batch(number).split(config.train.micro_batch or len(batches.tokens))
        losses = []
        for micro in micros:
            tokens = device.to_device(micro)
            with device.autocast():
                loss = forward(tokens[:, :-1], tokens[:, 1:]) / len(micros)
            loss.backward()
            losses.append(loss.detach() * len(micros))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses)

    return step


def shape_overrides(size: str, smoke: bool) -> list[str]:
    if not smoke:
        return [f"model=gpt2_{size}"]
    toy = {"n_layer": 1, "n_head": 2, "n_embd": 32, "context": 16, "vocab_size": 500}
    return [f"model=gpt2_{size}", *(f"model.{key}={value}" for key, value in toy.items())]


def short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return " ".join(str(value).split())[:80]
