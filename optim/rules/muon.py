"""Muon: momentum, orthogonalized (Keller Jordan, 2024, kellerjordan.github.io/posts/muon).

    m = mu m + (1 - mu) g
    M = (1 - mu) g + mu m    (nesterov)      or  m
    u = scale * NS(M)                        NS: all singular values to about 1

``scale`` makes one learning rate fit matrices of all shapes (rows = output features):
  original         sqrt(max(1, rows / cols))          Keller Jordan's
  match_rms_adamw  0.2 sqrt(max(rows, cols))          Moonlight's (arXiv 2502.16982): the update has
                   the RMS of AdamW's, so that AdamW's lr and weight decay carry over
(the names are torch.optim.Muon's).

Muon is for hidden matrices; embeddings, head, gains and biases take another rule. Older codes sum
the momentum instead of averaging it, which a scale-invariant NS does not notice. Unlike
KellerJordan/Muon this leaves ``p.grad`` alone, skips a parameter without a gradient, and multiplies
the scale in float32 rather than in bfloat16. ``fused`` is the number of matrices stacked in one
parameter's rows, such as GPT-2's c_attn (3: query, key, value): each is orthogonalized on its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from optim.blocks import each_fused, state_of_fused
from optim.orthogonalize import COEFFICIENTS, DTYPES, ORDERS, newton_schulz
from optim.rule import (
    Granularity,
    Rule,
    State,
    check_beta,
    check_choice,
    check_positive,
    ema_,
    zeros,
)

SCALES = {
    "original": lambda rows, cols: max(1.0, rows / cols) ** 0.5,
    "match_rms_adamw": lambda rows, cols: 0.2 * max(rows, cols) ** 0.5,
}


@dataclass(frozen=True)
class Muon(Rule):
    granularity: ClassVar[Granularity] = "matrix"

    momentum: float = 0.95
    nesterov: bool = True
    scale: str = "original"
    fused: int = 1
    ns_coefficients: str = "jordan"
    ns_steps: int = 5
    ns_dtype: str = "bfloat16"
    ns_order: str = "gram"
    eps: float = 1e-7

    def validate(self) -> None:
        check_beta("momentum", self.momentum)
        check_choice("scale", self.scale, SCALES)
        check_choice("ns_coefficients", self.ns_coefficients, COEFFICIENTS)
        check_choice("ns_dtype", self.ns_dtype, DTYPES)
        check_choice("ns_order", self.ns_order, ORDERS)
        for name in ("ns_steps", "eps"):
            check_positive(name, getattr(self, name))

    @state_of_fused
    def init_state(self, param: Tensor) -> State:
        return {"momentum": zeros(param)}

    @each_fused
    def direction(self, grad: Tensor, state: State, param: Tensor, step: Tensor) -> Tensor:
        return self.scaled(self.orthogonal_momentum(grad, state))

    def orthogonal_momentum(self, grad: Tensor, state: State) -> Tensor:
        """Stack of matrices (n, rows, cols) with all singular values about 1."""
        m = ema_(state["momentum"], grad, self.momentum)
        if self.nesterov:
            m = grad + (m - grad) * self.momentum
        return newton_schulz(
            m,
            coefficients=self.ns_coefficients,
            steps=self.ns_steps,
            dtype=self.ns_dtype,
            order=self.ns_order,
            eps=self.eps,
        )

    def scaled(self, o: Tensor) -> Tensor:
        return o * SCALES[self.scale](*o.shape[-2:])


DEFAULTS = {
    "rule": "muon",
    "lr": 0.02,
    "weight_decay": 0.0,
    "groups": {
        "matrices": {"match": ["matrix"]},
        "others": {
            "match": ["embedding", "head", "vector"],
            "rule": "adamw",
            "betas": (0.9, 0.95),
            "eps": 1e-10,
            "lr_scale": 0.015,  # 3e-4
        },
    },
}
