"""AdamW: Adam with decoupled weight decay (arXiv 1711.05101, Algorithm 2).

    m = beta1 m + (1 - beta1) g              v = beta2 v + (1 - beta2) g^2
    u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

``eps_style`` names the two conventions in use. "torch" (torch.optim.AdamW, above) adds eps to the
bias-corrected root. "raw" (Moonlight, MARS-M, SOAP) adds it to sqrt(v), which is an eps larger by
1/sqrt(1 - beta2^t) in torch's terms: visible in the first steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from optim.rule import (
    Rule,
    State,
    check_betas,
    check_choice,
    check_positive,
    ema_,
    ema_of_squares_,
    root,
    zeros,
)


@dataclass(frozen=True)
class AdamW(Rule):
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_style: str = "torch"

    def validate(self) -> None:
        check_betas(self.betas)
        check_positive("eps", self.eps)
        check_choice("eps_style", self.eps_style, ("torch", "raw"))

    @property
    def momentum(self) -> float:
        return self.betas[0]

    def init_state(self, param: Tensor) -> State:
        return {"exp_avg": zeros(param), "exp_avg_sq": zeros(param)}

    def direction(self, grad: Tensor, state: State, param: Tensor, step: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        m = ema_(state["exp_avg"], grad, beta1)
        v = ema_of_squares_(state["exp_avg_sq"], grad, beta2)
        correction1, correction2 = 1 - beta1**step, (1 - beta2**step).rsqrt()
        if self.eps_style == "raw":
            return m / (root(v) + self.eps) / (correction1 * correction2)
        return m / ((root(v) * correction2 + self.eps) * correction1)


DEFAULTS = {
    "rule": "adamw",
    "lr": 1e-3,
    "weight_decay": 0.01,
    "groups": {  # nanoGPT: every tensor of two or more dimensions decays, gains and biases do not
        "decay": {"match": ["matrix", "embedding", "head"]},
        "no_decay": {"match": ["vector"], "weight_decay": 0.0},
    },
}
