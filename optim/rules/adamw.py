"""AdamW: Adam with decoupled weight decay (arXiv 1711.05101, Algorithm 2).

    m = beta1 m + (1 - beta1) g              v = beta2 v + (1 - beta2) g^2
    u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

``eps_style`` names the two conventions in use. "torch" (torch.optim.AdamW, above) adds eps to the
bias-corrected root. "raw" (Moonlight, MARS-M, SOAP) adds it to sqrt(v), which is an eps larger by
1/sqrt(1 - beta2^t) in torch's terms: visible in the first steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optim.rule import (
    Rule,
    State,
    check_betas,
    check_choice,
    check_positive,
    count,
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

    def has_kernel(self, params: list[Tensor]) -> bool:
        (device, dtype), *others = {(p.device.type, p.dtype) for p in params}
        known = device in ("cpu", "cuda") and dtype in (torch.float32, torch.float64)
        return self.eps_style == "torch" and known and not others

    def kernel(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        lr: float,
        weight_decay: float,
    ) -> None:
        device = params[0].device
        counts = [count(state) for state in states]
        steps = {n: torch.full((), float(n), device=device) for n in set(counts)}
        torch._fused_adamw_(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [steps[n] for n in counts],
            lr=lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=weight_decay,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
        )


DEFAULTS = {
    "rule": "adamw",
    "lr": 1e-3,
    "weight_decay": 0.01,
    "groups": {  # nanoGPT: every tensor of two or more dimensions decays, gains and biases do not
        "decay": {"match": ["matrix", "embedding", "head"]},
        "no_decay": {"match": ["vector"], "weight_decay": 0.0},
    },
}
