"""Symmetric products on a GPU, in every way that optim/symmetric.py has, as multiples of the whole
product's time: x x^T of Muon's stacks, alpha A^2 + beta A, and Newton-Schulz, which has both, all
in bfloat16. A way that does not work here has no figure.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from optim.orthogonalize import newton_schulz
from optim.symmetric import Way, blocks, kernel, syrk, use, whole
from runtime.fastest import seconds
from scripts.gpu_parts import Part, Row

SIZES = {"small": (12, 768), "large": (36, 1280)}  # layers, width
WAYS: dict[str, Way] = {
    "whole": whole,
    "blocks_256": partial(blocks, block=256),
    "blocks_512": partial(blocks, block=512),
    "kernel": kernel,
}
NEEDED = 10.0  # seconds of a size, of which Triton's compiler takes most


def time_products(part: Part, size: str) -> None:
    if part.left() < NEEDED and not part.smoke:
        part.report(size=size, product="x x^T", skipped=f"{part.left():.0f} s left")
        return
    n, d = (2, 32) if part.smoke else SIZES[size]
    x = torch.randn(n, d, 4 * d, device=part.device).bfloat16()
    square = syrk(x)
    works: dict[str, Callable[[], Tensor]] = {
        f"x x^T, {n} x {d} x {4 * d}": partial(syrk, x),
        f"A^2 + A, {n} x {d} x {d}": partial(syrk, square, square),
        f"Newton-Schulz, {n} x {d} x {4 * d}": partial(newton_schulz, x),
    }
    for name, work in works.items():
        with part.attempt(size=size, product=name) as row:
            row |= compare(part, work)
    part.clear()


def compare(part: Part, work: Callable[[], Tensor]) -> Row:
    """Milliseconds of the whole product; of other ways the times of it that they take."""
    times: dict[str, float] = {}
    row: Row = {}
    for name, way in WAYS.items():
        try:
            with use(way):
                times[name] = seconds(part.device, work)
        except Exception as error:  # no triton, or no such kernel on this GPU
            row["without"] = f"{name}: {type(error).__name__}: {error}"[:200]
    ratios = {name: t / times["whole"] for name, t in times.items() if name != "whole"}
    return {"whole_ms": 1e3 * times["whole"], **ratios, **row}
