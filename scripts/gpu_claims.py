"""Every claim about a GPU by its name.

tests/test_gpu.py holds them under pytest (`pytest -m gpu`), scripts/gpu_check.py without it, on
machines that have torch and little else. They also run on a CPU, where they compare the CPU with
itself and prove nothing but that they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from optim import list_optimizers
from scripts.gpu_invariants import (
    KERNELS,
    clip_does_not_wait,
    compiled_equals,
    logits_equal_cpu,
    optimizer_equals_cpu,
    update_learns_without_waiting,
)
from scripts.gpu_runtime import (
    attention_equals_formula,
    batches_arrive,
    chunked_loss_equals_plain,
    compiled_update_follows_lr,
    graphs_equal_plain,
    largest_micro_batch_fits,
    symmetric_products_equal,
    wrapped_equals_unwrapped,
)

Claim = Callable[[torch.device], dict[str, Any] | None]  # raises, or gives figures

SECONDS: dict[Any, float] = {  # guesses; of the rest a few
    wrapped_equals_unwrapped: 8.0,
    compiled_update_follows_lr: 25.0,
    graphs_equal_plain: 20.0,
    largest_micro_batch_fits: 15.0,
    symmetric_products_equal: 25.0,
    compiled_equals: 10.0,
}
FIRST = ("adamw", "mars_adamw", "muon", "shampoo", "soap", "lion")  # while there is time


def claims(optimizers: Iterable[str] | None = None) -> dict[str, Claim]:
    """All, quick ones first; ``optimizers``: the claims about one of them for these (None: all)."""
    names = list_optimizers() if optimizers is None else list(optimizers)
    names.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    compiled = [name for name in names if name not in KERNELS]
    found: dict[str, Claim] = {
        "the model's logits equal the CPU's": logits_equal_cpu,
        "the gradient clip does not wait": clip_does_not_wait,
        "batches arrive whole, on a queue of their own, without waiting": batches_arrive,
        "every attention kernel equals the formula": attention_equals_formula,
        "a loss in chunks equals the plain one in bf16": chunked_loss_equals_plain,
    }
    for precision in ("fp32", "bf16"):
        found[f"an update in {precision} does not wait and learns"] = partial(
            update_learns_without_waiting, precision
        )
    for name in names:
        found[f"{name} equals the CPU's, and waits for decompositions alone"] = partial(
            optimizer_equals_cpu, name
        )
    found |= {
        "DDP and FSDP2 on one GPU give the unwrapped run's losses": wrapped_equals_unwrapped,
        "a compiled update follows the lr, compiles nothing, does not wait": partial(
            compiled_update_follows_lr, [*compiled, *names][0]
        ),
        "CUDA graphs give the plain run's losses, evaluations between them": graphs_equal_plain,
        "train.micro_batch=auto fits, and the next larger does not": largest_micro_batch_fits,
        "every way of x x^T equals the product, eager and compiled": symmetric_products_equal,
    }
    for name in compiled:
        found[f"{name} compiled equals eager, whatever the lr"] = partial(compiled_equals, name)
    return found


def needed(claim: Claim) -> float:
    """Seconds that should be left for it."""
    return SECONDS.get(getattr(claim, "func", claim), 3.0)
