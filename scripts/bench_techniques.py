"""What single techniques gain on a CPU: each beside its plain counterpart, in one run.

    python -m scripts.bench_techniques spread      roots and bases of Shampoo and SOAP over steps
    python -m scripts.bench_techniques products    x x^T and Newton-Schulz in blocks
    python -m scripts.bench_techniques layers      train.compile_blocks: one graph for all layers

Times are the processor's, of one thread, which other work on the machine disturbs little. What is
compared takes turns; ratios are medians over the turns, with quartiles.

``spread``: worst step over mean step within a period of ten, at bench_optim's 15.5 M parameters.
``layers``: forward and backward pass of a model of GPT-2 nano's width, its first call with nothing
compiled before, and a later one, each depth and way in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from model import GPT2, GPT2Config
from optim import create_optimizer
from optim.orthogonalize import newton_schulz
from optim.symmetric import syrk, use
from runtime.describe import aligned
from runtime.parallel import Compile, parallelize
from runtime.processes import Processes
from scripts.bench_optim import gpt2
from scripts.compose import compose_config

ROOT = Path(__file__).resolve().parents[1]
PERIOD = 10  # steps between two roots, in configs/optim
SHAPES = ((768, 768), (768, 3072), (1536, 1536))


def worked() -> float:
    """Seconds of the processor, of this process and of the compilers that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def seconds(work: Callable[[], object]) -> float:
    start = worked()
    work()
    return worked() - start


def quartiles(values: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def spread(rounds: int) -> list[list[str]]:
    rows = [["optimizer", "worst / mean step", "with spread"]]
    for name in ("shampoo", "soap"):
        settings: Any = OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/optim/{name}.yaml"))
        optimizers = []
        for value in (False, True):
            model = gpt2("small", None, torch.device("cpu"))
            own = settings | {"spread": value, "lr": 1e-5}
            optimizers.append(create_optimizer(named_parameters=model.named_parameters(), **own))
        worst: list[list[float]] = [[], []]
        for _ in range(rounds + 1):  # the first period begins with all of them, whatever is set
            for optimizer, found in zip(optimizers, worst, strict=True):
                steps = [seconds(optimizer.step) for _ in range(PERIOD)]
                found.append(max(steps) / statistics.mean(steps))
        rows.append([name, *(quartiles(found[1:]) for found in worst)])
    return rows


def products(rounds: int) -> list[list[str]]:
    rows = [["product", "dtype", "whole, ms", "blocks / whole"]]
    for dtype in ("float32", "bfloat16"):
        for shape in SHAPES:
            x = torch.randn(1, *shape).to(getattr(torch, dtype))
            works: dict[str, Callable[[], Tensor]] = {
                "x x^T": partial(syrk, x),
                "Newton-Schulz": partial(newton_schulz, x, dtype=dtype),
            }
            for name, work in works.items():
                turns = []
                for _ in range(rounds + 1):
                    pair = []
                    for way in ("whole", "blocks"):
                        with use(way):
                            pair.append(seconds(work))
                    turns.append(pair)
                wholes, ratios = zip(*((a, b / a) for a, b in turns[1:]), strict=True)
                what = f"{name}, {shape[0]} x {shape[1]}"
                milliseconds = f"{1e3 * statistics.median(wholes):.1f}"
                rows.append([what, dtype, milliseconds, quartiles(ratios)])
    return rows


def layers(rounds: int) -> list[list[str]]:
    rows = [["layers", "graph", "first call, s", "a later one, ms"]]
    for depth in (4, 12):
        for way in ("model", "layer"):
            command = [sys.executable, "-m", "scripts.bench_techniques", "--rounds", str(rounds)]
            command += ["--depth", str(depth), way]
            with tempfile.TemporaryDirectory() as cache:
                cold = {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
                found = subprocess.check_output(
                    command, env=os.environ | cold, cwd=ROOT, text=True
                ).split()
            rows.append([str(depth), way, found[0], found[1]])
    return rows


def calls(blocks: bool, depth: int, rounds: int) -> None:
    """Print the seconds of a first call, and the milliseconds of later ones."""
    torch.manual_seed(0)
    shape = GPT2Config(n_layer=depth, n_head=4, n_embd=128, context=64, vocab_size=257)
    model, config = GPT2(shape), compose_config([])
    how = Compile("default", blocks)
    cpu = torch.device("cpu")
    forward = parallelize(model, config.parallel, Processes(), cpu, how).forward
    tokens = torch.randint(257, (16, 65))

    def call() -> None:
        forward(tokens[:, :-1], tokens[:, 1:]).backward()

    first = seconds(call)
    later = statistics.median(seconds(call) for _ in range(rounds))
    print(f"{first:.1f} {1e3 * later:.0f}")


TABLES: dict[str, Callable[[int], list[list[str]]]] = {
    table.__name__: table for table in (spread, products, layers)
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench_techniques",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=[*TABLES, "model", "layer"], metavar="|".join(TABLES))
    parser.add_argument("--rounds", type=int, default=20, help="turns of each side")
    parser.add_argument("--depth", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what not in TABLES:  # a process of `layers`
        calls(args.what == "layer", args.depth, args.rounds)
        return
    print(f"one thread, torch {torch.__version__}, {args.rounds} turns")
    print(aligned(TABLES[args.what](args.rounds)))


if __name__ == "__main__":
    main()
