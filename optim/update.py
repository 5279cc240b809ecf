"""One update of some parameters: correction -> rule -> mask -> apply, as pure functions of tensors.

They run eagerly and compiled, and know nothing of parameter groups.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from optim.correction import Correction, NoCorrection
from optim.mask import Mask, no_mask
from optim.rule import Direction, Rule, State

# rule, correction, mask, the rule's direction at this step, weight decay
How = tuple[Rule, Correction, Mask, Direction, float]
# of parameters, gradients, states and lr: what is left of an update
Update = Callable[[list[Tensor], list[Tensor], list[State], Tensor], None]


def update_parameters(
    rule: Rule,
    correction: Correction,
    mask: Mask,
    direction: Direction,
    weight_decay: float,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[State],
    lr: Tensor,
) -> None:
    """Update parameters in place, for a matrix rule of one shape, after equally many steps."""
    us = directions(rule, correction, mask, direction, weight_decay, params, grads, states)
    for p, s, u in zip(params, states, us, strict=True):
        rule.apply(p, u, s, lr, weight_decay, states[0]["step"])


def write_directions(
    rule: Rule,
    correction: Correction,
    mask: Mask,
    direction: Direction,
    weight_decay: float,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[State],
    lr: Tensor,
) -> None:
    """The same up to `Rule.apply`: put what that takes into ``params``, which are buffers."""
    us = directions(rule, correction, mask, direction, weight_decay, params, grads, states)
    torch._foreach_copy_(params, us)


def directions(
    rule: Rule,
    correction: Correction,
    mask: Mask,
    direction: Direction,
    weight_decay: float,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[State],
) -> list[Tensor]:
    """All of an update but its last step: what `Rule.apply` takes.

    For a matrix rule the parameters are stacked. A stack of one is a view; of more it is a copy,
    which pays on a GPU, where one batched product beats many small ones.
    """
    step = states[0]["step"]
    grads = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in grads]
    corrected = [
        rule.regularize(correction(g, s, rule), p, weight_decay)
        for g, s, p in zip(grads, states, params, strict=True)
    ]
    if rule.granularity == "matrix":
        keys = [key for key in states[0] if key != "step" and key not in correction.keys]
        us = _stacked_directions(direction, corrected, states, keys, params)
    else:
        us = [direction(c, s, p, step) for c, s, p in zip(corrected, states, params, strict=True)]
    us = [mask(u, g) for u, g in zip(us, grads, strict=True)]
    for g, s in zip(grads, states, strict=True):
        correction.remember(g, s)
    return us


def _stacked_directions(
    direction: Direction,
    grads: list[Tensor],
    states: list[State],
    keys: list[str],
    params: list[Tensor],
) -> list[Tensor]:
    """Directions of matrices of one shape, all in one call on stacks (n, rows, cols)."""
    stacked = {key: _stack([state[key] for state in states]) for key in keys}
    u = direction(_stack(grads), stacked, _stack(params), states[0]["step"])
    for key, stack in stacked.items():
        for state, tensor in zip(states, stack.unbind(), strict=True):
            state[key].copy_(tensor)  # nothing to do where the stack is a view
    return list(u.unbind())


def _stack(tensors: list[Tensor]) -> Tensor:
    """Tensors of one shape as one, with a leading axis; a single one is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


# ---- gains and biases: so small that what they cost is calls ------------------------------------


def is_entrywise(rule: Rule, correction: Correction, mask: Mask) -> bool:
    """Whether each entry is updated on its own; MARS has a norm, the cautious mask a mean."""
    plain = isinstance(correction, NoCorrection) and mask is no_mask
    return plain and rule.granularity == "element"


def is_vector(param: Tensor, state: State) -> bool:
    """Whether a parameter and its state, but for the step, are vectors of one length."""
    return param.ndim == 1 and all(t.shape == param.shape for k, t in state.items() if k != "step")


def update_joined(
    rule: Rule,
    correction: Correction,
    mask: Mask,
    direction: Direction,
    weight_decay: float,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[State],
    lr: Tensor,
) -> None:
    """The same as `update_parameters`, bit for bit, for vectors of any lengths whose entries are
    updated each on its own: all in one call on one long vector."""
    kept = {key: [state[key] for state in states] for key in states[0] if key != "step"}
    param, state = torch.cat(params), {key: torch.cat(tensors) for key, tensors in kept.items()}
    how = (rule, correction, mask, direction, weight_decay)
    of_all = {"step": states[0]["step"], **state}
    update_parameters(*how, [param], [torch.cat(grads)], [of_all], lr)
    sizes = [p.numel() for p in params]
    torch._foreach_copy_(params, param.split(sizes))
    for key, tensors in kept.items():
        torch._foreach_copy_(tensors, state[key].split(sizes))
