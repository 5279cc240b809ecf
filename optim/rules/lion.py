"""Lion: the sign of an interpolated momentum (arXiv 2302.06675, Algorithm 2).

    u = sign(beta1 m + (1 - beta1) g)        then  m = beta2 m + (1 - beta2) g

The momentum that is kept (beta2) decays more slowly than the one that votes (beta1), and is updated
after the step. sign(0) = 0, no eps, no bias correction. As google/automl lion_pytorch.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from optim.rule import Rule, State, check_betas, ema_, zeros


@dataclass(frozen=True)
class Lion(Rule):
    betas: tuple[float, float] = (0.9, 0.99)

    def validate(self) -> None:
        check_betas(self.betas)

    @property
    def momentum(self) -> float:
        return self.betas[0]

    def init_state(self, param: Tensor) -> State:
        return {"exp_avg": zeros(param)}

    def direction(self, grad: Tensor, state: State, param: Tensor, step: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        m = state["exp_avg"]
        u = (m + (grad - m) * (1 - beta1)).sign()
        ema_(m, grad, beta2)
        return u


DEFAULTS = {
    "rule": "lion",
    "lr": 1e-4,
    "weight_decay": 0.0,
    "groups": {
        "decay": {"match": ["matrix", "embedding", "head"]},
        "no_decay": {"match": ["vector"], "weight_decay": 0.0},
    },
}
