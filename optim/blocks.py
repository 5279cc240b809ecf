"""A parameter as several matrices: one too large cut into blocks, or several stacked in its rows.

Fused matrices, such as GPT-2's c_attn (query, key, value: ``fused: 3``), are updated each on its
own by a rule that has the field ``fused`` and the two decorators below. Their states lie stacked in
rows as they do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from itertools import product
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from optim.rule import Granularity, Rule, State, check_positive
from optim.sharding import plan


def blocks(shape: Sequence[int], size: int) -> list[tuple[slice, ...]]:
    """(rows, columns) of each block of a matrix, none larger than ``size``; the last are smaller
    where it does not divide."""
    cuts = [[slice(i, min(i + size, n)) for i in range(0, n, size)] for n in shape]
    return list(product(*cuts))


def sides(shape: Sequence[int], size: int) -> list[tuple[str, int]]:
    """("<block>.<side>", its length) for each side of each block of a matrix; of a vector, cut in
    the same way, for its one side."""
    cuts = [[s.stop - s.start for s in block] for block in blocks(shape, size)]
    return [(f"{i}.{side}", n) for i, block in enumerate(cuts) for side, n in enumerate(block)]


def factored_work(
    shape: Sequence[int],
    fused: int,
    size: int,
    longest: int,
    products: int,
    decomposition: float,
) -> int:
    """Cost of a step of a rule with a factor for each side of each block, in multiplications:
    ``products`` of the block with a matrix of that side, and a ``decomposition`` of it, worth so
    many products of its size. Sides longer than ``longest`` have no factor."""
    fused = fused if len(shape) == 2 else 1
    work = float(prod(shape))
    for block in blocks((shape[0] // fused, *shape[1:]), size):
        lengths = [s.stop - s.start for s in block]
        for n in lengths:
            if n <= longest:
                work += fused * (products * n * prod(lengths) + decomposition * n**3)
    return int(work)


@dataclass(frozen=True)
class Factored(Rule):
    """Base of rules with a factor for each side of each block, all of which are decomposed every
    ``precondition_frequency`` steps: in one of them, or with ``spread`` each matrix in its own,
    such that these steps cost about the same."""

    granularity: ClassVar[Granularity] = "matrix"
    orders: ClassVar[tuple[int, ...]] = (1, 2)
    # of a block with a matrix of one side in each step, and how many a decomposition is worth
    products: ClassVar[int]
    decomposition: ClassVar[int]

    precondition_frequency: int = 1
    spread: bool = False
    fused: int = 1  # matrices stacked in rows

    def cuts(self, shape: Sequence[int]) -> tuple[int, int]:
        """Size of the blocks, and the longest side that has a factor."""
        raise NotImplementedError

    def work(self, shape: Sequence[int]) -> int:
        often = self.decomposition / self.precondition_frequency
        return factored_work(shape, self.fused, *self.cuts(shape), self.products, often)

    def phases(self, shapes: tuple[torch.Size, ...]) -> Sequence[int]:
        return _even_phases(self, shapes) if self.spread else super().phases(shapes)


@cache
def _even_phases(rule: Factored, shapes: tuple[torch.Size, ...]) -> Sequence[int]:
    costs = [factored_work(s, rule.fused, *rule.cuts(s), 0, rule.decomposition) for s in shapes]
    return plan(costs, rule.precondition_frequency).owners


def as_matrices(stack: Tensor) -> Tensor:
    """A stack of vectors (n, d) as one of matrices with a single column; of matrices, itself."""
    return stack.unsqueeze(-1) if stack.ndim == 2 else stack


def state_of_fused(init_state: Callable[[Any, Tensor], State]) -> Callable[[Any, Tensor], State]:
    """Decorator of `Rule.init_state`, which sees one of the fused matrices; what it returns has at
    least one dimension. ValueError where the rows are not that many matrices."""

    @wraps(init_state)
    def of_all(rule: Any, param: Tensor) -> State:
        check_positive("fused", rule.fused)
        if rule.fused == 1 or param.ndim == 1:
            return init_state(rule, param)
        if len(param) % rule.fused:
            raise ValueError(f"{len(param)} rows are not {rule.fused} fused matrices")
        state = init_state(rule, param[: len(param) // rule.fused])
        return {key: torch.cat([tensor] * rule.fused) for key, tensor in state.items()}

    return of_all


def each_fused(direction: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorator of `Rule.direction` and its like, which then sees (n * fused, rows, columns) where
    parameters are (n, fused * rows, columns), and the state likewise."""

    @wraps(direction)
    def of_each(rule: Any, grad: Tensor, state: State, param: Tensor, step: Tensor) -> Tensor:
        if rule.fused == 1 or grad.ndim == 2:
            return direction(rule, grad, state, param, step)
        grads, params = (_apart(x, rule.fused) for x in (grad, param))
        states = {key: _apart(tensor, rule.fused) for key, tensor in state.items()}
        return direction(rule, grads, states, params, step).reshape(grad.shape)

    return of_each


def _apart(stack: Tensor, fused: int) -> Tensor:
    """(n, fused * rows, ...) as (n * fused, rows, ...), the same memory: updates are in place."""
    return stack.view(len(stack) * fused, stack.shape[1] // fused, *stack.shape[2:])
