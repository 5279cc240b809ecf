"""What an optimizer is doing, measured from outside, every n-th step.

    diagnostics = Diagnostics(optimizer, every=50)
    ...
    optimizer.step()
    figures = diagnostics.take()        {} or {"optim/matrix/update_rms": 0-D tensor, ...}

Nothing of the engine knows of it: torch's step hooks look at parameters, gradients and state before
and after a step. Without a `Diagnostics` the cost is zero; with one, three copies of the parameters
(the weights before a step, the gradient of the step before, the average gradient) and a few passes
over them at each n-th step. No figure is read on the host here.

For each role ("optim/matrix/...") and each param group ("optim/group.decay/..."), all its tensors
taken as one long vector; g_t is the gradient as the optimizer finds it (clipped by the trainer) and
c_t what MARS makes of it (before MARS's own clip; c_t = g_t where there is no correction):

    update_rms            RMS of the step, weight decay included
    update_to_weight      ||step|| / ||weights before it||
    gradient_cosine       cos(g_t, g_{t-1})
    gradient_variance     E ||g_t - E g_t||^2
    correction_variance   E ||c_t - E g_t||^2          the quantity that MARS claims to reduce
    correction_norm       ||c_t - g_t||
    correction_size       ||c_t - g_t|| / ||g_t||
    correction_clipped    share of MARS's tensors whose norm its clip reduced
    failed_roots          eigendecompositions that failed so far (optim/matrix_roots.py)

correction_... exist where there is MARS, failed_roots where a rule counts them. E g_t is estimated
by m, the running mean of the gradients at measured steps (plain at first, then exponential). It has
a variance of its own: if gradients of different batches are independent,

    E ||g_t - m||^2 = (1 + w) Var g       E ||c_t - m||^2 = Var c + w Var g

where w is the sum of m's squared weights. Both are solved for the variances, which are averaged
over the measured steps like m. With n = 1 approximate MARS shares g_{t-1} with m, which adds some
percent to its variance: measure every second step or less often.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from optim.correction import Mars
from optim.norms import norms
from optim.optimizer import Optimizer
from optim.roles import role_of
from optim.rule import count
from optim.rules import build_rule

DECAY = 0.9  # of the running means: they remember some ten measured steps
TINY = torch.finfo(torch.float32).tiny


class Diagnostics:
    """Measures every ``every``-th step of ``optimizer``, counted as its state counts, so that a
    resumed run measures at the same steps. Not for steps with a closure, whose gradients do not
    exist before the step. Raises ValueError if ``every`` is not positive."""

    def __init__(self, optimizer: Optimizer, every: int) -> None:
        if every < 1:
            raise ValueError(f"diagnostics every {every} steps: expected 1 or more")
        self.optimizer, self.every = optimizer, every
        self._params: list[Tensor] = []
        self._groups: list[dict[str, Any]] = []  # of each parameter
        self._sets: dict[str, list[int]] = {}  # name of a figure's set -> indices of its parameters
        for group in optimizer.param_groups:
            for name, param in zip(group["param_names"], group["params"], strict=True):
                for label in (role_of(name, param), f"group.{group['name']}"):
                    self._sets.setdefault(label, []).append(len(self._params))
                self._params.append(param)
                self._groups.append(group)
        self._before: list[Tensor] | None = None  # weights, during a measured step
        self._last: list[Tensor] | None = None  # gradients of the step before a measured one
        self._mean: list[Tensor] = []
        self._mean_variance = 0.0  # in units of the variance of one gradient
        self._measured = 0
        self._variances: dict[str, Tensor] = {}
        self._figures: dict[str, Tensor] = {}
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._look_before()),
            optimizer.register_step_post_hook(lambda *_: self._look_after()),
        ]

    def take(self) -> dict[str, Tensor]:
        """The figures of the last step, as 0-D tensors to be read late; empty if it was not
        measured, or taken before."""
        figures, self._figures = self._figures, {}
        return figures

    def remove(self) -> None:
        """Leave the optimizer alone again."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _look_before(self) -> None:
        step = max(count(self.optimizer.state[p]) for p in self._params) + 1
        measured, next_measured = step % self.every == 0, (step + 1) % self.every == 0
        self._figures = {}
        if not measured and not next_measured:
            return
        grads = [_gradient(p, g) for p, g in zip(self._params, self._groups, strict=True)]
        if measured:
            self._measure_gradients(grads)
            self._before = [p.detach().clone() for p in self._params]
        self._last = [g.clone() for g in grads] if next_measured else None

    @torch.no_grad()
    def _look_after(self) -> None:
        if self._before is None:
            return
        moved = norms([p - q for p, q in zip(self._params, self._before, strict=True)])
        weights = norms(self._before)
        self._before = None
        for label, members in self._sets.items():
            size = sum(self._params[i].numel() for i in members)
            step = _joint_norm(moved, members)
            self._report(label, "update_rms", step / size**0.5)
            self._report(label, "update_to_weight", step / _joint_norm(weights, members))
            states = [self.optimizer.state[self._params[i]] for i in members]
            if failed := [s["failed_roots"].sum() for s in states if "failed_roots" in s]:
                self._report(label, "failed_roots", torch.stack(failed).sum())

    def _measure_gradients(self, grads: list[Tensor]) -> None:
        corrected, clipped = self._corrections(grads)
        sizes, changes = norms(grads), norms(_differences(corrected, grads))
        last_sizes = None if self._last is None else norms(self._last)
        for label, members in self._sets.items():
            size = _joint_norm(sizes, members)
            if self._last is not None and last_sizes is not None:
                dots = torch.stack([(grads[i] * self._last[i]).sum() for i in members])
                both = size * _joint_norm(last_sizes, members)
                self._report(label, "gradient_cosine", dots.sum() / both)
            if flags := [clipped[i] for i in members if i in clipped]:
                change = _joint_norm(changes, members)
                self._report(label, "correction_norm", change)
                self._report(label, "correction_size", change / size)
                self._report(label, "correction_clipped", torch.stack(flags).mean())
        self._measure_variances(grads, corrected, set(clipped))

    def _measure_variances(
        self, grads: list[Tensor], corrected: list[Tensor], with_mars: set[int]
    ) -> None:
        self._measured += 1
        rate = max(1 - DECAY, 1 / self._measured)
        if self._measured == 1:
            self._mean, self._mean_variance = [g.clone() for g in grads], 1.0
            return
        of_grads = norms(_differences(grads, self._mean))
        of_corrected = norms(_differences(corrected, self._mean))
        for label, members in self._sets.items():
            variance = _joint_norm(of_grads, members) ** 2 / (1 + self._mean_variance)
            self._average(label, "gradient_variance", variance)
            if with_mars.intersection(members):
                distance = _joint_norm(of_corrected, members) ** 2
                excess = self._mean_variance * variance
                self._average(label, "correction_variance", distance - excess)
        torch._foreach_lerp_(self._mean, grads, rate)
        self._mean_variance = (1 - rate) ** 2 * self._mean_variance + rate**2

    def _corrections(self, grads: list[Tensor]) -> tuple[list[Tensor], dict[int, Tensor]]:
        """c_t of each parameter, unclipped; and for those under MARS whether the clip acts."""
        corrected, clipped = list(grads), {}
        for i, group in enumerate(self._groups):
            if group["correction"] == "mars":
                mars, rule = Mars(**group["mars"]), build_rule(group["rule"], group["hyper"])
                free, state = replace(mars, clip=None), self.optimizer.state[self._params[i]]
                corrected[i] = free(grads[i], state, rule)
                limit = float("inf") if mars.clip is None else mars.clip
                clipped[i] = (norms([corrected[i]])[0] > limit).float()
        return corrected, clipped

    def _average(self, label: str, name: str, value: Tensor) -> None:
        key = f"{label}/{name}"
        rate = max(1 - DECAY, 1 / (self._measured - 1))
        before = self._variances.get(key, value)
        self._variances[key] = before + (value - before) * rate
        self._report(label, name, self._variances[key])

    def _report(self, label: str, name: str, value: Tensor) -> None:
        self._figures[f"optim/{label}/{name}"] = value


def _gradient(param: Tensor, group: dict[str, Any]) -> Tensor:
    """As the rule sees it: at least float32, of the sign to descend; zero where there is none."""
    if param.grad is None:
        return torch.zeros_like(param, dtype=torch.promote_types(param.dtype, torch.float32))
    grad = -param.grad if group["maximize"] else param.grad
    return grad.to(torch.promote_types(grad.dtype, torch.float32))


def _differences(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _joint_norm(of_each: list[Tensor], members: list[int]) -> Tensor:
    """The norm of all members together, kept off zero, because it divides."""
    return torch.linalg.vector_norm(torch.stack([of_each[i] for i in members])).clamp(min=TINY)
