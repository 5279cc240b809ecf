"""Shampoo: a preconditioner for each side of a matrix (arXiv 1802.09568; distributed: 2309.06497).

    L = beta2 L + (1 - beta2) g g^T          R = beta2 R + (1 - beta2) g^T g
    m = EMA(g, beta1)                        u = L^(-1/4) m R^(-1/4)        all bias-corrected
    u <- u ||A|| / ||u||                     grafting: the size of Adam's step A

beta2 = 1 sums instead of averaging (AdaGrad). A vector has one factor d x d, to the power -1/2. The
roots are taken every ``precondition_frequency`` steps from ``start_step`` on; before it the step is
Adam's, or without grafting plain momentum. With ``spread``, after the first roots, each matrix has
a step of its own among these, so that every step takes some roots and none takes all. Matrices
larger than ``max_dim`` are cut into blocks, each with its own factors and grafting. Decompositions
that failed are counted in the state.

As facebookresearch/optimizers distributed_shampoo with decoupled weight decay, except: it merges
dimensions whose product is at most its max_preconditioner_dim (a small matrix becomes a vector),
this does not; eigenvalues below the factors' resolution are raised to it (optim/matrix_roots.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optim.blocks import Factored, as_matrices, blocks, each_fused, sides, state_of_fused
from optim.matrix_roots import DTYPES, inverse_root
from optim.norms import matrix_norm
from optim.rule import (
    Direction,
    State,
    check_beta,
    check_choice,
    check_positive,
    ema_,
    ema_of_squares_,
    root,
    zeros,
)
from optim.symmetric import syrk


@dataclass(frozen=True)
class Shampoo(Factored):
    products: ClassVar[int] = 2
    decomposition: ClassVar[int] = 10

    betas: tuple[float, float] = (0.9, 1.0)
    eps: float = 1e-12
    bias_correction: bool = True
    grafting: str = "none"
    grafting_beta2: float = 0.99
    grafting_eps: float = 1e-8
    max_dim: int = 1024
    start_step: int = 1
    factor_dtype: str = "float32"

    def validate(self) -> None:
        check_beta("betas[0]", self.betas[0])
        if not 0 <= self.betas[1] <= 1:
            raise ValueError(f"betas[1] must be in [0, 1], given {self.betas[1]}")
        check_choice("grafting", self.grafting, ("none", "adam"))
        check_beta("grafting_beta2", self.grafting_beta2)
        check_choice("factor_dtype", self.factor_dtype, DTYPES)
        for name in ("eps", "grafting_eps", "max_dim", "precondition_frequency", "start_step"):
            check_positive(name, getattr(self, name))

    @property
    def momentum(self) -> float:
        return self.betas[0]

    def cuts(self, shape: Sequence[int]) -> tuple[int, int]:
        return self.max_dim, self.max_dim

    @state_of_fused
    def init_state(self, param: Tensor) -> State:
        state = {"exp_avg": zeros(param), "failed_roots": zeros(param.new_empty(1))}
        if self.grafting == "adam":
            state["exp_avg_sq"] = zeros(param)
        for key, length in sides(param.shape, self.max_dim):
            start = torch.eye(length, dtype=DTYPES[self.factor_dtype], device=param.device)
            state |= {f"factor.{key}": torch.zeros_like(start), f"root.{key}": start}
        return state

    def direction_at(self, step: int, phase: int = 0) -> Direction:
        if step < self.start_step and self.grafting == "adam":
            return self.before_start
        due = step > self.start_step and (step - phase) % self.precondition_frequency == 0
        return self.with_new_roots if due or step == self.start_step else self.direction

    @each_fused
    def direction(self, grad: Tensor, state: State, param: Tensor, step: Tensor) -> Tensor:
        return self._precondition(*self._averages(grad, state, step), state)

    @each_fused
    def with_new_roots(self, grad: Tensor, state: State, param: Tensor, step: Tensor) -> Tensor:
        averages = self._averages(grad, state, step)
        self._take_roots(state, step, exponent=0.5 / (grad.ndim - 1))
        return self._precondition(*averages, state)

    @each_fused
    def before_start(self, grad: Tensor, state: State, param: Tensor, step: Tensor) -> Tensor:
        return self._averages(grad, state, step)[1]

    def _averages(self, grad: Tensor, state: State, step: Tensor) -> tuple[Tensor, Tensor]:
        """Update all averages; return the momentum and the step to graft the size of."""
        beta1, beta2 = self.betas
        x = as_matrices(grad).to(DTYPES[self.factor_dtype])
        for i, (r, c) in enumerate(blocks(x.shape[1:], self.max_dim)):
            for side, block in enumerate((x[:, r, c], x[:, r, c].mT)):
                if (key := f"factor.{i}.{side}") in state:
                    state[key].mul_(beta2).add_(syrk(block) * (1 - beta2 or 1.0))
        m = ema_(state["exp_avg"], grad, beta1) / (1 - beta1**step if self.bias_correction else 1)
        if self.grafting == "none":
            return m, m
        beta, v = self.grafting_beta2, state["exp_avg_sq"]
        size = root(ema_of_squares_(v, grad, beta)) * (1 - beta**step).rsqrt()
        return m, m / (size + self.grafting_eps)

    def _take_roots(self, state: State, step: Tensor, exponent: float) -> None:
        beta2 = self.betas[1]
        correction = 1 - beta2**step if self.bias_correction and beta2 < 1 else 1.0
        for key in [key for key in state if key.startswith("root.")]:
            factor = state[key.replace("root", "factor")] / correction
            roots, failed = inverse_root(factor, exponent, self.eps, state[key])
            state[key].copy_(roots)
            state["failed_roots"][0] += failed  # of the stack, counted with its first matrix

    def _precondition(self, m: Tensor, graft: Tensor, state: State) -> Tensor:
        u, graft = as_matrices(m).to(DTYPES[self.factor_dtype], copy=True), as_matrices(graft)
        for i, (r, c) in enumerate(blocks(u.shape[1:], self.max_dim)):
            d = state[f"root.{i}.0"] @ u[:, r, c]
            d = d @ state[right] if (right := f"root.{i}.1") in state else d
            if self.grafting == "adam":
                d = d * (matrix_norm(graft[:, r, c]) / (matrix_norm(d) + 1e-16))
            u[:, r, c] = d
        return u.to(m.dtype).view_as(m)


DEFAULTS = {
    "rule": "shampoo",
    "lr": 1e-2,
    "weight_decay": 0.0,
    "groups": {"all": {"match": ["matrix", "embedding", "head", "vector"]}},
}
