"""What an update rule is.

A rule turns a gradient into a step. It is a frozen dataclass of hyper-parameters with three things:
``granularity`` (how much of a parameter it must see at once), ``init_state`` and ``direction``. It
knows nothing of parameter groups, schedules, processes or checkpoints: `optim/optimizer.py` does.

Arithmetic. Rules are plain tensor expressions that run eagerly and under ``torch.compile`` with the
same result, bit for bit where they keep to the helpers below: ``lerp``, ``addcmul`` and
``add(alpha=)`` use fused multiply-adds in eager mode and not when compiled, and the eager float32
``sqrt`` of a CPU is not correctly rounded, while ``mul``, ``add``, ``div`` and ``rsqrt`` agree.
``step`` and ``lr`` are 0-D float64 CPU tensors: their value changes without recompilation, they do
not promote a float32 expression, and 1 - beta**step keeps its digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from optim.sharding import matrix_work

State = dict[str, Tensor]
Direction = Callable[[Tensor, State, Tensor, Tensor], Tensor]
Granularity = Literal["element", "tensor", "matrix"]


@dataclass(frozen=True)
class Rule:
    """Base of all update rules. A subclass adds its hyper-parameters as fields."""

    # element: every entry on its own; tensor: a whole-tensor norm or row and column sums;
    # matrix: the whole matrix, given as a stack (n, rows, cols) of matrices of one shape.
    granularity: ClassVar[Granularity] = "element"
    # dimensions that a parameter may have, for granularity "matrix"
    orders: ClassVar[tuple[int, ...]] = (2,)
    # whether something is summed over all parameters of the rule after each step, by `join`
    joint: ClassVar[bool] = False
    # whether the weights to evaluate are others than those to train
    averages: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # a YAML has lists where we have tuples
                object.__setattr__(self, field.name, value := tuple(value))
            if not same_kind(value, field.default):
                raise ValueError(
                    f"{field.name} is {value!r}, expected the like of {field.default!r}"
                )
        self.validate()

    def validate(self) -> None:
        """Raise ValueError for a hyper-parameter out of range."""

    @property
    def momentum(self) -> float:
        """beta of the first moment; MARS scales its correction with beta / (1 - beta)."""
        raise ValueError(f"{type(self).__name__} keeps no momentum, which correction=mars needs")

    def init_state(self, param: Tensor) -> State:
        """Fresh state for one parameter. Created when the optimizer is, so that every rank and
        every checkpoint has the same keys."""
        return {}

    def work(self, shape: Sequence[int]) -> int:
        """Cost of a step for a parameter of this shape, up to a factor, by which the matrices of a
        matrix rule are divided among processes."""
        return matrix_work(shape)

    def regularize(self, grad: Tensor, param: Tensor, weight_decay: float) -> Tensor:
        """The gradient that `direction` gets; a rule with coupled (L2) decay adds it here."""
        return grad

    def direction(self, grad: Tensor, state: State, param: Tensor, step: Tensor) -> Tensor:
        """The direction u of ``param <- param - lr * u``; ``state`` is updated in place.

        ``step`` counts from 1. For granularity "matrix" all tensors carry a leading stack axis.
        """
        raise NotImplementedError

    def direction_at(self, step: int, phase: int = 0) -> Direction:
        """The function to call in place of `direction` at this step: for what is done every so
        many steps only, such as taking the roots of a preconditioner, and ``phase`` steps later
        than where phase is 0 (but for the first time, which may be common). Not compiled."""
        return self.direction

    def phases(self, shapes: tuple[torch.Size, ...]) -> Sequence[int]:
        """The phase of each parameter of a group, given the shapes of all, so that what is done
        every so many steps is not done for all of them in the same step. A function of shapes
        alone: all processes find the same, and there is nothing to be saved."""
        return (0,) * len(shapes)

    def has_kernel(self, params: list[Tensor]) -> bool:
        """Whether `kernel` can do the whole update, direction and apply, of these parameters."""
        return False

    def kernel(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        lr: float,
        weight_decay: float,
    ) -> None:
        """All of them in one call of a kernel of torch's: the same numbers to rounding, each value
        read and written once."""
        raise NotImplementedError

    def apply(
        self,
        param: Tensor,
        u: Tensor,
        state: State,
        lr: Tensor,
        weight_decay: float,
        step: Tensor,
    ) -> None:
        """Decoupled weight decay on the old value, then the step (Loshchilov and Hutter, 2019)."""
        param.mul_(1 - lr * weight_decay)
        param.sub_(lr * u)

    def join(self, states: list[State]) -> None:
        """After a step of a ``joint`` rule: combine the states of all its parameters."""

    def wants_hessian_gradient(self, step: int) -> bool:
        """Whether, after this step, the rule wants a gradient of the loss on sampled labels."""
        return False

    def observe_hessian_gradient(self, grad: Tensor, state: State) -> None:
        """Take that gradient, where `wants_hessian_gradient` asked for it."""

    def evaluation_weight(self, param: Tensor, state: State) -> Tensor:
        """What to evaluate and publish in place of the parameter, for a rule that ``averages``."""
        return param


def same_kind(value: Any, default: Any) -> bool:
    """Whether a hyper-parameter has its default's type; whole numbers serve as floats."""
    if isinstance(default, tuple):
        same_length = isinstance(value, tuple) and len(value) == len(default)
        return same_length and all(map(same_kind, value, default))
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)


def count(state: State) -> int:
    """Steps done, on the host: the counter is created on the CPU and loaded in place there."""
    count: Any = state["step"].tolist()  # a number, as the tensor has no dimensions
    return int(count)


def zeros(param: Tensor) -> Tensor:
    """A zero state of the parameter's shape, at least float32 whatever the parameter is."""
    dtype = torch.promote_types(param.dtype, torch.float32)
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format)


def ema_(average: Tensor, x: Tensor, beta: float | Tensor) -> Tensor:
    """average <- beta * average + (1 - beta) * x, in place; equal bits eager and compiled."""
    return average.add_((x - average) * (1 - beta))


def ema_of_squares_(average: Tensor, x: Tensor, beta: float | Tensor) -> Tensor:
    """average <- beta * average + (1 - beta) * x**2, in place; equal bits eager and compiled."""
    return average.mul_(beta).add_(x * x * (1 - beta))


def root(x: Tensor) -> Tensor:
    """Square root, equal bits eager and compiled; 0 stays 0 (1/inf)."""
    return x.rsqrt().reciprocal()


def after_first(step: Tensor) -> Tensor:
    """0 at step 1, then 1: for rules whose first step neither moves nor decays."""
    return (step > 1).to(step.dtype)


def check_beta(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), given {value}")


def check_betas(betas: tuple[float, ...]) -> None:
    for i, beta in enumerate(betas):
        check_beta(f"betas[{i}]", beta)


def check_choice(name: str, value: str, valid: Iterable[str]) -> None:
    if value not in valid:
        raise ValueError(f"{name} must be one of {', '.join(valid)}, given {value!r}")


def check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, given {value}")
