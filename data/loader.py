"""Batches of token ids, read ahead of the step that needs them.

One thread copies: a batch is a few hundred windows of mapped files, some 50 microseconds of work,
and numpy lets the training thread run meanwhile, also where a page must be waited for.  What can
take long is the disk, above all a network's, which answers one question as late as a thousand.  So
the windows of the coming batches are announced to the system (madvise) before the first of them is
copied: it fetches them all at a time, and these windows alone, not what lies around them.

Because an order is a function of the step alone, asking for any other step is never wrong, only
slower.
"""

from __future__ import annotations

import atexit
import threading
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from data.order import Order
from data.shards import Split


def read_windows(
    split: Split, offsets: np.ndarray, context: int, pin_memory: bool = False
) -> Tensor:
    """The windows that start at `offsets`: int64, shape (len(offsets), context + 1)."""
    out = torch.empty(len(offsets), context + 1, dtype=torch.int64, pin_memory=pin_memory)
    split.read_rows(offsets, out.numpy())  # which shares the tensor's memory
    return out


class Loader:
    """`batch(step)` for the rows of the global batch that this process holds.

    Args:
        split: where the tokens are.
        order: which of them each step reads.
        rows: this process's rows of the global batch (None: all of them).
        pin_memory: whether batches lie in page-locked memory, from which copies to a GPU run
            beside its work.  Needs CUDA.
        prefetch: batches read ahead, at least 1.

    Steps may be asked for in order, again, or ahead of the present one (exact MARS asks for the
    next batch before it finishes this one): the last one behind is kept too.  What fails in the
    thread is raised by the `batch` call that needs that step.  One thread may call `batch` at a
    time.  Use as a context manager, or close.
    """

    def __init__(
        self,
        split: Split,
        order: Order,
        *,
        rows: slice | None = None,
        pin_memory: bool = False,
        prefetch: int = 4,
    ) -> None:
        if prefetch < 1:
            raise ValueError(f"data.prefetch={prefetch}: expected at least 1")
        self.split, self.order, self.pin_memory = split, order, pin_memory
        self.rows = slice(None) if rows is None else rows
        self.prefetch = prefetch
        self._batches: dict[int, Tensor | BaseException] = {}
        self._announced: dict[int, np.ndarray] = {}  # step -> offsets; the thread's own
        self._step: int | None = None  # the last one asked for
        self._closed = False
        self._changed = threading.Condition()
        # A daemon does not keep a dying process alive; atexit stops it before Python is torn down
        # around it.
        self._thread = threading.Thread(target=self._read_ahead, name="data loader", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def batch(self, step: int) -> Tensor:
        """The windows of a step: int64, shape (rows, context + 1).  Do not write to it."""
        with self._changed:
            if self._closed:
                raise RuntimeError("this loader is closed")
            self._step = step
            for old in [s for s in self._batches if s not in self._wanted()]:
                del self._batches[old]
            self._changed.notify_all()
            self._changed.wait_for(lambda: step in self._batches or self._closed)
            if self._closed:
                raise RuntimeError("the loader was closed while a batch was awaited")
            batch = self._batches[step]
            if isinstance(batch, BaseException):
                del self._batches[step]  # asked again, the step is read again
                raise batch
            return batch

    def _wanted(self) -> range:
        """The steps to hold: one behind, the one asked for, and `prefetch` ahead."""
        step = self._step
        return range(0) if step is None else range(step - 1, step + self.prefetch + 1)

    def _missing(self) -> int | None:
        """The step to read next, under the lock: the one asked for, then those after it."""
        ahead = self._wanted()[1:]
        return next((step for step in ahead if step not in self._batches), None)

    def _read_ahead(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._missing() is not None)
                step = self._missing()
                if self._closed or step is None:
                    return
            try:
                batch: Tensor | BaseException = self._read(step)
            except BaseException as error:
                batch = error
            with self._changed:
                if step in self._wanted():
                    self._batches[step] = batch
                self._changed.notify_all()

    def _read(self, step: int) -> Tensor:
        coming = range(step, step + self.prefetch + 1)
        self._announced = {
            ahead: self._announced[ahead] if ahead in self._announced else self._announce(ahead)
            for ahead in coming
        }
        offsets = self._announced[step]
        return read_windows(self.split, offsets, self.order.context, self.pin_memory)

    def _announce(self, step: int) -> np.ndarray:
        """Where the windows of a step begin, which the system then begins to fetch."""
        offsets = self.order.windows(self.order.rows(step)[self.rows])
        self.split.announce(offsets, self.order.context + 1)
        return offsets

    def close(self) -> None:
        """Stop the thread and drop what it has read; may be called twice."""
        with self._changed:
            self._closed = True
            self._batches.clear()
            self._changed.notify_all()
        # A disk that hangs must not hang the end of the program.
        self._thread.join(timeout=10)
        atexit.unregister(self.close)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
