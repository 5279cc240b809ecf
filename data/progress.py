"""A bar on a terminal, with tokens per second and the time left; elsewhere nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Progress:
    """Where work reports what it has done; without a bar, to nobody."""

    def __init__(self, bar: Any = None) -> None:
        self._bar, self._tokens, self._start = bar, 0, time.monotonic()

    def tokenized(self, text_bytes: int, tokens: int) -> None:
        if self._bar is not None:
            self._tokens += tokens
            rate = self._tokens / max(1e-9, time.monotonic() - self._start)
            self._bar.set_postfix_str(f"{rate / 1e6:.2f}M tokens/s", refresh=False)
            self._bar.update(text_bytes)

    def written(self, amount: int) -> None:
        if self._bar is not None:
            self._bar.update(amount)


@contextmanager
def progress(
    title: str, total: int, done: int = 0, unit: str = "B", show: bool = True
) -> Iterator[Progress]:
    """A bar from `done` to `total`, of which the latter may be an estimate; none unless ``show``.

    tqdm need not be installed where there is no terminal.
    """
    if not (show and sys.stderr.isatty()):
        yield Progress()
        return
    from tqdm import tqdm

    with tqdm(desc=title, total=total, initial=done, unit=unit, unit_scale=True) as bar:
        yield Progress(bar)
