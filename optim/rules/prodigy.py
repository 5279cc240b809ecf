"""Prodigy: Adam that estimates its own learning rate (arXiv 2306.06101, Algorithm 4).

    r = d lr sqrt(1 - beta2^t) / (1 - beta1^t)               (the fraction: ``bias_correction``)
    m = beta1 m + d (1 - beta1) g,   v = beta2 v + d^2 (1 - beta2) g^2
    s = beta3 s + (d / d0) d g
    numerator = beta3 numerator + (d / d0) r <g, p0 - p>
    p <- (1 - r wd) p - r m / (sqrt(v) + d eps)
    d <- max(d, d_coef numerator / ||s||_1)                  d: distance from p0 to a solution

d is one number for all parameters: the sums run over all of them, after each step (`join`). lr is a
factor, normally 1, for a schedule to bend. As the authors' code (konstmish/prodigy) with decoupled
decay and safeguard_warmup=True (s without lr); that code adds d eps with the new d, this with the
old, which only shows where sqrt(v) is below eps.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from optim.lockstep import total
from optim.rule import (
    Granularity,
    Rule,
    State,
    after_first,
    check_beta,
    check_betas,
    check_positive,
    ema_,
    root,
    zeros,
)


@dataclass(frozen=True)
class Prodigy(Rule):
    granularity: ClassVar[Granularity] = "tensor"
    joint: ClassVar[bool] = True

    betas: tuple[float, float] = (0.9, 0.999)
    beta3: float = 0.0  # 0: sqrt(beta2)
    eps: float = 1e-8
    bias_correction: bool = False
    d0: float = 1e-6
    d_coef: float = 1.0
    growth_rate: float = inf

    def validate(self) -> None:
        check_betas(self.betas)
        check_beta("beta3", self.beta3)
        for name in ("eps", "d0", "d_coef", "growth_rate"):
            check_positive(name, getattr(self, name))

    @property
    def momentum(self) -> float:
        return self.betas[0]

    @property
    def decay(self) -> float:
        return self.beta3 or self.betas[1] ** 0.5

    def init_state(self, param: Tensor) -> State:
        tensors = {key: zeros(param) for key in ("exp_avg", "exp_avg_sq", "s", "start")}
        # one number each; d, d_max and numerator are the same for all parameters
        names = ("d", "d_max", "numerator", "s_norm", "inner")
        scalars = {key: zeros(param.new_empty(())) for key in names}
        scalars["d"].fill_(self.d0)
        scalars["d_max"].fill_(self.d0)
        return {**tensors, **scalars}

    def direction(self, grad: Tensor, state: State, param: Tensor, step: Tensor) -> Tensor:
        d, (beta1, beta2) = state["d"], self.betas
        start = ema_(state["start"], param.to(grad.dtype), after_first(step))
        m = state["exp_avg"].mul_(beta1).add_(grad * (d * (1 - beta1)))
        v = state["exp_avg_sq"].mul_(beta2).add_(grad * grad * (d * d * (1 - beta2)))
        s = state["s"].mul_(self.decay).add_(grad * (d * d / self.d0))
        inner, s_norm = total((grad * (start - param)).sum(), s.abs().sum())
        state["inner"].copy_(inner)
        state["s_norm"].copy_(s_norm)
        return m / (root(v) + (d * self.eps).clamp(min=torch.finfo(d.dtype).tiny))

    def apply(
        self,
        param: Tensor,
        u: Tensor,
        state: State,
        lr: Tensor,
        weight_decay: float,
        step: Tensor,
    ) -> None:
        rate = state["d"] * lr
        if self.bias_correction:
            rate = rate * ((1 - self.betas[1] ** step).sqrt() / (1 - self.betas[0] ** step))
        state["inner"].mul_(state["d"] / self.d0 * rate)
        param.mul_(1 - rate * weight_decay)
        param.sub_(u * rate)

    def join(self, states: list[State]) -> None:
        device = states[0]["d"].device
        inner, norm = (
            torch.stack([state[key].to(device) for state in states]).sum()
            for key in ("inner", "s_norm")
        )
        numerator = states[0]["numerator"] * self.decay + inner
        estimate = torch.where(norm > 0, numerator / norm * self.d_coef, 0.0)
        d_max = torch.maximum(states[0]["d_max"], estimate)
        d = states[0]["d"]
        d = torch.where(d == self.d0, torch.maximum(d, estimate), d)
        d = torch.minimum(d_max, d * self.growth_rate)
        for state in states:
            for key, value in (("d", d), ("d_max", d_max), ("numerator", numerator)):
                state[key].copy_(value)
            state["inner"].zero_()  # a parameter without a gradient next time adds nothing


DEFAULTS = {
    "rule": "prodigy",
    "lr": 1.0,
    "weight_decay": 0.0,
    "groups": {"all": {"match": ["matrix", "embedding", "head", "vector"]}},
}
