"""What a step of each optimizer costs: time, as a multiple of torch's fused AdamW, and memory.

    python -m scripts.bench_optim                                  every optimizer, eager
    python -m scripts.bench_optim adamw lion mars_adamw --compile  these, eager and compiled
    python -m scripts.bench_optim --device cuda model=gpt2_small   any override of configs/ selects
                                                                   a model; the default has 13.9 M

Steps take turns with `torch.optim.AdamW(fused=True)` on the same parameters and random gradients,
because a machine that somebody shares has no fixed speed: trust the ratios. They are the medians of
the ratios of neighboring turns, in which a neighbor's load divides out; beside them stands the
ratio of the two least times, which is what an idle machine would show.

``--compile`` adds the first call, in a process of its own: cold (an empty cache of kernels) and
warm (the same again). Beside ours stands MARS-AdamW as its authors write it, a Python loop over the
parameters with a branch on each norm, which on a GPU waits for each of them.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model import GPT2
from optim import create_optimizer, list_optimizers
from runtime.config import model_config
from runtime.describe import aligned
from scripts.gpu_invariants import configuration

BENCH_MODEL = ["model.n_layer=6", "model.n_head=6", "model.n_embd=384", "model.context=256"]
BENCH_MODEL += ["model.vocab_size=8192", "model.vocab_multiple=64"]
GPT2_VOCABULARY = 50257
LR = 1e-5  # random gradients lead nowhere: stay where the parameters are finite
Row = dict[str, Any]


class MarsLoop(torch.optim.Optimizer):
    """MARS-AdamW the obvious way: tensor by tensor, and `if` the norm is above 1."""

    def __init__(self, params: Any, betas: tuple[float, float] = (0.95, 0.99)) -> None:
        super().__init__(params, {"betas": betas, "gamma": 0.025, "eps": 1e-8, "lr": LR, "t": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (beta1, beta2), gamma, lr = group["betas"], group["gamma"], group["lr"]
            group["t"] += 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {key: torch.zeros_like(p) for key in ("m", "v", "last")}
                m, v, c = state["m"], state["v"], p.grad
                if p.ndim > 1:  # gains and biases take plain AdamW
                    c = p.grad + gamma * beta1 / (1 - beta1) * (p.grad - state["last"])
                    size = torch.linalg.vector_norm(c)
                    if size > 1:  # host sync
                        c = c / size
                m.mul_(beta1).add_(c, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(c, c, value=1 - beta2)
                root = v.sqrt() / (1 - beta2 ** group["t"]) ** 0.5
                update = m / (1 - beta1 ** group["t"]) / (root + group["eps"])
                p.add_(update + 0.01 * p, alpha=-lr)
                state["last"] = p.grad


def parameters(overrides: list[str], device: torch.device) -> nn.Module:
    """The model, with a random gradient for each parameter."""
    config = configuration(*(overrides or BENCH_MODEL))
    torch.manual_seed(0)
    with device:
        model = GPT2(model_config(config, GPT2_VOCABULARY))
        for p in model.parameters():
            p.grad = 1e-3 * torch.randn_like(p)
    return model


def seconds(work: Callable[[], object], repeat: int, device: torch.device) -> float:
    """Wall time of one call, from an idle device to an idle device."""
    start = time.perf_counter()
    for _ in range(repeat):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeat


def state_bytes(optimizer: torch.optim.Optimizer, model: nn.Module) -> float:
    """Bytes of state per parameter of the model."""
    held = [t for state in optimizer.state.values() for t in state.values()]
    tensors = [t.numel() * t.element_size() for t in held if isinstance(t, torch.Tensor)]
    return sum(tensors) / sum(p.numel() for p in model.parameters())


def contenders(
    names: list[str], model: nn.Module, compile: bool
) -> Iterator[tuple[str, str, torch.optim.Optimizer]]:
    """Name, mode and optimizer of each row; one at a time, because each holds its state."""
    for name in names:
        for mode in ("eager", "compiled")[: 1 + compile]:
            named = model.named_parameters()
            yield name, mode, create_optimizer(name, named, lr=LR, compile=mode == "compiled")
    if "mars_adamw" in names:
        yield "mars_adamw, Python loop", "eager", MarsLoop(model.parameters())


def measure(optimizer: torch.optim.Optimizer, model: nn.Module, args: argparse.Namespace) -> Row:
    """Turns of the optimizer and torch's fused AdamW."""
    fused = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    sides = (optimizer.step, fused.step)
    for step in sides:
        seconds(step, 3, args.device)  # compiles, creates state
    turns = [[seconds(step, args.steps, args.device) for step in sides] for _ in range(args.reps)]
    ours, theirs = ([1e3 * t for t in side] for side in zip(*turns, strict=True))
    return {
        "ms": statistics.median(ours),
        "ms_min": min(ours),
        "ms_max": max(ours),
        "fused_adamw_ms": statistics.median(theirs),
        "times_fused": statistics.median(a / b for a, b in turns),
        "times_fused_least": min(ours) / min(theirs),
        "state_bytes": state_bytes(optimizer, model),
    }


def first_calls(name: str, args: argparse.Namespace) -> Row:
    """Seconds of the first compiled step in a new process: without, then with, a filled cache."""
    command = [sys.executable, "-m", "scripts.bench_optim", name, *args.overrides, "--first-call"]
    command += ["--device", str(args.device), "--threads", str(args.threads)]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        cold, warm = (
            float(subprocess.check_output(command, env=environment, cwd=ROOT, text=True))
            for _ in range(2)
        )
    return {"first_cold_s": cold, "first_warm_s": warm}


ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("ms", "ms_min", "ms_max", "times_fused", "times_fused_least", "state_bytes")
FIRST = ("first_cold_s", "first_warm_s")


def text(row: Row, column: str) -> str:
    value = row.get(column, "")
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("arguments", nargs="*", help="optimizers, and overrides such as model=...")
    parser.add_argument("--compile", action="store_true", help="compiled steps too")
    parser.add_argument("--steps", type=int, default=10, help="steps per turn")
    parser.add_argument("--reps", type=int, default=10, help="turns of each side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, help="write the table here as CSV")
    parser.add_argument("--first-call", action="store_true", help="only time one compiled step")
    args = parser.parse_args()
    names = [a for a in args.arguments if "=" not in a] or list_optimizers()
    args.overrides = [a for a in args.arguments if "=" in a]
    torch.set_num_threads(args.threads)
    model = parameters(args.overrides, args.device)

    if args.first_call:
        alone = create_optimizer(names[0], model.named_parameters(), lr=LR, compile=True)
        print(seconds(alone.step, 1, args.device))
        return
    print(
        f"GPT-2 of {sum(p.numel() for p in model.parameters()):,} parameters, {args.device}, "
        f"{args.threads} threads, torch {torch.__version__}; {args.reps} turns of {args.steps}"
    )
    rows: list[Row] = []
    columns = ["optimizer", "mode", *COLUMNS, *(FIRST if args.compile else ())]
    for name, mode, optimizer in contenders(names, model, args.compile):
        rows.append({"optimizer": name, "mode": mode, **measure(optimizer, model, args)})
        torch.compiler.reset()
        if mode == "compiled":
            rows[-1] |= first_calls(name, args)
        print("  ".join(text(rows[-1], column) for column in columns), flush=True)
    print("\n" + aligned([columns, *([text(row, c) for c in columns] for row in rows)]))
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*columns[:2], "fused_adamw_ms", *columns[2:]])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
