"""What a step of each optimizer costs: time, as a multiple of torch's fused AdamW, and memory.

    python -m scripts.bench_optim                                every optimizer, eager and compiled
    python -m scripts.bench_optim lion mars_adamw --naive        these, and MARS-AdamW as a loop
    python -m scripts.bench_optim mars_adamw --first-call        and how long its compilation takes
    python -m scripts.bench_optim --models gpt2_nano gpt2_small  at the sizes of configs/model

Settings are those of configs/optim. Steps take turns with `torch.optim.AdamW(fused=True)` on the
same parameters and random gradients, because a machine that somebody shares has no fixed speed:
trust the ratios. They are the medians of the ratios of neighboring turns, in which other load
divides out; beside them stands the ratio of the two least times, which is what an idle machine
would show. A turn is ten steps, in which rules that do more every tenth step do so once.

``--first-call`` times the first compiled step in a process of its own, from the import of torch's
compiler on: cold (an empty cache of kernels) and warm (the same again). ``--naive`` adds MARS-AdamW
as its authors write it, a Python loop over the parameters with a branch on each norm, which on a
GPU waits for each of them. ``--out`` adds rows to a CSV and renews those that it has.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from model import GPT2, GPT2Config
from optim import create_optimizer, list_optimizers
from runtime.describe import aligned

ROOT = Path(__file__).resolve().parents[1]
# 15.5 M parameters in 76 tensors: large enough that memory, not calls, takes the time of a step
SMALL = {"n_layer": 6, "n_head": 6, "n_embd": 384, "context": 256}
VOCABULARIES = {"small": 12288}  # like GPT-2's, the rest's, too long for SOAP to precondition
GPT2_VOCABULARY = 50257
TURN = 10  # steps
LEAST_TURNS = 2
LR = 1e-5  # random gradients lead nowhere: stay where the parameters are finite
KEY = ("parameters", "optimizer", "mode")
FIGURES = ("ms", "ms_min", "ms_max", "fused_adamw_ms", "times_fused", "times_fused_least")
COLUMNS = (*KEY, *FIGURES, "state_bytes", "first_cold_s", "first_warm_s")
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
                state["last"].copy_(p.grad)  # as ours: gradient buffers may be reused


def gpt2(name: str, layers: int | None, device: torch.device) -> nn.Module:
    """The model "small" or configs/model/<name>.yaml, with a random gradient for each parameter."""
    file = ROOT / "configs" / "model" / f"{name}.yaml"
    sizes: Any = SMALL if name == "small" else OmegaConf.load(file)
    shape = {key: sizes[key] for key in SMALL}
    shape |= {} if layers is None else {"n_layer": layers}
    torch.manual_seed(0)
    with device:
        model = GPT2(GPT2Config(**shape, vocab_size=VOCABULARIES.get(name, GPT2_VOCABULARY)))
        for p in model.parameters():
            p.grad = 1e-3 * torch.randn_like(p)
    return model


def optimizer_of(name: str, mode: str, model: nn.Module) -> torch.optim.Optimizer:
    if mode == "naive":
        return MarsLoop(model.parameters())
    settings: Any = OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/optim/{name}.yaml"))
    named, compile = model.named_parameters(), mode == "compiled"
    return create_optimizer(named_parameters=named, compile=compile, **settings | {"lr": LR})


def seconds(step: Callable[[], object], steps: int, device: torch.device) -> float:
    """Wall time of one step, from an idle device to an idle device."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def state_bytes(optimizer: torch.optim.Optimizer, model: nn.Module) -> float:
    """Bytes of state per parameter of the model."""
    held = [t for state in optimizer.state.values() for t in state.values()]
    tensors = [t.numel() * t.element_size() for t in held if isinstance(t, torch.Tensor)]
    return sum(tensors) / sum(p.numel() for p in model.parameters())


