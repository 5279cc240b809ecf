"""Sophia-G: momentum over a clipped diagonal Hessian (arXiv 2305.14342, Algorithm 3).

    m = EMA(g, beta1)               u = sign(m) min(1, |m| / (rho * tokens * h + 1e-15))
    h = EMA(g_s^2, beta2)           every ``hessian_interval`` steps, after the step

g_s is the gradient of the mean loss against labels *sampled* from the model's own predictions, on a
batch of its own: tokens * g_s^2 is the Gauss-Newton-Bartlett estimate of the Hessian's diagonal.
The loop provides g_s (`Optimizer.needs_hessian_gradient`, `store_hessian_gradient`). Until its
first estimate h is 0 and the update is the sign of m, as in the authors' code (Liuhong99/Sophia
sophia.py), whose ``bs`` is ``tokens``, the tokens of one optimizer update: its default of 5120 is
wrong for most runs, without a word. The authors watch the share of entries that are not clipped and
want it between 0.1 and 0.5.
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
    zeros,
)


@dataclass(frozen=True)
class SophiaG(Rule):
    betas: tuple[float, float] = (0.965, 0.99)
    rho: float = 0.04
    tokens: int = 5120
    hessian_interval: int = 10

    def validate(self) -> None:
        check_betas(self.betas)
        for name in ("rho", "tokens", "hessian_interval"):
            check_positive(name, getattr(self, name))

    @property
    def momentum(self) -> float:
        return self.betas[0]

    def init_state(self, param: Tensor) -> State:
        return {"exp_avg": zeros(param), "hessian": zeros(param)}

    def direction(self, grad: Tensor, state: State, param: Tensor, step: Tensor) -> Tensor:
        m = ema_(state["exp_avg"], grad, self.betas[0])
        scale = state["hessian"] * (self.rho * self.tokens) + 1e-15
        return m.sign() * (m.abs() / scale).clamp(max=1.0)

    def wants_hessian_gradient(self, step: int) -> bool:
        return step > 0 and step % self.hessian_interval == 0

    def observe_hessian_gradient(self, grad: Tensor, state: State) -> None:
        ema_of_squares_(state["hessian"], grad, self.betas[1])


DEFAULTS = {
    "rule": "sophia_g",
    "lr": 1e-4,
    "weight_decay": 0.1,
    "groups": {
        "decay": {"match": ["matrix", "embedding", "head"]},
        "no_decay": {"match": ["vector"], "weight_decay": 0.0},
    },
}
