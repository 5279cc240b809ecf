"""Adafactor: AdamW's second moment in O(rows + cols) memory (arXiv 1804.04235).

    beta2_t = 1 - t^beta2_decay             V = EMA(g^2, beta2_t), factored
    h = g / sqrt(V)                         h <- h / max(1, RMS(h) / d)
    u = s h,  s = max(eps2, RMS(p))         (scale_parameter: steps relative to the weights)
    p <- (1 - lr wd) p - r u,  r = min(lr, 1/sqrt(t))    (relative_step)

Two codes are in use. torch.optim.Adafactor (the default here) guards the roots from below,
``eps_style: clamp``, with eps1 = 1.2e-7, float32's resolution: gradients of an RMS below 3e-4 feel
it. transformers.Adafactor adds eps1 = 1e-30 to g^2, ``eps_style: add``; with an external lr it is
used with ``beta1: 0.9`` and both relative options off. Its momentum averages the *lr-scaled*
update, so that a change of lr arrives with a delay of 1 / (1 - beta1) steps. It decays by r s wd
(``relative_decay``) where torch decays by lr wd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optim import factored
from optim.norms import rms
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


@dataclass(frozen=True)
class Adafactor(Rule):
    granularity: ClassVar[Granularity] = "tensor"

    beta1: float = 0.0
    beta2_decay: float = -0.8
    eps: tuple[float, float] = (torch.finfo(torch.float32).eps, 1e-3)
    eps_style: str = "clamp"
    clip_threshold: float = 1.0
    scale_parameter: bool = True
    relative_step: bool = True
    relative_decay: bool = False

    def validate(self) -> None:
        check_beta("beta1", self.beta1)
        if self.beta2_decay > 0:
            raise ValueError(f"beta2_decay must not be positive, given {self.beta2_decay}")
        for i, eps in enumerate(self.eps):
            check_positive(f"eps[{i}]", eps)
        check_choice("eps_style", self.eps_style, ("clamp", "add"))
        check_positive("clip_threshold", self.clip_threshold)

    @property
    def momentum(self) -> float:
        return self.beta1 or super().momentum

    def init_state(self, param: Tensor) -> State:
        momentum = {"exp_avg": zeros(param)} if self.beta1 else {}
        return {**momentum, **factored.init(param, "exp_avg_sq")}

    def direction(self, grad: Tensor, state: State, param: Tensor, step: Tensor) -> Tensor:
        eps1 = self.eps[0]
        squares = grad * grad + (eps1 if self.eps_style == "add" else 0.0)
        factored.update_(state, "exp_avg_sq", squares, 1 - step**self.beta2_decay)
        floor = eps1 if self.eps_style == "clamp" else None
        h = grad * factored.inverse_root(state, "exp_avg_sq", floor)
        h = h / (rms(h) / self.clip_threshold).clamp(min=1.0)
        return h * self._scale(param)

    def _scale(self, param: Tensor) -> Tensor | float:
        return rms(param).clamp(min=self.eps[1]) if self.scale_parameter else 1.0

    def apply(
        self,
        param: Tensor,
        u: Tensor,
        state: State,
        lr: Tensor,
        weight_decay: float,
        step: Tensor,
    ) -> None:
        most = torch.minimum(lr, step.rsqrt()) if self.relative_step else lr
        param.mul_(1 - (most * self._scale(param) if self.relative_decay else lr) * weight_decay)
        u = u * most
        param.sub_(ema_(state["exp_avg"], u, self.beta1) if self.beta1 else u)


DEFAULTS = {
    "rule": "adafactor",
    "lr": 1e-2,
    "weight_decay": 0.0,
    "groups": {
        "decay": {"match": ["matrix", "embedding", "head"]},
        "no_decay": {"match": ["vector"], "weight_decay": 0.0},
    },
}
