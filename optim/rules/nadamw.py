"""NAdamW: AdamW with Nesterov's momentum (Dozat, "Incorporating Nesterov Momentum into Adam").

    m = beta1 m + (1 - beta1) g              v = beta2 v + (1 - beta2) g^2
    M = beta1 m / (1 - beta1^(t+1)) + (1 - beta1) g / (1 - beta1^t)
    u = M / (sqrt(v / (1 - beta2^t)) + eps)

The momentum is applied once more, as the next step will. The convention is Dozat's with a constant
beta1, as optax.nadamw. Others: torch.optim.NAdam (decoupled_weight_decay=True) lets beta1 rise from
half its value (momentum_decay) and is equal to this in the limit of a large momentum_decay;
AlgoPerf and timm divide both terms by 1 - beta1^t, which is smaller in the first steps.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class NAdamW(Rule):
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def validate(self) -> None:
        check_betas(self.betas)
        check_positive("eps", self.eps)

    @property
    def momentum(self) -> float:
        return self.betas[0]

    def init_state(self, param: Tensor) -> State:
        return {"exp_avg": zeros(param), "exp_avg_sq": zeros(param)}

    def direction(self, grad: Tensor, state: State, param: Tensor, step: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        m = ema_(state["exp_avg"], grad, beta1)
        v = ema_of_squares_(state["exp_avg_sq"], grad, beta2)
        ahead = m * (beta1 / (1 - beta1 ** (step + 1))) + grad * ((1 - beta1) / (1 - beta1**step))
        return ahead / (root(v) * (1 - beta2**step).rsqrt() + self.eps)


DEFAULTS = {
    "rule": "nadamw",
    "lr": 1e-3,
    "weight_decay": 0.01,
    "groups": {
        "decay": {"match": ["matrix", "embedding", "head"]},
        "no_decay": {"match": ["vector"], "weight_decay": 0.0},
    },
}
