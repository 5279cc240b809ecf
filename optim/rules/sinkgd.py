"""SinkGD: no state; the gradient's rows and columns brought to equal norms (arXiv 2502.06742).

    X = g;  L times:   each row <- sqrt(cols) row / ||row||
                       each column <- sqrt(rows) column / ||column||
    u = X              entries with an RMS of 1

For the linear layers (rows and columns as in Sinkhorn's scaling of a matrix, columns last);
embeddings, head, gains and biases take Adam. The paper's alpha = 0.05, by which the linear layers'
lr is smaller than Adam's, is their group's ``lr_scale`` here.

No official code exists: this follows the paper's Algorithms 3 and 4. Public ports differ in scale
(without the factors sqrt(rows), sqrt(cols) the lr is another one). The paper divides without an
eps; here a row or column below ``eps`` of the matrix's norm stays small instead of becoming noise.
The update does not see the size of the gradient: it wants large batches, and clipping is idle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optim.blocks import each_fused, state_of_fused
from optim.norms import matrix_norm, norm_along
from optim.rule import Granularity, Rule, State, check_positive


@dataclass(frozen=True)
class SinkGD(Rule):
    granularity: ClassVar[Granularity] = "matrix"

    iterations: int = 5
    eps: float = 1e-8
    fused: int = 1  # matrices stacked in rows (optim/blocks.py)

    def validate(self) -> None:
        check_positive("iterations", self.iterations)
        check_positive("eps", self.eps)

    @state_of_fused
    def init_state(self, param: Tensor) -> State:
        return {}

    @each_fused
    def direction(self, grad: Tensor, state: State, param: Tensor, step: Tensor) -> Tensor:
        rows, cols = grad.shape[-2:]
        x = grad / matrix_norm(grad).clamp(min=torch.finfo(grad.dtype).tiny)
        for _ in range(self.iterations):
            x = x * (cols**0.5 / norm_along(x, -1).clamp(min=self.eps))
            x = x * (rows**0.5 / norm_along(x, -2).clamp(min=self.eps))
        return x


DEFAULTS = {
    "rule": "sinkgd",
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
