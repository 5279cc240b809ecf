"""The one optimizer: correction -> rule -> mask -> decoupled weight decay, for every update rule.

    gradient (mean over the global batch, globally clipped)
      -> correction   none | mars                      optim/correction.py
      -> rule         adamw | lion | signum | ...      optim/rules/<name>.py
      -> mask         none | cautious                  optim/mask.py
      -> param <- (1 - lr wd) param - lr u             Rule.apply

It is an ordinary `torch.optim.Optimizer`: param groups hold plain values (so LR schedulers and
state_dict see everything that shapes the trajectory), and rules are rebuilt from them. State is
created with the optimizer, at least in float32 whatever the parameter's precision. Nothing in
``step`` reads a device value on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optim.correction import CORRECTIONS, Correction
from optim.mask import MASKS, Mask
from optim.norms import clip_grad_norm, held
from optim.roles import role_of
from optim.rule import Rule, State, count
from optim.rules import build_rule
from optim.update import How, Update, is_entrywise, is_vector, update_joined, update_parameters

# Layers in a compiled call, at most: where entries depend on nothing else, and where they do. Few,
# for the time that compilation takes (a second for each parameter of the second kind) and for the
# cache of a CPU; on a GPU calls must be fewer than kernels are slow (unmeasured).
PER_GRAPH = {"cpu": (2, 1), "cuda": (3, 3)}


class Piece(NamedTuple):
    """What is updated at once: a parameter, its gradient, its state and its `Rule.phases`."""

    param: Tensor
    grad: Tensor
    state: State
    phase: int


class Optimizer(torch.optim.Optimizer):
    """Apply to each param group its correction, rule and mask.

    ``groups`` are dicts with ``params`` (a list of (name, parameter)), ``name``, ``rule``,
    ``hyper`` (the rule's hyper-parameters), ``correction``, ``mars``, ``mask``, ``lr``,
    ``lr_scale``, ``weight_decay``; `optim.create_optimizer` makes them from an optimizer's name.

    ``compile`` runs the update through torch's compiler: one graph per distinct shape, compiled
    once whatever the depth of the model. ``maximize`` climbs instead of descending.
    """

    def __init__(
        self, groups: Iterable[Mapping[str, Any]], *, compile: bool = False, maximize: bool = False
    ) -> None:
        own = [dict(group) for group in groups]
        # torch calls add_param_group from its constructor: what that needs must exist before
        self._compile = compile
        self._compiled: dict[Any, Update] = {}
        self._lr: dict[str, Tensor] = {}
        defaults = {k: v for k, v in own[0].items() if k not in ("params", "name")}
        super().__init__(own, {**defaults, "maximize": maximize})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, also later; what it does not say is taken from the first group."""
        param_group.setdefault("name", f"group{len(self.param_groups)}")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for key in ("lr", "weight_decay"):
            if isinstance(group[key], (int, float)) and not group[key] >= 0:
                raise ValueError(f"{key} must not be negative, given {group[key]}")
        if isinstance(group["lr"], Tensor):  # schedulers fill it in place: never share it
            group["lr"] = group["lr"].clone()
        rule, correction, _ = self._parts(group)
        for name, param in zip(group["param_names"], group["params"], strict=True):
            if rule.granularity == "matrix" and param.ndim not in rule.orders:
                raise ValueError(
                    f"{name} has shape {tuple(param.shape)}, but {group['rule']} updates matrices "
                    f"only: give it another rule in optim.groups"
                )
        self._prepare(group)
        for name, param in zip(group["param_names"], group["params"], strict=True):
            try:
                own = self._fresh_state(param, rule, correction)
            except ValueError as error:
                raise ValueError(f"{name}, rule {group['rule']}: {error}") from None
            self.state[param] = {"step": torch.zeros((), dtype=torch.float64), **own}

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle keeps; torch's own keeps nothing but state and groups."""
        return {**super().__getstate__(), "_compile": self._compile}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # `load_state_dict` comes here too
        for key in ("_compiled", "_lr"):
            self.__dict__.setdefault(key, {})

    @property
    def needs_extra_gradients(self) -> bool:
        """Whether any step needs a gradient besides its own: exact MARS, Sophia."""
        rules = [type(self._parts(group)[0]) for group in self.param_groups]
        return self.needs_next_batch_gradient or any(
            rule.wants_hessian_gradient is not Rule.wants_hessian_gradient for rule in rules
        )

    @property
    def needs_next_batch_gradient(self) -> bool:
        """Whether the loop must provide, before each step, the gradient of the next batch at the
        present weights (exact MARS) and announce it with `store_next_batch_gradient`."""
        return any(self._parts(group)[1].exact for group in self.param_groups)

    @torch.no_grad()
    def store_next_batch_gradient(self) -> None:
        """Keep the gradients that lie in ``p.grad`` as those of the next batch."""
        for group in self.param_groups:
            if self._parts(group)[1].exact:
                for state, grad in self._gradients(group):
                    state["next_grad"].copy_(grad)

    @property
    def needs_hessian_gradient(self) -> bool:
        """Whether the loop must now, between two steps, provide the gradient of the mean loss on
        labels sampled from the model's own predictions and announce it with
        `store_hessian_gradient` (Sophia)."""
        return any(map(self._wants_hessian_gradient, self.param_groups))

    @torch.no_grad()
    def store_hessian_gradient(self) -> None:
        """Take the gradients that lie in ``p.grad`` as those on sampled labels."""
        for group in filter(self._wants_hessian_gradient, self.param_groups):
            rule = self._parts(group)[0]
            for state, grad in self._gradients(group):
                if rule.wants_hessian_gradient(count(state)):
                    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
                    rule.observe_hessian_gradient(grad, state)

    def _wants_hessian_gradient(self, group: Mapping[str, Any]) -> bool:
        wants = self._parts(group)[0].wants_hessian_gradient
        return any(wants(count(self.state[p])) for p in group["params"])

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Within, parameters hold the weights to evaluate and to publish: for rules that average
        (schedule-free ones) the averages, which cost a copy of them; for all others what they
        hold anyway. Afterwards they hold what they held, bit for bit."""
        kept: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for group in self.param_groups:
                rule, _, _ = self._parts(group)
                if rule.averages:
                    kept += [(p, p.clone()) for p in map(held, group["params"])]
                    for p in group["params"]:
                        part = self._part(p, rule)
                        part.copy_(rule.evaluation_weight(part, self.state[p]))
                    self._share(group["params"], rule)()
        try:
            yield
        finally:
            with torch.no_grad():
                for p, weight in kept:
                    p.copy_(weight)

    def set_lr(self, lr: float) -> None:
        """Give every group ``lr`` times its own ``lr_scale``."""
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]

    @torch._disable_dynamo  # in a user's compiled function too, an optimizer runs as it is
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepped = [g for g in self.param_groups if any(p.grad is not None for p in g["params"])]
        self._update_groups()
        for rule in {self._parts(group)[0]: None for group in stepped}:
            if rule.joint:
                groups = [group for group in self.param_groups if self._parts(group)[0] == rule]
                rule.join([self.state[p] for group in groups for p in group["params"]])
        return loss

    def clip_grad_norm(self, max_norm: float | None) -> Tensor:
        """`optim.clip_grad_norm` of all parameters."""
        return clip_grad_norm(self._all_params(), max_norm)

    @property
    def sharing(self) -> str | None:
        """How the work is shared among processes, in words; None where there is one."""
        return None

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _pieces(self, group: Mapping[str, Any]) -> list[Piece]:
        rule = self._parts(group)[0]
        params = [p for p in group["params"] if p.grad is not None]
        return [
            Piece(self._part(p, rule), signed(self._part(p.grad, rule), group), self.state[p], k)
            for p, k in zip(params, self._phases(group), strict=True)
        ]

    def _phases(self, group: Mapping[str, Any]) -> list[int]:
        """`Rule.phases`, which looks at all parameters, of those that have a gradient."""
        params = group["params"]
        phases = self._parts(group)[0].phases(tuple(p.shape for p in params))
        return [k for p, k in zip(params, phases, strict=True) if p.grad is not None]

    def _update_groups(self) -> None:
        for group in self.param_groups:
            self._update_pieces(group, self._pieces(group))

    def _update_pieces(self, group: Mapping[str, Any], pieces: list[Piece]) -> None:
        if not pieces:
            return
        rule, correction, mask = self._parts(group)
        lr = self._lr_tensor(group)
        torch._foreach_add_([piece.state["step"] for piece in pieces], 1.0)
        if self._by_kernel(group, rule, lr, pieces):
            return
        for some, joined in self._calls(group, pieces):
            params, grads, states, phases = map(list, zip(*some, strict=True))
            direction = rule.direction_at(count(states[0]), phases[0])
            how = (rule, correction, mask, direction, group["weight_decay"])
            update = partial(update_joined if joined else update_parameters, *how)
            self._run(update, how, joined, params, grads, states, lr)

    def _by_kernel(
        self, group: Mapping[str, Any], rule: Rule, lr: Tensor, pieces: list[Piece]
    ) -> bool:
        """Update the whole group in one call, if torch has a kernel for exactly this update."""
        plain = group["correction"] == "none" and group["mask"] == "none"
        if not plain or lr.device.type != "cpu":
            return False
        params, grads, states, _ = map(list, zip(*pieces, strict=True))
        if not rule.has_kernel(params):
            return False
        rule.kernel(params, grads, states, float(lr), group["weight_decay"])
        return True

    def _calls(
        self, group: Mapping[str, Any], pieces: list[Piece]
    ) -> Iterator[tuple[list[Piece], bool]]:
        """Pieces to update in one call, and whether joined into one vector. Calls of a matrix rule
        have one shape and direction: on a GPU all such matrices. What is compiled goes by layers,
        one of each shape of which there are equally many, so that all calls share a few graphs
        whatever the depth of the model."""
        rule, correction, mask = self._parts(group)
        entrywise = is_entrywise(rule, correction, mask)
        sets: dict[Any, list[Piece]] = {}
        for piece in pieces:
            p, grad, state, phase = piece
            joined, steps = entrywise and is_vector(p, state), count(state)
            shape, direction = None if joined else p.shape, rule.direction_at(steps, phase)
            key = (joined, shape, _is_small(p), p.dtype, grad.device, steps, direction)
            sets.setdefault(key, []).append(piece)
        layers: dict[Any, list[list[Piece]]] = {}
        for (joined, _, *alike), found in sets.items():
            if joined or (rule.granularity == "matrix" and found[0].grad.is_cuda):
                yield found, joined
            elif self._compile and rule.granularity != "matrix":
                layers.setdefault((len(found), *alike), []).append(found)
            else:
                yield from (([piece], False) for piece in found)
        for (n, *_), shapes in layers.items():
            most = PER_GRAPH.get(shapes[0][0].param.device.type, (1, 1))
            size = _equal_part(n, most[not entrywise])
            for i in range(0, n, size):
                yield [piece for found in shapes for piece in found[i : i + size]], False

    def _parts(self, group: Mapping[str, Any]) -> tuple[Rule, Correction, Mask]:
        correction = CORRECTIONS[group["correction"]]
        options = group["mars"] if group["correction"] == "mars" else {}
        return (
            build_rule(group["rule"], group["hyper"]),
            correction(**options),
            MASKS[group["mask"]],
        )

    def _lr_tensor(self, group: Mapping[str, Any]) -> Tensor:
        if isinstance(group["lr"], Tensor):
            return group["lr"]
        lr = self._lr.setdefault(group["name"], torch.zeros((), dtype=torch.float64))
        return lr.fill_(group["lr"])

    def _run(
        self,
        update: partial[None],
        how: How,
        joined: bool,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        lr: Tensor,
    ) -> None:
        """Call a function of optim/update.py, compiled where that pays."""
        rule, correction, mask, direction, weight_decay = how
        small = joined or _is_small(params[0])
        if self._compile and not small and direction == rule.direction:
            alike = [(t.shape, t.stride(), t.dtype, t.device) for t in (*params, *grads, lr)]
            key = (update.func, rule, correction, mask, weight_decay, *alike)
            if key not in self._compiled:
                from optim.compilation import compiled  # imports inductor: seconds

                self._compiled[key] = compiled(update, params, grads, states, lr)
            self._compiled[key](params, grads, states, lr)
        else:
            update(params, grads, states, lr)

    # ---- what optim/divided.py does otherwise, for several processes ----------------------------

    def _prepare(self, group: Mapping[str, Any]) -> None:
        """Before there is state for a group."""
        for name, param in zip(group["param_names"], group["params"], strict=True):
            if hasattr(param, "to_local"):
                raise ValueError(
                    f"{name} is a DTensor, of which this process holds some rows: tell "
                    f"create_optimizer which processes hold the others, division=Division(...)"
                )

    def _fresh_state(self, param: Tensor, rule: Rule, correction: Correction) -> State:
        return {**rule.init_state(param), **correction.init_state(param)}

    def _part(self, x: Tensor, rule: Rule) -> Tensor:
        """What of a parameter or its gradient is updated here."""
        return x

    def _share(self, params: list[Tensor], rule: Rule) -> Callable[[], None]:
        """Start to exchange what was updated; the result finishes."""
        return lambda: None

    def _entries(self, param: Tensor, group: Mapping[str, Any]) -> State:
        """The state of a parameter for `named_state`."""
        return self.state[param]

    def _gradients(self, group: Mapping[str, Any]) -> Iterator[tuple[State, Tensor]]:
        """Gradients of a group beside the states that are kept here."""
        return ((piece.state, piece.grad) for piece in self._pieces(group))

    # ---- state ----------------------------------------------------------------------------------

    def named_state(self) -> dict[str, Tensor]:
        """Flat state, "<parameter name>.<key>" -> tensor: what a checkpoint holds."""
        return {
            f"{name}.{key}": tensor
            for group in self.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)
            for key, tensor in self._entries(p, group).items()
        }

    @torch.no_grad()
    def load_named_state(self, saved: Mapping[str, Tensor]) -> None:
        """Copy a flat state in place. ValueError if any key, shape or dtype differs."""
        own = self.named_state()
        check_same(own, saved)
        for name, tensor in own.items():
            tensor.copy_(saved[name])

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but strict and exact: torch casts every state tensor to the parameter's
        dtype, aliases the given tensors and drops missing ones silently."""
        own = {p: self.state[p] for group in self.param_groups for p in group["params"]}
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        if len(ids) != len(own):
            raise ValueError(f"the state has {len(ids)} parameters, the optimizer {len(own)}")
        for i, state in zip(ids, own.values(), strict=True):
            check_same(state, state_dict["state"].get(i, {}), f"parameter {i}: ")
        super().load_state_dict(state_dict)
        for i, (p, state) in zip(ids, own.items(), strict=True):
            for key, tensor in state.items():
                tensor.copy_(state_dict["state"][i][key])
            self.state[p] = state

    def table(self) -> list[dict[str, Any]]:
        """One row per parameter: its group, rule, lr, weight decay and bytes of state."""
        return [
            {
                "parameter": name,
                "shape": list(p.shape),
                "role": role_of(name, p),
                "group": group["name"],
                "rule": group["rule"],
                "correction": group["correction"],
                "mask": group["mask"],
                "lr": float(group["lr"]),
                "weight_decay": group["weight_decay"],
                "state_bytes": sum(t.nbytes for t in self.state[p].values()),
            }
            for group in self.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)
        ]


def _is_small(param: Tensor) -> bool:
    """Whether compilation does not pay. A CPU gains little on a vector, whose compilation takes as
    long as that of a matrix."""
    return not param.numel() or (param.ndim < 2 and param.is_cpu)


def _equal_part(n: int, most: int) -> int:
    """Size of the fewest equal parts of n that have at most ``most`` members."""
    return max(size for size in range(1, most + 1) if n % size == 0)


def signed(grad: Tensor, group: Mapping[str, Any]) -> Tensor:
    return -grad if group["maximize"] else grad


def check_same(own: Mapping[str, Tensor], saved: Mapping[str, Any], where: str = "") -> None:
    if own.keys() != saved.keys():
        missing, extra = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
        raise ValueError(
            f"{where}the saved optimizer state is another optimizer's: missing {missing[:3]}, "
            f"left over {extra[:3]}"
        )
    for key, tensor in own.items():
        given = saved[key]
        if tensor.shape != given.shape or tensor.dtype != given.dtype:
            raise ValueError(
                f"{where}saved state {key} is {given.dtype} {tuple(given.shape)}, "
                f"expected {tensor.dtype} {tuple(tensor.shape)}"
            )
