"""LAMB: AdamW with a step proportional to the norm of the weights (arXiv 1904.00962, Algorithm 2).

    h = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + wd p          AdamW's, and the decay
    p <- p - lr (||p|| / ||h||) h                           per tensor; ratio 1 where either is 0

Weight decay is inside the trust ratio, which is 1 for tensors without decay unless
``always_adapt``. As timm's Lamb, except that its clip of the global gradient norm to 1 is the
trainer's here. The cybertronai/epfml code is ``bias_correction: false``, ``always_adapt: true``,
``max_weight_norm: 10`` (||p|| is clamped to it).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from optim.norms import norm
from optim.rule import (
    Granularity,
    Rule,
    State,
    check_betas,
    check_positive,
    ema_,
    ema_of_squares_,
    root,
    zeros,
)


@dataclass(frozen=True)
class Lamb(Rule):
    granularity: ClassVar[Granularity] = "tensor"

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    bias_correction: bool = True
    always_adapt: bool = False
    trust_clip: bool = False  # ratio at most 1
    max_weight_norm: float = inf

    def validate(self) -> None:
        check_betas(self.betas)
        check_positive("eps", self.eps)
        check_positive("max_weight_norm", self.max_weight_norm)

    @property
    def momentum(self) -> float:
        return self.betas[0]

    def init_state(self, param: Tensor) -> State:
        return {"exp_avg": zeros(param), "exp_avg_sq": zeros(param)}

    def direction(self, grad: Tensor, state: State, param: Tensor, step: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        m = ema_(state["exp_avg"], grad, beta1)
        v = ema_of_squares_(state["exp_avg_sq"], grad, beta2)
        if not self.bias_correction:
            return m / (root(v) + self.eps)
        return m / ((root(v) * (1 - beta2**step).rsqrt() + self.eps) * (1 - beta1**step))

    def apply(
        self,
        param: Tensor,
        u: Tensor,
        state: State,
        lr: Tensor,
        weight_decay: float,
        step: Tensor,
    ) -> None:
        u = u + param * weight_decay
        if weight_decay or self.always_adapt:
            weight, update = norm(param), norm(u)
            ratio = weight.clamp(max=self.max_weight_norm) / update
            ratio = torch.where((weight > 0) & (update > 0), ratio, 1.0)
            u = u * (ratio.clamp(max=1.0) if self.trust_clip else ratio)
        param.sub_(u * lr)


DEFAULTS = {
    "rule": "lamb",
    "lr": 1e-3,
    "weight_decay": 0.01,
    "groups": {
        "decay": {"match": ["matrix", "embedding", "head"]},
        "no_decay": {"match": ["vector"], "weight_decay": 0.0},
    },
}
