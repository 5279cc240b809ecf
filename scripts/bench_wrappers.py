"""What DDP's and FSDP2's wrapper costs a step on one process, where there is nothing to gain.

    python -m scripts.bench_wrappers                          the default run's step, on a CPU
    python -m scripts.bench_wrappers model=gpt2_small train.global_batch=8 --rounds 20

Three copies of one model and optimizer, unwrapped, `parallel=ddp` and `parallel=fsdp`, take turns
at train.py's own `update`, as torchrun with one process would make it. The ratio to the unwrapped
step is the median over the turns, so that other load on the machine divides out, once of the time
that passed and, on a CPU, once of the time that the processor worked, which other load disturbs
less; beside them the ratio of the least times, which is what an idle machine would show.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import train
from model import MODELS
from optim import create_optimizer
from runtime.config import Config, model_config, schedule
from runtime.describe import aligned
from runtime.device import Device
from runtime.parallel import parallelize
from runtime.processes import Processes
from scripts.compose import compose_config

STRATEGIES = ("none", "ddp", "fsdp")
WRAPPED = "parallel.wrap_one=true"  # a training run of one process is not
VOCABULARY = 257
WARM_UP = 3  # steps


class Random:
    """The same tokens at every step: uniform ones."""

    def __init__(self, config: Config) -> None:
        shape = (config.train.global_batch, config.model["context"] + 1)
        self.tokens = torch.randint(VOCABULARY, shape)

    def batch(self, step: int) -> Tensor:
        return self.tokens


def stepper(config: Config) -> Callable[[int], Any]:
    """A function that makes one update."""
    alone = config.parallel.strategy == "none"
    processes = Processes() if alone else Processes(control=dist.group.WORLD)
    device = Device.choose(config.train, processes)
    torch.manual_seed(0)
    network = MODELS[config.model["name"]].network(model_config(config, VOCABULARY))
    model, compiled = device.prepare(network, config.train), config.train.compile
    how = config.train.compiling
    parallel = parallelize(model, config.parallel, processes, device.device, how)
    optimizer = create_optimizer(
        named_parameters=model.named_parameters(),
        compile=compiled,
        division=parallel.division,
        **config.optim,
    )
    parts = (parallel.forward, optimizer, schedule(config), Random(config), device, parallel)
    return lambda step: float(train.update(config, step, *parts).losses.mean())  # waits for it


def measure(overrides: list[str], rounds: int) -> None:
    from tqdm import tqdm  # scripts that import this one do without

    steps = {
        name: stepper(compose_config([*overrides, f"parallel={name}", WRAPPED]))
        for name in STRATEGIES
    }
    clocks = {"time": time.perf_counter, "CPU time": time.process_time}
    spent: dict[tuple[str, str], list[float]] = {(c, n): [] for c in clocks for n in STRATEGIES}
    for turn in tqdm(range(WARM_UP + rounds), unit=" rounds", disable=None):
        order = STRATEGIES if turn % 2 else STRATEGIES[::-1]
        for name in order:
            start = {clock: now() for clock, now in clocks.items()}
            steps[name](turn)
            for clock, now in clocks.items() if turn >= WARM_UP else ():
                spent[clock, name].append(now() - start[clock])
    rows = [["", "parallel", "ms", "of unwrapped", "quartiles", "of least"]]
    for (clock, name), own in spent.items():
        base = spent[clock, "none"]
        ratios = [a / b for a, b in zip(own, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        ms, least = statistics.median(own) * 1e3, min(own) / min(base)
        figures = [f"{ms:.1f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"{least:.3f}"]
        rows.append([clock, name, *figures])
    print(aligned(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="SETTING", help="as for train.py")
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        measure(arguments.overrides, arguments.rounds)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
