"""One process in DDP and in FSDP2 beside the unwrapped model, for the GPU check."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from scripts.bench_wrappers import STRATEGIES, WARM_UP, WRAPPED, stepper
from scripts.compose import compose_config


@contextmanager
def one_process() -> Iterator[None]:
    """A job of this process alone, as torchrun --nproc_per_node=1 starts it."""
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def steppers(overrides: Sequence[str]) -> dict[str, Callable[[int], Any]]:
    """By strategy, a function that makes one update and gives its loss."""
    return {
        name: stepper(compose_config([*overrides, f"parallel={name}", WRAPPED]))
        for name in STRATEGIES
    }


def turns(overrides: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of each strategy's step, turn by turn."""
    times: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    with one_process():
        steps = steppers(overrides)
        for turn in range(WARM_UP + rounds):
            for name in STRATEGIES if turn % 2 else STRATEGIES[::-1]:
                start = time.perf_counter()
                steps[name](turn)
                if turn >= WARM_UP:
                    times[name].append(time.perf_counter() - start)
    return times
