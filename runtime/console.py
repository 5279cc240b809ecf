"""What a person sees while a run is going, and log.txt, which keeps the words of it.

On a terminal the progress is one bar that redraws itself; in a log file (Slurm, nohup, CI) the
same figures come as plain lines. `say` goes to both, and to log.txt. The figures do not go to
log.txt: metrics.jsonl has them, exactly.

A terminal can go away (`| head`, a closed ssh session) while training must go on. The first
failed write switches the printing off; log.txt continues.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# How a figure is shown; any other name as "name value".
FORMATS = {
    "loss": "loss {:.4f}",
    "val_loss": "val {:.4f}",
    "lr": "lr {:.1e}",
    "grad_norm": "norm {:.2f}",
    "tokens_per_s": "{:.1e} tok/s",
    "mfu": "mfu {:.1%}",
}


class Console:
    """Prints a run's lines and progress. `quiet` prints nothing (ranks other than 0).

    `log_path` receives every `say` (appended: a resumed run continues its log); None: no log.
    `say` may be called from any thread.
    """

    def __init__(self, log_path: Path | None, total_steps: int, quiet: bool = False) -> None:
        self.total_steps = total_steps
        self._log = log_path.open("a", encoding="utf-8") if log_path else None
        self._quiet = quiet or sys.stdout is None
        self._lock = threading.RLock()
        self._bar: Any = None
        self._first: tuple[int, float] | None = None  # step and time of the first progress

    def say(self, text: str) -> None:
        """Print `text` as a line of its own (above the bar) and append it to the log."""
        with self._lock:
            if self._log:
                self._log.write(text + "\n")
                self._log.flush()
            self._print(text)

    def progress(self, step: int, **figures: float) -> None:
        """Show that `step` updates are completed, with figures such as loss, lr, tokens_per_s.

        The time left is extrapolated from the steps since the first call, so that neither the
        steps before a resumption nor the first step, with its compilation, distort it.
        """
        if self._quiet:
            return
        words = [_show(name, value) for name, value in figures.items()]
        with self._lock:
            if self._on_terminal():
                self._try(lambda: self._update_bar(step, "  ".join(words)))
                return
            left = self._seconds_left(step)
            if left is not None:
                words.append(f"left {_clock(left)}")
            self._print("  ".join([f"step {step}/{self.total_steps}", *words]))

    def close(self) -> None:
        """Leave the bar as it stands and close the log. A second call does nothing."""
        with self._lock:
            if self._bar is not None:
                self._try(self._bar.close)
                self._bar = None
            if self._log:
                self._log.close()
                self._log = None

    def _on_terminal(self) -> bool:
        return not sys.stdout.closed and sys.stdout.isatty()

    def _seconds_left(self, step: int) -> float | None:
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        first_step, first_time = self._first
        if step <= first_step:
            return None
        return (now - first_time) / (step - first_step) * max(self.total_steps - step, 0)

    def _update_bar(self, step: int, text: str) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(
                desc=text,
                total=self.total_steps,
                initial=step,
                file=sys.stdout,
                dynamic_ncols=True,
                smoothing=0,  # time left from the mean speed: evaluations count too
                bar_format="{n_fmt}/{total_fmt} |{bar}| {desc}  left {remaining}",
            )
        self._bar.set_description_str(text, refresh=False)
        self._bar.update(step - self._bar.n)  # redraws ten times a second at most

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._try(lambda: self._bar.write(text, file=sys.stdout))
        else:
            self._try(lambda: print(text, flush=True))

    def _try(self, show: Callable[[], object]) -> None:
        """Show something, unless nobody can see it any more."""
        if self._quiet:
            return
        try:
            show()
        except (OSError, ValueError):  # broken pipe, vanished terminal; closed stdout
            self._quiet = True
            _discard_stdout()


def _discard_stdout() -> None:
    """Send stdout to nowhere, or Python's flush at exit would fail again and spoil the status."""
    try:
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())
        os.close(descriptor)
    except (OSError, ValueError):
        pass  # no descriptor behind it: nothing to flush either


def _show(name: str, value: float) -> str:
    return FORMATS[name].format(value) if name in FORMATS else f"{name} {value:.4g}"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
