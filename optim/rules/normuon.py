"""NorMuon: Muon with one adaptive scale per row (arXiv 2510.05491, Algorithm 1).

    O = NS(nesterov momentum)                as Muon
    s = EMA(mean over columns of O^2, beta2)                 one number per row
    O' = O / (sqrt(s) + 1e-10),              u = scale O' ||O|| / (||O'|| + 1e-10)

Orthogonalization makes singular values equal, not rows; this evens out the rows (neurons) while the
norm of the update stays Muon's. No bias correction. As the authors' code (zichongli5/NorMuon), with
its Newton-Schulz output taken to float32, without which that code fails on current torch. Dion's
package has a variant without Nesterov and with Polar Express: ``nesterov``, ``ns_coefficients``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from optim.blocks import each_fused, state_of_fused
from optim.norms import matrix_norm
from optim.rule import State, check_beta, ema_, root, zeros
from optim.rules.muon import Muon


@dataclass(frozen=True)
class NorMuon(Muon):
    beta2: float = 0.95

    def validate(self) -> None:
        super().validate()
        check_beta("beta2", self.beta2)

    @state_of_fused
    def init_state(self, param: Tensor) -> State:
        return {"momentum": zeros(param), "row_squares": zeros(param[:, :1])}

    @each_fused
    def direction(self, grad: Tensor, state: State, param: Tensor, step: Tensor) -> Tensor:
        o = self.orthogonal_momentum(grad, state)
        s = ema_(state["row_squares"], (o * o).mean(-1, keepdim=True), self.beta2)
        even = o / (root(s) + 1e-10)
        return self.scaled(even * (matrix_norm(o) / (matrix_norm(even) + 1e-10)))


DEFAULTS = {
    "rule": "normuon",
    "lr": 0.02,
    "weight_decay": 0.0,
    "groups": {
        "matrices": {"match": ["matrix"]},
        "others": {
            "match": ["embedding", "head", "vector"],
            "rule": "adamw",
            "betas": (0.9, 0.95),
            "eps": 1e-10,
            "lr_scale": 0.015,  # 3e-4
        },
    },
}
