"""Whose kernels compute attention and the optimizer's symmetric products: settled before the first
step (`settle_kernels`), in force during the loop (`kernels`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from optim import Optimizer
from optim.symmetric import use
from runtime import attention, symmetric
from runtime.config import AUTO, TrainConfig
from runtime.device import Device
from runtime.errors import ConfigError
from runtime.fastest import settle
from runtime.processes import Processes
from runtime.run import Run


def settle_kernels(
    train: TrainConfig,
    run: Run,
    processes: Processes,
    device: Device,
    shape: Any,
    optimizer: Optimizer,
) -> None:
    """Replace auto in train.attention and train.symmetric by names, the same on all processes.
    ``shape``: the model's config. ConfigError for a kernel that cannot run here."""
    works = partial(symmetric.works, device=device.device)
    if not works(train.symmetric):
        raise ConfigError(
            f"train.symmetric={train.symmetric} needs a GPU and triton, which torch's builds for "
            f"CUDA bring: use auto, whole or blocks on {device.name}"
        )
    gpu = device.device.type == "cuda"

    def of_attention() -> dict[str, float]:
        return attention.measure(device, shape) if gpu else {}

    def of_products() -> dict[str, float]:
        found = symmetric.products(optimizer, processes.size) if gpu else None
        return symmetric.measure(found, device.device) if found else {}

    settle(train, "attention", run, processes, of_attention, "default")
    settle(train, "symmetric", run, processes, of_products, AUTO, works)
    if gpu:
        device.forget_trials()


@contextmanager
def kernels(train: TrainConfig) -> Iterator[None]:
    """Within, the kernels are those that train names."""
    with attention.attention(train.attention), use(train.symmetric):
        yield
