"""The learning rate as a fraction of its peak, a pure function of the step.

All schedules are one: warm-up, then the peak, then a decay of some shape over the last part.
"cosine" and "linear" decay from the end of the warm-up on, "wsd" (warm-up, stable, decay) over the
last fifth, "constant" not at all. So every schedule has the same knobs and none needs code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# shape of the decay: x in [0, 1] -> remaining height in [0, 1], from 1 at x = 0 to 0 at x = 1
SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - math.sqrt(x),  # arXiv 2405.18392: beats linear in WSD's short decays
    "square": lambda x: 1 - x * x,
    "exponential": lambda x: (math.exp(-5 * x) - math.exp(-5)) / (1 - math.exp(-5)),
}
# warm-up: (step, warmup_steps) -> fraction of the peak
WARMUPS: dict[str, Callable[[int, int], float]] = {
    "nanogpt": lambda step, warmup: (step + 1) / (warmup + 1),  # the first update already moves
    "mars": lambda step, warmup: step / warmup,  # AGI-Arena/MARS: the first update has lr 0
}


@dataclass(frozen=True)
class Schedule:
    """``schedule(step)`` is lr / peak lr for the update that follows ``step`` updates.

    steps: where the decay ends (usually the length of the run); from there on ``final``.
    warmup_steps, warmup: length and convention of the linear warm-up.
    decay_fraction: the part of ``steps`` that decays; 1 decays from the end of the warm-up.
    decay_shape: one of `SHAPES`. final: the fraction of the peak that is left at the end.
    """

    steps: int
    warmup_steps: int
    warmup: str
    decay_fraction: float
    decay_shape: str
    final: float

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"schedule.steps must be at least 1, given {self.steps}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(
                f"schedule.warmup_steps is {self.warmup_steps}, but the schedule has {self.steps} "
                f"steps: lower schedule.warmup_steps or raise train.steps"
            )
        for key, valid in (("warmup", WARMUPS), ("decay_shape", SHAPES)):
            if (given := getattr(self, key)) not in valid:
                raise ValueError(f"schedule.{key} is {given!r}, expected one of {', '.join(valid)}")
        for key in ("decay_fraction", "final"):
            if not 0 <= (value := getattr(self, key)) <= 1:
                raise ValueError(f"schedule.{key} must be in [0, 1], given {value}")

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return WARMUPS[self.warmup](step, self.warmup_steps)
        start = max(self.warmup_steps, self.steps * (1 - self.decay_fraction))
        if step <= start or self.decay_fraction == 0:
            return 1.0
        height = SHAPES[self.decay_shape](min(1.0, (step - start) / (self.steps - start)))
        return self.final + (1 - self.final) * height
