"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
import time

import pytest

from runtime import stop
from runtime.stop import StopRequest


def test_a_repeat_is_the_same_request_and_a_later_one_ends_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torchrun's processes get Ctrl-C from the terminal and again from torchrun."""
    monkeypatch.setattr(stop, "REPEAT", 0.2)
    whoever = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    survived = False
    with pytest.raises(KeyboardInterrupt), StopRequest() as request:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        survived = request.requested == "SIGINT"
        time.sleep(0.3)
        signal.raise_signal(signal.SIGINT)
    assert survived
    assert signal.signal(signal.SIGINT, whoever) is signal.default_int_handler
