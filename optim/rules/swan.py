"""SWAN: no state at all; the gradient normalized, then whitened (arXiv 2412.13148).

    G' = (G - row mean) / row std                            GradNorm
    u  = (G' G'^T)^(-1/2) G'  scaled to the norm sqrt(rows cols)     GradWhitening

For the linear layers; embeddings, head, gains and biases take Adam. As in SinkGD, by the same
authors, the smaller lr of the linear layers (alpha) is their group's ``lr_scale``.

No official code exists. As printed, with the coupled Newton-Schulz iteration started from G' G'^T,
it diverges: the iteration needs singular values below sqrt(3). So G' is divided by its norm first,
as the public ports do, and matrices taller than wide are transposed for the whitening. Rows without
variation, where the paper divides by 0, get a zero update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optim.blocks import each_fused, state_of_fused
from optim.matrix_roots import inverse_square_root
from optim.norms import matrix_norm, norm_along
from optim.rule import Granularity, Rule, State, check_positive
from optim.symmetric import syrk


@dataclass(frozen=True)
class Swan(Rule):
    granularity: ClassVar[Granularity] = "matrix"

    ns_steps: int = 10
    ns_beta: float = 0.5
    fused: int = 1  # matrices stacked in rows (optim/blocks.py)

    def validate(self) -> None:
        check_positive("ns_steps", self.ns_steps)
        check_positive("ns_beta", self.ns_beta)

    @state_of_fused
    def init_state(self, param: Tensor) -> State:
        return {}

    @each_fused
    def direction(self, grad: Tensor, state: State, param: Tensor, step: Tensor) -> Tensor:
        rows, cols = grad.shape[-2:]
        tiny = torch.finfo(grad.dtype).tiny
        x = grad - grad.mean(-1, keepdim=True)
        x = x / norm_along(x, -1).clamp(min=tiny)  # times sqrt(cols), which cancels
        x = x / matrix_norm(x).clamp(min=tiny)
        wide = x.mT if rows > cols else x
        wide = inverse_square_root(syrk(wide), self.ns_steps, self.ns_beta) @ wide
        x = wide.mT if rows > cols else wide
        return x / matrix_norm(x).clamp(min=tiny) * (rows * cols) ** 0.5


DEFAULTS = {
    "rule": "swan",
    "lr": 0.02,
    "weight_decay": 0.0,
    "groups": {
        "matrices": {"match": ["matrix"], "lr_scale": 0.05},
        "others": {
            "match": ["embedding", "head", "vector"],
            "rule": "adamw",
            "betas": (0.9, 0.95),
        },
    },
}