def measure(name: str, mode: str, model: nn.Module, args: argparse.Namespace) -> Row:
    """Turns of the optimizer and torch's fused AdamW, until the row's time is used."""
    optimizer = optimizer_of(name, mode, model)
    fused = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    sides = (optimizer.step, fused.step)
    for step in sides:
        seconds(step, TURN, args.device)  # compiles, creates state, is past what starts late
    turns: list[list[float]] = []
    end = time.monotonic() + args.seconds
    while len(turns) < LEAST_TURNS or time.monotonic() < end:
        turns.append([1e3 * seconds(step, TURN, args.device) for step in sides])
    ours, theirs = zip(*turns, strict=True)
    return {
        "ms": statistics.median(ours),
        "ms_min": min(ours),
        "ms_max": max(ours),
        "fused_adamw_ms": statistics.median(theirs),
        "times_fused": statistics.median(a / b for a, b in turns),
        "times_fused_least": min(ours) / min(theirs),
        "state_bytes": state_bytes(optimizer, model),
    }


def first_calls(name: str, model: str, args: argparse.Namespace) -> Row:
    """Seconds of the first compiled step in a new process: without, then with, a filled cache."""
    command = [sys.executable, "-m", "scripts.bench_optim", name, "--models", model, "--once"]
    command += ["--device", str(args.device), "--threads", str(args.threads)]
    command += [] if args.layers is None else ["--layers", str(args.layers)]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        cold, warm = (
            float(subprocess.check_output(command, env=environment, cwd=ROOT, text=True))
            for _ in range(2)
        )
    return {"first_cold_s": cold, "first_warm_s": warm}


def text(row: Row, column: str) -> str:
    value = row.get(column, "")
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def save(rows: list[Row], path: Path) -> None:
    """Rows into the CSV, in place of those of the same model, optimizer and mode."""
    kept: dict[tuple[str, ...], Row] = {}
    if path.is_file():
        with path.open(newline="") as file:
            kept = {tuple(row[k] for k in KEY): row for row in csv.DictReader(file)}
    for row in rows:
        written = {column: text(row, column) for column in COLUMNS}
        kept[tuple(written[k] for k in KEY)] = written
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(kept[key] for key in sorted(kept, key=lambda k: (int(k[0]), *k[1:])))
    temporary.replace(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("optimizers", nargs="*", metavar="optimizer", help="none: all")
    parser.add_argument("--models", nargs="+", default=["small"], help="small, or of configs/model")
    parser.add_argument("--layers", type=int, help="another depth")
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--naive", action="store_true", help="MARS-AdamW as a Python loop")
    parser.add_argument("--seconds", type=float, default=5.0, help="of measured turns per row")
    parser.add_argument("--first-call", action="store_true", help="time compilation, cold and warm")
    parser.add_argument("--once", action="store_true", help="print the time of one compiled step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, help="write the table here as CSV")
    args = parser.parse_args()
    for given, valid in ((args.optimizers, list_optimizers()), (args.modes, ["eager", "compiled"])):
        if unknown := set(given) - set(valid):
            parser.error(f"{', '.join(unknown)}: expected of {', '.join(valid)}")
    args.optimizers = args.optimizers or list_optimizers()
    return args


def main() -> None:
    from tqdm import tqdm  # scripts that import this one do without

    args = parse()
    torch.set_num_threads(args.threads)
    if args.once:
        model = gpt2(args.models[0], args.layers, args.device)
        alone = optimizer_of(args.optimizers[0], "compiled", model)
        print(seconds(alone.step, 1, args.device))
        return
    cases = [(name, mode) for name in args.optimizers for mode in args.modes]
    cases += [("mars_adamw", "naive")] if args.naive else []
    print(f"{args.device}, {args.threads} threads, torch {torch.__version__}")
    rows: list[Row] = []
    for size in args.models:
        model = gpt2(size, args.layers, args.device)
        count = sum(p.numel() for p in model.parameters())
        for name, mode in (bar := tqdm(cases, f"{count:,} parameters", disable=None)):
            bar.set_postfix_str(f"{name} {mode}")
            row = {"parameters": count, "optimizer": name, "mode": mode}
            rows.append(row | measure(name, mode, model, args))
            torch.compiler.reset()
            if args.first_call and mode == "compiled":
                rows[-1] |= first_calls(name, size, args)
            tqdm.write("  ".join(text(rows[-1], column) for column in COLUMNS))
            if args.out:
                save(rows[-1:], args.out)
    print("\n" + aligned([COLUMNS, *([text(row, c) for c in COLUMNS] for row in rows)]))


if __name__ == "__main__":
    main()
