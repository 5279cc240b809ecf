"""The gradient correction in front of a rule: none, or MARS's variance reduction.

MARS (arXiv 2411.10438, Algorithm 1) is a framework, not one optimizer: it replaces the gradient g_t
by a scaled STORM-like estimate and hands that to any preconditioned update::

    c_t = g_t + gamma * beta / (1 - beta) * (g_t - g'_t)      g'_t: the gradient at the last point
    c_t <- c_t / max(1, ||c_t||)                              per tensor

``exact``: g'_t is the gradient of the *same* batch at the previous point, which costs a second
forward and backward pass. Approximate (the papers' default): g'_t is simply the last step's
gradient.

As in the authors' code (AGI-Arena/MARS mars.py) and not in the paper: the clip is per tensor, and
g'_1 = 0, so that the first c is (1 + gamma beta / (1 - beta)) g rather than g. Unlike that code the
previous gradient is a copy: a reference to ``p.grad`` becomes the new gradient, silently switching
MARS off, wherever gradient buffers are reused (zero_grad(set_to_none=False), DDP bucket views).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor

from optim.norms import norm
from optim.rule import Rule, State, check_positive, same_kind, zeros


@dataclass(frozen=True)
class NoCorrection:
    exact: ClassVar[bool] = False
    keys: ClassVar[tuple[str, ...]] = ()

    def init_state(self, param: Tensor) -> State:
        return {}

    def __call__(self, grad: Tensor, state: State, rule: Rule) -> Tensor:
        return grad

    def remember(self, grad: Tensor, state: State) -> None:
        pass


@dataclass(frozen=True)
class Mars:
    gamma: float = 0.025
    clip: float | None = 1.0  # largest norm of c_t, per tensor; None: no clip
    exact: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not same_kind(value, field.default) and (field.name, value) != ("clip", None):
                raise ValueError(f"mars.{field.name} is {value!r}, expected as {field.default!r}")
        if self.gamma < 0:
            raise ValueError(f"mars.gamma must not be negative, given {self.gamma}")
        if self.clip is not None:
            check_positive("mars.clip", self.clip)

    @property
    def keys(self) -> tuple[str, ...]:
        return ("last_grad", "next_grad") if self.exact else ("last_grad",)

    def init_state(self, param: Tensor) -> State:
        return {key: zeros(param) for key in self.keys}

    def __call__(self, grad: Tensor, state: State, rule: Rule) -> Tensor:
        scale = self.gamma * rule.momentum / (1 - rule.momentum)
        c = grad + (grad - state["last_grad"]) * scale
        if self.clip is not None:
            c = c / (norm(c) / self.clip).clamp(min=1.0)  # branch-free: no host sync
        return c

    def remember(self, grad: Tensor, state: State) -> None:
        """After the step: keep what the next correction subtracts. In exact mode that is the
        gradient of the next batch at the point just left, stored before the step."""
        state["last_grad"].copy_(state["next_grad"] if self.exact else grad)


Correction = NoCorrection | Mars
CORRECTIONS = {"none": NoCorrection, "mars": Mars}
