"""ADOPT: Adam that converges for every beta2 (arXiv 2411.02853, Algorithm 2).

    step 1:     v = g^2, and nothing else: neither an update nor decay
    later:      h = clip(g / max(sqrt(v), eps), +-(t - 1)^clip_exponent)
                m = beta1 m + (1 - beta1) h          u = m
                v = beta2 v + (1 - beta2) g^2        after its use: v knows nothing of this g

No bias correction. Without the clip (the paper's first version) entries whose first gradient is
near 0 explode. As the authors' code (iShohei220/adopt), which by default adds wd p to the gradient
(``decoupled: false``); decoupled is the default here, as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from optim.rule import (
    Rule,
    State,
    after_first,
    check_betas,
    check_positive,
    ema_,
    ema_of_squares_,
    root,
    zeros,
)


@dataclass(frozen=True)
class Adopt(Rule):
    betas: tuple[float, float] = (0.9, 0.9999)
    eps: float = 1e-6
    clip_exponent: float = 0.25
    decoupled: bool = True

    def validate(self) -> None:
        check_betas(self.betas)
        check_positive("eps", self.eps)
        check_positive("clip_exponent", self.clip_exponent)

    @property
    def momentum(self) -> float:
        return self.betas[0]

    def init_state(self, param: Tensor) -> State:
        return {"exp_avg": zeros(param), "exp_avg_sq": zeros(param)}

    def regularize(self, grad: Tensor, param: Tensor, weight_decay: float) -> Tensor:
        return grad if self.decoupled else grad + param * weight_decay

    def direction(self, grad: Tensor, state: State, param: Tensor, step: Tensor) -> Tensor:
        v = state["exp_avg_sq"]
        # branch-free: at step 1 the limit is 0, so that m stays 0, and v forgets its initial 0
        limit = (step - 1) ** self.clip_exponent
        h = grad / root(v).clamp(min=self.eps)
        h = (h / limit.clamp(min=1e-30)).clamp(-1, 1) * limit
        m = ema_(state["exp_avg"], h, self.betas[0])
        ema_of_squares_(v, grad, after_first(step) * self.betas[1])
        return m

    def apply(
        self,
        param: Tensor,
        u: Tensor,
        state: State,
        lr: Tensor,
        weight_decay: float,
        step: Tensor,
    ) -> None:
        if self.decoupled:
            param.mul_(1 - lr * weight_decay * after_first(step))
        param.sub_(lr * u)


DEFAULTS = {
    "rule": "adopt",
    "lr": 1e-3,
    "weight_decay": 0.0,
    "groups": {
        "decay": {"match": ["matrix", "embedding", "head"]},
        "no_decay": {"match": ["vector"], "weight_decay": 0.0},
    },
}
