"""Schedule-Free AdamW: averaged iterates in place of a schedule (arXiv 2405.15682, Algorithm 1).

    z <- z - lr_t u                 u = g(y) / (sqrt(v / (1 - beta2^t)) + eps) + wd y
    x <- (1 - c_t) x + c_t z        c_t = w_t / sum(w),  w_t = t^r max(lr)^weight_lr_power
    y = (1 - beta1) z + beta1 x

The parameters hold y, where gradients are taken; evaluate and publish x, which is what they hold
within ``with optimizer.evaluation_weights():``. lr warms up over ``warmup_steps`` by itself and is
then constant: give it no schedule. As the authors' code (facebookresearch/schedule_free) without
its inner momentum; that code switches between x and y by train() and eval(), which rounds at each
change, where this restores y exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optim.rule import (
    Rule,
    State,
    after_first,
    check_beta,
    check_positive,
    ema_,
    ema_of_squares_,
    root,
    zeros,
)


@dataclass(frozen=True)
class ScheduleFreeAdamW(Rule):
    averages: ClassVar[bool] = True

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_steps: int = 0
    r: float = 0.0
    weight_lr_power: float = 2.0

    def validate(self) -> None:
        check_positive("betas[0]", self.betas[0])
        for i, beta in enumerate(self.betas):
            check_beta(f"betas[{i}]", beta)
        check_positive("eps", self.eps)
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, given {self.warmup_steps}")

    @property
    def momentum(self) -> float:
        return self.betas[0]

    def init_state(self, param: Tensor) -> State:
        scalars = {key: torch.zeros((), dtype=torch.float64) for key in ("lr_max", "weight_sum")}
        return {"z": zeros(param), "exp_avg_sq": zeros(param), **scalars}

    def direction(self, grad: Tensor, state: State, param: Tensor, step: Tensor) -> Tensor:
        v = ema_of_squares_(state["exp_avg_sq"], grad, self.betas[1])
        return grad / (root(v) * (1 - self.betas[1] ** step).rsqrt() + self.eps)

    def apply(
        self,
        param: Tensor,
        u: Tensor,
        state: State,
        lr: Tensor,
        weight_decay: float,
        step: Tensor,
    ) -> None:
        beta1 = self.betas[0]
        lr = lr * (step / max(self.warmup_steps, 1)).clamp(max=1.0)
        lr_max = state["lr_max"].copy_(torch.maximum(state["lr_max"], lr))
        weight = step**self.r * lr_max**self.weight_lr_power
        c = weight / state["weight_sum"].add_(weight).clamp(min=torch.finfo(torch.float64).tiny)
        z, y = state["z"], param.to(u.dtype)
        ema_(z, y, after_first(step))  # z starts at the parameter, whatever was loaded into it
        u = u + y * weight_decay
        y = y + (z - y) * c  # with the old z
        param.copy_(y - u * (lr * (1 - beta1 * (1 - c))))
        z.sub_(u * lr)

    def evaluation_weight(self, param: Tensor, state: State) -> Tensor:
        ahead = (1 / self.betas[0] - 1) * (state["step"] > 0)  # before the first step x is y
        return param + (param - state["z"]) * ahead


DEFAULTS = {
    "rule": "schedule_free_adamw",
    "lr": 2.5e-3,
    "weight_decay": 0.0,
    "groups": {
        "decay": {"match": ["matrix", "embedding", "head"]},
        "no_decay": {"match": ["vector"], "weight_decay": 0.0},
    },
}
