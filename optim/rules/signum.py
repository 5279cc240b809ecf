"""Signum: the sign of an averaged momentum (arXiv 1802.04434, Algorithm 2).

    m = beta m + (1 - beta) g                u = sign(m)

Equal to Lion with beta1 = beta2. Popular ports differ from the paper: some sum the momentum without
(1 - beta), which changes nothing under the sign, or start it at a copy of the parameter, which
does.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from optim.rule import Rule, State, check_beta, ema_, zeros


@dataclass(frozen=True)
class Signum(Rule):
    beta: float = 0.9

    def validate(self) -> None:
        check_beta("beta", self.beta)

    @property
    def momentum(self) -> float:
        return self.beta

    def init_state(self, param: Tensor) -> State:
        return {"exp_avg": zeros(param)}

    def direction(self, grad: Tensor, state: State, param: Tensor, step: Tensor) -> Tensor:
        return ema_(state["exp_avg"], grad, self.beta).sign()


DEFAULTS = {
    "rule": "signum",
    "lr": 1e-4,
    "weight_decay": 0.0,
    "groups": {
        "decay": {"match": ["matrix", "embedding", "head"]},
        "no_decay": {"match": ["vector"], "weight_decay": 0.0},
    },
}
