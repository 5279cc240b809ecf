"""train.symmetric: how the optimizer computes its symmetric products, x x^T (optim/symmetric.py).

On a GPU auto measures the ways once, at the very products of an ordinary step: their shapes,
strides and dtypes, in which Newton-Schulz is bfloat16 and a Shampoo's factors are float32. It
leaves out those that fail or do not give the plain product (runtime/fastest.py). They run eagerly,
also for an optimizer that will be compiled: what the compiler joins to a product is small beside
it. On a CPU nothing is measured: auto is blocks in float32, where they gain, and whole elsewhere.
"""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from optim import Optimizer
from optim.rules import build_rule
from optim.symmetric import WAYS, use, whole
from runtime.config import AUTO
from runtime.fastest import agree, seconds

BETA, ALPHA = 0.5, 2.0


class Product(NamedTuple):
    """alpha x x^T + beta plus of a stack."""

    shape: tuple[int, ...]  # of x: n, rows, cols
    stride: tuple[int, ...]
    dtype: torch.dtype
    plus: bool


def works(name: str, device: torch.device) -> bool:
    return name != "kernel" or (device.type == "cuda" and find_spec("triton") is not None)


def products(optimizer: Optimizer, processes: int = 1) -> Counter[Product]:
    """The symmetric products of an ordinary step on a GPU, and how many of each: what `syrk` is
    called with when the rules go through one with tensors that have a shape and no values. Of many
    processes each updates its share of the matrices."""
    found: Counter[Product] = Counter()

    def note(x: Tensor, plus: Tensor | None, beta: float, alpha: float) -> Tensor:
        found[Product(tuple(x.shape), x.stride(), x.dtype, plus is not None)] += 1
        return whole(x, plus, beta, alpha)

    with use(note), torch.no_grad():
        for group in optimizer.param_groups:
            rule = build_rule(group["rule"], group["hyper"])
            if rule.granularity != "matrix":
                continue
            alike = Counter((tuple(p.shape), p.dtype) for p in group["params"])
            for (shape, dtype), count in alike.items():
                param = torch.empty(shape, dtype=torch.promote_types(dtype, torch.float32))
                param = param.to("meta")
                n = ceil(count / processes)
                state = rule.init_state(param)
                stacked = {key: t.new_empty(n, *t.shape) for key, t in state.items()}
                stack = param.new_empty(n, *shape)
                rule.direction(stack, stacked, stack, torch.ones((), dtype=torch.float64))
    return found


def measure(found: Counter[Product], device: torch.device) -> dict[str, float]:
    """Seconds of all these products by way, of those ways that work; of one at least."""
    times: dict[str, float] = {}
    for name in WAYS:
        if name != AUTO:
            try:
                times[name] = sum(n * _seconds(name, p, device) for p, n in found.items())
            except Exception:  # no triton, or none for this GPU; no memory; a wrong result
                continue
    return times or {"whole": float("nan")}


def _seconds(name: str, product: Product, device: torch.device) -> float:
    """Of one product; ArithmeticError where it is not the plain one."""
    x = torch.empty_strided(product.shape, product.stride, dtype=product.dtype, device=device)
    x.normal_()
    plus = whole(x, None, 1.0, 1.0) if product.plus else None
    exact = torch.promote_types(x.dtype, torch.float32)
    one = None if plus is None else plus[:1].to(exact)
    expected = whole(x[:1].to(exact), one, BETA, ALPHA)
    way = WAYS[name]
    if not agree([way(x, plus, BETA, ALPHA)[:1]], [expected], x.dtype):
        raise ArithmeticError(f"{name} does not give the product of {product}")
    return seconds(device, lambda: way(x, plus, BETA, ALPHA))
