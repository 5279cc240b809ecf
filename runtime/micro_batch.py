"""train.micro_batch=auto: the largest micro-batch that fits, found before the first step.

Every process tries divisors of its share of the global batch on its own GPU, eagerly, with room
taken for what the optimizer will hold; all then use the smallest finding. (Compiled, a step needs
less: set a number by hand to use the rest.) The number goes into the run's config.yaml, and a run
that is continued uses it again, so that it sums in the same order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

import torch
from torch import nn

from optim import Optimizer
from runtime.config import AUTO, TrainConfig
from runtime.device import Device
from runtime.errors import ConfigError
from runtime.kernels import kernels
from runtime.parallel import Parallel
from runtime.run import Run, recorded

SPARE = 0.05  # of the GPU's memory, for what fragmentation costs in a long run
CPU_TOKENS = 4096  # of a micro-batch on a CPU: memory there is no limit, caches are


def settle_micro_batch(
    train: TrainConfig,
    run: Run,
    parallel: Parallel,
    optimizer: Optimizer,
    device: Device,
    context: int,
) -> None:
    """Replace train.micro_batch=auto by a number, the same on all processes. ConfigError where it
    cannot be tried, or not even one sequence fits."""
    if train.micro_batch != AUTO:
        return
    processes = parallel.processes
    share = train.global_batch // processes.size
    divisors = [n for n in range(1, share + 1) if share % n == 0]
    before = processes.decide(lambda: recorded(run.dir, "micro_batch"))
    if before in divisors:
        found, why = before, "as this run began"
    elif device.device.type != "cuda":
        fitting = [n for n in divisors if n * context <= CPU_TOKENS]
        found, why = max(fitting, default=1), f"at most {CPU_TOKENS} tokens on {device.name}"
    else:
        if parallel.mesh is not None:
            raise ConfigError(
                "train.micro_batch=auto needs whole weights, for every process tries for itself: "
                "give a number, or use parallel=ddp"
            )
        held = sum(row["state_bytes"] for row in optimizer.table())
        with kernels(train):  # attention=math takes memory that others do not
            own = largest(divisors, lambda n: fits(parallel.model, device, context, n, held))
        found, why = min(processes.gather(own)), f"the largest that fits on {device.name}"
        if not found:
            raise ConfigError(
                f"not one sequence of {context} tokens fits on {device.name}: use a smaller model, "
                f"parallel=fsdp or parallel.activation_checkpointing=true"
            )
    assert isinstance(found, int)
    train.micro_batch = found
    run.notes.append(f"train.micro_batch=auto: {found}, {why}")


def largest(divisors: list[int], fits: Callable[[int], bool]) -> int:
    """The last of the ascending divisors that fits, 0 if none does; those after one that does not
    fit do not either. Halves what is left at each try."""
    return ([0, *divisors])[bisect_right(divisors, False, key=lambda n: not fits(n))]


def fits(model: nn.Module, device: Device, context: int, sequences: int, held: int) -> bool:
    """Whether two micro-batches go through, the second beside the gradients of the first. ``held``:
    bytes to be kept free for others."""
    spare = SPARE * torch.cuda.get_device_properties(device.device).total_memory
    try:
        room = torch.empty(int(held + spare), dtype=torch.uint8, device=device.device)
        for _ in range(2):
            tokens = torch.zeros(sequences, context, dtype=torch.int64, device=device.device)
            with device.autocast():
                loss = model(tokens, tokens)
            loss.backward()
        torch.cuda.synchronize(device.device)  # host sync: memory is found missing when it is used
        del room
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        device.forget_trials()
