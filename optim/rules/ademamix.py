"""AdEMAMix: AdamW with a second, much slower momentum (arXiv 2409.03137, Algorithm 1).

    m1 = EMA(g, beta1)       m2 = EMA(g, beta3_t)       v = EMA(g^2, beta2)
    u = (m1 / (1 - beta1^t) + alpha_t m2) / (sqrt(v / (1 - beta2^t)) + eps)

m2 is not bias-corrected. To keep it from disturbing the start, alpha_t rises linearly to alpha, and
beta3_t from beta1 to beta3 so that its half-life f(beta) = ln(1/2) / ln(beta) - 1 rises linearly,
each over its number of warm-up steps (0: none). The paper sets both to the length of the run. As
the authors' code (apple/ml-ademamix).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from optim.rule import (
    Rule,
    State,
    check_betas,
    check_positive,
    ema_,
    ema_of_squares_,
    root,
    zeros,
)


def half_life(beta: float) -> float:
    return log(0.5) / log(beta + 1e-8) - 1


@dataclass(frozen=True)
class AdEMAMix(Rule):
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999)
    alpha: float = 2.0
    alpha_warmup: int = 0
    beta3_warmup: int = 0
    eps: float = 1e-8

    def validate(self) -> None:
        check_betas(self.betas)
        check_positive("eps", self.eps)
        for name in ("alpha", "alpha_warmup", "beta3_warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, given {getattr(self, name)}")

    @property
    def momentum(self) -> float:
        return self.betas[0]

    def init_state(self, param: Tensor) -> State:
        return {key: zeros(param) for key in ("exp_avg", "exp_avg_slow", "exp_avg_sq")}

    def direction(self, grad: Tensor, state: State, param: Tensor, step: Tensor) -> Tensor:
        beta1, beta2, _ = self.betas
        fast = ema_(state["exp_avg"], grad, beta1) / (1 - beta1**step)
        slow = ema_(state["exp_avg_slow"], grad, self.beta3_at(step)) * self.alpha_at(step)
        v = ema_of_squares_(state["exp_avg_sq"], grad, beta2)
        return (fast + slow) / (root(v) * (1 - beta2**step).rsqrt() + self.eps)

    def alpha_at(self, step: Tensor) -> Tensor | float:
        if not self.alpha_warmup:
            return self.alpha
        return self.alpha * (step / self.alpha_warmup).clamp(max=1.0)

    def beta3_at(self, step: Tensor) -> Tensor | float:
        beta1, _, beta3 = self.betas
        if not self.beta3_warmup:
            return beta3
        done = (step / self.beta3_warmup).clamp(max=1.0)
        life = half_life(beta1) * (1 - done) + half_life(beta3) * done
        return torch.where(done < 1, 0.5 ** (1 / (life + 1)), beta3)


DEFAULTS = {
    "rule": "ademamix",
    "lr": 1e-3,
    "weight_decay": 0.0,
    "groups": {
        "decay": {"match": ["matrix", "embedding", "head"]},
        "no_decay": {"match": ["vector"], "weight_decay": 0.0},
    },
}
