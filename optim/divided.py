"""The optimizer of one process among many: it updates its part, and the parts come together.

Every process makes one from the same arguments and calls the same methods in the same order. How
the work is divided says optim/division.py; the rules are those of one process:

    element   update the rows that are this process's
    tensor    the same, side by side up to each sum over a whole tensor (optim/lockstep.py); so do
              element rules behind MARS or the cautious mask. State that does not follow the rows,
              as the means of columns, is kept in slices and whole during the update alone
    matrix    gradients travel to the owners, which compute the directions; these travel back in
              waves, each while the next is computed, and every process applies them to its rows

Updates that ask for sums run eagerly, whatever ``compile`` says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optim.correction import Correction
from optim.division import WAVES, Division, whole_state
from optim.lockstep import lockstep
from optim.norms import clip_grad_norm, held
from optim.optimizer import Optimizer, Piece, check_same, signed
from optim.rule import Rule, State, count
from optim.transport import Exchange
from optim.update import update_parameters, write_directions

MESSAGE = 2**28  # bytes of parameters whose rows travel together; a larger one travels alone
AHEAD = 2  # messages, or waves of matrices, that travel at a time: their buffers are kept


class Journey(NamedTuple):
    """Matrices whose gradients are on their way to their owners; ``arriving`` waits for each wave,
    and returns those that came here by their index in ``params``."""

    params: list[Tensor]
    exchange: Exchange
    arriving: list[Callable[[], dict[int, Tensor]]]


class DividedOptimizer(Optimizer):
    """`Optimizer` whose work ``division`` divides among processes. All must have the same
    parameters, and gradients of the same ones, reduced: the mean over the global batch.

    Raises ValueError where parameters are not laid out as the division says.
    """

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        division: Division,
        *,
        compile: bool = False,
        maximize: bool = False,
    ) -> None:
        self.division = division
        self._sliced: dict[Tensor, dict[str, torch.Size]] = {}  # whole shapes, by key
        super().__init__(groups, compile=compile, maximize=maximize)

    def clip_grad_norm(self, max_norm: float | None) -> Tensor:
        """`optim.clip_grad_norm` of all parameters, whoever holds their gradients' rows."""
        return clip_grad_norm(self._all_params(), max_norm, self.division.add_up_held)

    @property
    def sharing(self) -> str | None:
        return str(self.division)

    # ---- rows -----------------------------------------------------------------------------------

    def _part(self, x: Tensor, rule: Rule) -> Tensor:
        return self.division.part(x, rule)

    def _share(self, params: list[Tensor], rule: Rule) -> Callable[[], None]:
        travelling: deque[Callable[[], None]] = deque()
        for some in in_messages(params):
            travelling.append(self.division.share(some, rule))
            if len(travelling) > AHEAD:
                travelling.popleft()()

        def finish() -> None:
            while travelling:
                travelling.popleft()()

        return finish

    def _update_groups(self) -> None:
        stepped = [group for group in self.param_groups if _with_gradient(group)]
        journeys, summed, sharing = [], [], []
        for group in stepped:  # all gradients travel while rows are updated
            if self.division.by_owners(self._parts(group)[0]):
                journeys.append((group, self._send(group)))
        for group in stepped:
            parts = self._parts(group)
            if self.division.needs_sums(*parts):
                summed.append(group)
            elif not self.division.by_owners(parts[0]):
                self._update_pieces(group, self._pieces(group))
                sharing.append(self._share(_with_gradient(group), parts[0]))
        if summed:
            rule = self._parts(summed[0])[0]  # all of them divide alike
            params = [p for group in summed for p in _with_gradient(group)]
            with self._whole_slices(params, rule):
                tasks = [task for group in summed for task in self._tasks(group)]
                lockstep(tasks, self.division.add_up(rule))
            sharing += [self._share(_with_gradient(group), rule) for group in summed]
        for group, journey in journeys:
            self._update_owned(group, journey)
        for finish in sharing:
            finish()

    def _tasks(self, group: Mapping[str, Any]) -> list[Callable[[], None]]:
        """The updates of a group's rows, one by one, for `lockstep`."""
        rule, correction, mask = self._parts(group)
        lr, pieces = self._lr_tensor(group), self._pieces(group)
        torch._foreach_add_([piece.state["step"] for piece in pieces], 1.0)
        return [
            partial(
                update_parameters,
                *(rule, correction, mask, rule.direction_at(count(state), phase)),
                group["weight_decay"],
                *([param], [grad], [state], lr),
            )
            for param, grad, state, phase in pieces
        ]

    @contextmanager
    def _whole_slices(self, params: list[Tensor], rule: Rule) -> Iterator[None]:
        """Within, states are whole of which each process keeps a slice."""
        kept = [(self.state[p], *item) for p in params for item in self._sliced[p].items()]
        slices = [state[key] for state, key, _ in kept]
        if kept:
            whole = self.division.unslice(slices, [shape for *_, shape in kept], rule)
            for (state, key, _), tensor in zip(kept, whole, strict=True):
                state[key] = tensor
        yield
        for (state, key, _), own in zip(kept, slices, strict=True):
            state[key] = own.copy_(self.division.slice(state[key], rule))

    # ---- owners ---------------------------------------------------------------------------------

    def _send(self, group: Mapping[str, Any]) -> Journey:
        """Start the gradients of a group's matrices on their way to their owners."""
        params = _with_gradient(group)
        grads = [signed(held(p.grad), group) for p in params if p.grad is not None]
        exchange = self.division.exchange(params, self._parts(group)[0])
        return Journey(params, exchange, [exchange.there(grads, wave) for wave in range(WAVES)])

    def _update_owned(self, group: Mapping[str, Any], journey: Journey) -> None:
        """Compute the directions of this process's matrices, wave by wave, and apply all."""
        rule, _, _ = self._parts(group)
        lr, decay = self._lr_tensor(group), group["weight_decay"]
        states = [self.state[p] for p in journey.params]
        torch._foreach_add_([state["step"] for state in states], 1.0)
        returning: deque[Callable[[], dict[int, Tensor]]] = deque()

        def apply_first() -> None:
            for i, u in returning.popleft()().items():
                rule.apply(held(journey.params[i]), u, states[i], lr, decay, states[i]["step"])

        for wave, arrive in enumerate(journey.arriving):
            us = self._directions(group, arrive(), states)
            returning.append(journey.exchange.back(us, wave))
            if len(returning) == AHEAD:
                apply_first()
        while returning:
            apply_first()

    def _directions(
        self, group: Mapping[str, Any], grads: Mapping[int, Tensor], states: list[State]
    ) -> dict[int, Tensor]:
        rule, correction, mask = self._parts(group)
        # Owners see no parameters: a rule that reads one gets NaN, and does not go wrong unnoticed.
        us = {i: torch.full_like(grad, torch.nan) for i, grad in grads.items()}
        phases = self._phases(group)
        pieces = [Piece(us[i], grad, states[i], phases[i]) for i, grad in grads.items()]
        for some, _ in self._calls(group, pieces):
            params, own, kept, phase = map(list, zip(*some, strict=True))
            direction = rule.direction_at(count(kept[0]), phase[0])
            how = (rule, correction, mask, direction, group["weight_decay"])
            update = partial(write_directions, *how)
            self._run(update, how, False, params, own, kept, self._lr_tensor(group))
        return us

    # ---- state ----------------------------------------------------------------------------------

    def _prepare(self, group: Mapping[str, Any]) -> None:
        rule, _, _ = self._parts(group)
        for name, param in zip(group["param_names"], group["params"], strict=True):
            self.division.check(name, param, rule)
        if self.division.by_owners(rule):
            self.division.assign(group["params"], rule)

    def _fresh_state(self, param: Tensor, rule: Rule, correction: Correction) -> State:
        self._sliced[param] = self.division.sliced(param, rule, correction)
        seen = self.division.seen(param, rule)
        state = {} if seen is None else super()._fresh_state(seen, rule, correction)
        for key in self._sliced[param]:
            state[key] = self.division.slice(state[key], rule).clone()
        return state

    def _gradients(self, group: Mapping[str, Any]) -> Iterator[tuple[State, Tensor]]:
        if not self.division.by_owners(self._parts(group)[0]):
            yield from super()._gradients(group)
        elif _with_gradient(group):
            journey = self._send(group)
            for arrive in journey.arriving:
                for i, grad in arrive().items():
                    yield self.state[journey.params[i]], grad

    def _entries(self, param: Tensor, group: Mapping[str, Any]) -> State:
        rule, correction, _ = self._parts(group)
        return self.division.named(param, self.state[param], rule, correction)

    @torch.no_grad()
    def load_named_state(self, saved: Mapping[str, Tensor]) -> None:
        """Copy in place a flat state that this division made, or a whole one, such as one process
        has alone. ValueError if any key, shape or dtype differs."""
        own = self.named_state()
        check_same(own if own.keys() == saved.keys() else self._whole_state(), saved)
        for group in self.param_groups:
            rule, _, _ = self._parts(group)
            for name, p in zip(group["param_names"], group["params"], strict=True):
                for key, tensor in self._entries(p, group).items():
                    self.division.copy_(tensor, saved[f"{name}.{key}"], rule)

    def _whole_state(self) -> dict[str, Tensor]:
        """What `named_state` is on one process: shapes and dtypes."""
        return {
            f"{name}.{key}": tensor
            for group in self.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)
            for key, tensor in whole_state(p, p.shape, *self._parts(group)[:2]).items()
        }


def in_messages(params: Sequence[Tensor]) -> list[list[Tensor]]:
    """In order, and as many in each list as stay below `MESSAGE`, or one."""
    messages: list[list[Tensor]] = []
    filled = MESSAGE
    for p in params:
        size = held(p.detach()).nbytes
        if filled + size > MESSAGE:
            messages.append([])
            filled = 0
        messages[-1].append(p)
        filled += size
    return messages


def _with_gradient(group: Mapping[str, Any]) -> list[Tensor]:
    return [p for p in group["params"] if p.grad is not None]
