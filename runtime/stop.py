"""Being asked to stop: SIGTERM (schedulers) and SIGINT (Ctrl-C) end a run after this step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """While active, the first signal sets ``requested``; the second one acts as if none of this
    were here (Ctrl-C twice ends at once)."""

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested: str | None = None  # name of the signal
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {s: signal.signal(s, self._note) for s in self.signals}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        self._restore()

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
