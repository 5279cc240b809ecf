"""The mask behind a rule: none, or cautious (arXiv 2411.16085).

A cautious optimizer keeps only the entries of its update that agree in sign with the present
gradient, and scales the rest up so that the mean size is kept: u * 1[u g > 0] / mean(1[u g > 0]),
the mean clamped at 1e-3 (kyleliang919/C-Optim c_adamw.py).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from optim.norms import mean

Mask = Callable[[Tensor, Tensor], Tensor]


def no_mask(u: Tensor, grad: Tensor) -> Tensor:
    return u


def cautious(u: Tensor, grad: Tensor) -> Tensor:
    keep = (u * grad > 0).to(u.dtype)
    return u * keep / mean(keep).clamp(min=1e-3)


MASKS: dict[str, Mask] = {"none": no_mask, "cautious": cautious}
