"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (arXiv 2409.11321, Algorithm 3).

    g' = QL^T g QR              L = EMA(g g^T), R = EMA(g^T g), both with shampoo_beta
    m = EMA(g', beta1),  v = EMA(g'^2, beta2)                 both live in the rotated basis
    u = QL (m / (sqrt(v) + eps)) QR^T * sqrt(1 - beta2^k) / (1 - beta1^k)           k = t - 1

and every ``precondition_frequency`` steps QL, QR follow L, R by one step of power iteration,
Q <- qr(L Q); v is permuted with the columns' order and m rotated into the new basis; with
``spread`` each matrix has a step of its own among these, so that none turns all bases. As the
authors' code (nikhilvyas/SOAP): step 1 only sets the basis, which knows past gradients only, and
decay comes last. Vectors, and sides longer than ``max_precond_dim``, are not rotated (eps raw).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optim.blocks import Factored, each_fused, state_of_fused
from optim.matrix_roots import eigenvectors, turned
from optim.rule import (
    Direction,
    State,
    after_first,
    check_beta,
    check_betas,
    check_positive,
    ema_,
    ema_of_squares_,
    root,
    zeros,
)
from optim.symmetric import syrk


@dataclass(frozen=True)
class Soap(Factored):
    products: ClassVar[int] = 3
    decomposition: ClassVar[int] = 6

    betas: tuple[float, float] = (0.95, 0.95)
    shampoo_beta: float = 0.95
    eps: float = 1e-8
    precondition_frequency: int = 10
    max_precond_dim: int = 10000

    def validate(self) -> None:
        check_betas(self.betas)
        check_beta("shampoo_beta", self.shampoo_beta)
        for name in ("eps", "precondition_frequency", "max_precond_dim"):
            check_positive(name, getattr(self, name))

    @property
    def momentum(self) -> float:
        return self.betas[0]

    def cuts(self, shape: Sequence[int]) -> tuple[int, int]:
        return max(shape), self.max_precond_dim if len(shape) == 2 else 0

    @state_of_fused
    def init_state(self, param: Tensor) -> State:
        state = {"exp_avg": zeros(param), "exp_avg_sq": zeros(param)}
        for side, length in enumerate(param.shape if param.ndim == 2 else ()):
            if length <= self.max_precond_dim:
                square = param.new_empty(length, length)
                state |= {f"{key}.{side}": zeros(square) for key in ("factor", "basis")}
        return state

    def direction_at(self, step: int, phase: int = 0) -> Direction:
        if step == 1:
            return self.first
        due = (step - 1 - phase) % self.precondition_frequency == 0
        return self.with_new_basis if due else self.direction

    @each_fused
    def first(self, grad: Tensor, state: State, param: Tensor, step: Tensor) -> Tensor:
        self._accumulate(grad, state)
        for side in _sides(state):
            state[f"basis.{side}"].copy_(eigenvectors(state[f"factor.{side}"]))
        return torch.zeros_like(grad)

    @each_fused
    def direction(self, grad: Tensor, state: State, param: Tensor, step: Tensor) -> Tensor:
        return self._adam(grad, state, step)

    def _adam(self, grad: Tensor, state: State, step: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        rotated = _rotate(grad, state)
        m = ema_(state["exp_avg"], rotated, beta1)
        v = ema_of_squares_(state["exp_avg_sq"], rotated, beta2)
        correction = (1 - beta1 ** (step - 1)) * (1 - beta2 ** (step - 1)).rsqrt()
        self._accumulate(grad, state)  # for later steps
        return _rotate_back(m / (root(v) + self.eps), state) / correction

    @each_fused
    def with_new_basis(self, grad: Tensor, state: State, param: Tensor, step: Tensor) -> Tensor:
        u = self._adam(grad, state, step)
        m = _rotate_back(state["exp_avg"], state)
        for side in _sides(state):
            basis, order = turned(state[f"basis.{side}"], state[f"factor.{side}"])
            along = order.unsqueeze(-1 - side)
            state["exp_avg_sq"].copy_(torch.take_along_dim(state["exp_avg_sq"], along, side - 2))
            state[f"basis.{side}"].copy_(basis)
        state["exp_avg"].copy_(_rotate(m, state))
        return u

    def _accumulate(self, grad: Tensor, state: State) -> None:
        for side in _sides(state):
            x = grad.mT if side else grad
            ema_(state[f"factor.{side}"], syrk(x), self.shampoo_beta)

    def apply(
        self,
        param: Tensor,
        u: Tensor,
        state: State,
        lr: Tensor,
        weight_decay: float,
        step: Tensor,
    ) -> None:
        param.sub_(lr * u)
        param.mul_(1 - lr * weight_decay * after_first(step))


def _sides(state: State) -> list[int]:
    return [side for side in (0, 1) if f"basis.{side}" in state]


def _rotate(x: Tensor, state: State) -> Tensor:
    x = state["basis.0"].mT @ x if "basis.0" in state else x
    return x @ state["basis.1"] if "basis.1" in state else x


def _rotate_back(x: Tensor, state: State) -> Tensor:
    x = state["basis.0"] @ x if "basis.0" in state else x
    return x @ state["basis.1"].mT if "basis.1" in state else x


DEFAULTS = {
    "rule": "soap",
    "lr": 3e-3,
    "weight_decay": 0.01,
    "groups": {"all": {"match": ["matrix", "embedding", "head", "vector"]}},
}
