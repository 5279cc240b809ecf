"""CAME: Adafactor guided by confidence (arXiv 2307.02047, Algorithm 2).

    V = EMA(g^2 + eps1, beta2), factored        h = g / sqrt(V),  h <- h / max(1, RMS(h) / d)
    m = EMA(h, beta1)
    S = EMA((h - m)^2 + eps2, beta3), factored  u = m / sqrt(S)

S is large where the update disagrees with its own average, and shrinks the step there. Gains and
biases, whose moments do not factor, take u = m. As the authors' code (yangluo7/CAME CAME.py), where
no average is corrected for its start at 0: S starts near 0 and inflates the first updates (an RMS
of 11 lr at step 1, against AdamW's 1 lr). Warm up long, or lower beta3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from optim import factored
from optim.norms import rms
from optim.rule import Granularity, Rule, State, check_betas, check_positive, ema_, zeros


@dataclass(frozen=True)
class Came(Rule):
    granularity: ClassVar[Granularity] = "tensor"

    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999)
    eps: tuple[float, float] = (1e-30, 1e-16)
    clip_threshold: float = 1.0

    def validate(self) -> None:
        check_betas(self.betas)
        for i, eps in enumerate(self.eps):
            check_positive(f"eps[{i}]", eps)
        check_positive("clip_threshold", self.clip_threshold)

    @property
    def momentum(self) -> float:
        return self.betas[0]

    def init_state(self, param: Tensor) -> State:
        state = {"exp_avg": zeros(param), **factored.init(param, "exp_avg_sq")}
        return state if param.ndim < 2 else {**state, **factored.init(param, "instability")}

    def direction(self, grad: Tensor, state: State, param: Tensor, step: Tensor) -> Tensor:
        factored.update_(state, "exp_avg_sq", grad * grad + self.eps[0], self.betas[1])
        h = grad * factored.inverse_root(state, "exp_avg_sq")
        h = h / (rms(h) / self.clip_threshold).clamp(min=1.0)
        m = ema_(state["exp_avg"], h, self.betas[0])
        if grad.ndim < 2:
            return m
        factored.update_(state, "instability", (h - m) * (h - m) + self.eps[1], self.betas[2])
        return m * factored.inverse_root(state, "instability")


DEFAULTS = {
    "rule": "came",
    "lr": 2e-4,
    "weight_decay": 0.0,
    "groups": {
        "decay": {"match": ["matrix", "embedding", "head"]},
        "no_decay": {"match": ["vector"], "weight_decay": 0.0},
    },
}
