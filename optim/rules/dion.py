"""Dion: orthonormal updates of low rank, with error feedback (arXiv 2504.05295, Algorithm 1).

    M <- M + g
    P = qr(M Q)                              orthonormal columns, rows x r
    R = M^T P                                one power iteration towards M's top r directions
    M <- M - (1 - mu) P R^T                  what was not applied stays in the buffer
    Q = R / (||column|| + eps)               cols x r
    u = sqrt(rows / cols) P Q^T

As microsoft/dion dion_simple.py (its distributed version transposes by layout and approximates the
QR). Q starts random from a fixed seed, so that every process has the same. r is at most
``rank`` and the matrix's sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optim.blocks import each_fused, state_of_fused
from optim.norms import norm_along
from optim.rule import Granularity, Rule, State, check_beta, check_positive, zeros


@dataclass(frozen=True)
class Dion(Rule):
    granularity: ClassVar[Granularity] = "matrix"

    momentum: float = 0.95
    rank: int = 768
    eps: float = 1e-8
    fused: int = 1  # matrices stacked in rows (optim/blocks.py)

    def validate(self) -> None:
        check_beta("momentum", self.momentum)
        check_positive("rank", self.rank)
        check_positive("eps", self.eps)

    @state_of_fused
    def init_state(self, param: Tensor) -> State:
        buffer = zeros(param)
        shape = (param.shape[1], min(self.rank, *param.shape))
        q = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return {"momentum": buffer, "q": q.to(buffer)}

    @each_fused
    def direction(self, grad: Tensor, state: State, param: Tensor, step: Tensor) -> Tensor:
        m, q = state["momentum"].add_(grad), state["q"]
        p = torch.linalg.qr(m @ q).Q
        r = m.mT @ p
        m.sub_(p @ r.mT * (1 - self.momentum))
        q.copy_(r / (norm_along(r, -2) + self.eps))
        rows, cols = grad.shape[-2:]
        return p @ q.mT * (rows / cols) ** 0.5


DEFAULTS = {
    "rule": "dion",
    "lr": 0.01,
    "weight_decay": 0.01,
    "groups": {
        "matrices": {"match": ["matrix"]},
        "others": {
            "match": ["embedding", "head", "vector"],
            "rule": "adamw",
            "betas": (0.9, 0.95),
            "lr_scale": 0.1,  # 1e-3
        },
    },
}
