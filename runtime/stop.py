"""Being asked to stop: SIGTERM (schedulers) and SIGINT (Ctrl-C) end a run after this step."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

REPEAT = 1.0  # seconds in which the same request arrives a second time


class StopRequest:
    """While active, the first signal sets ``requested``; a later one acts as if none of this were
    here (Ctrl-C twice ends at once). One within `REPEAT` is the same request by another way: the
    processes of torchrun get a terminal's Ctrl-C, or a scheduler's SIGTERM, themselves, and once
    more from torchrun."""

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested: str | None = None  # name of the signal
        self._asked = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {s: signal.signal(s, self._note) for s in self.signals}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested is None:
            self.requested, self._asked = signal.Signals(number).name, now
        elif now - self._asked > REPEAT:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()
