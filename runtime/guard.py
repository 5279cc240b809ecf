"""A job of many processes that fails says which one failed, where, and why; once.

When one process fails, the others fail a moment later, in whatever collective they wait in, and
print as much. A job that hangs ends with a timeout on a process that did nothing wrong. So each
process writes what happened to it into the run's folder, errors/rank_<r>.json, and before it prints
anything looks there for a better reason than its own.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch.distributed as dist

from runtime.files import write_json

PATIENCE = 1.0  # seconds in which the report of the process that failed first arrives
CONSEQUENCES = (  # parts of messages that mean: another process is gone or late
    "connection",
    "timed out",
    "timeout",
    "monitoredbarrier",
    "peer",
    "nccl",
    "socket",
)


class Guard:
    """Around the work of one process; a context manager. ``folder``: the run's errors/.

    ``beat(step, phase)`` says that the process is alive. Without a beat for ``timeout`` seconds it
    reports where it stands and ends. ``pause`` is for what may take as long as it wants. Whatever
    fails ends in exit code 1; ``mistakes`` are the user's, which rank 0 lets through to be told in
    one line. With one process nothing is done.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        folder: Path,
        timeout: float,
        terminal: IO[str] | None = None,
        mistakes: tuple[type[BaseException], ...] = (),
    ) -> None:
        self.rank, self.size, self.folder, self.timeout = rank, size, folder, timeout
        self.terminal, self.mistakes = terminal or sys.stderr, mistakes
        self._interval = min(timeout / 10, 1.0)  # between two looks at the time of the last beat
        self._began = time.time()
        self._step, self._phase, self._beaten = -1, "start", time.monotonic()
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._watching, name="guard", daemon=True)

    def beat(self, step: int, phase: str) -> None:
        self._step, self._phase, self._beaten = step, phase, time.monotonic()

    def pause(self, step: int, phase: str) -> None:
        """Until the next beat nothing is expected."""
        self._step, self._phase, self._beaten = step, phase, float("inf")

    def __enter__(self) -> Guard:
        if self.size > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._report_file(self.rank).unlink(missing_ok=True)  # of an attempt before
            self._watch.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self.size == 1 or not isinstance(error, Exception):
            return
        where = f"rank {self.rank} on {socket.gethostname()}"
        text = "".join(traceback.format_exception(error))
        if is_consequence(error):
            self._report("consequence", text)
            cause = self._cause()
            if cause is None:
                self._tell(
                    f"{where} lost the others, none of which has said why (killed?):\n{text}"
                )
            elif cause["kind"] == "hang":
                self._tell(self._hang_report())
            else:
                reason = f"rank {cause['rank']} failed: {_last_line(cause['text'])}"
                self._tell(f"{where} ended because {reason}")
            raise SystemExit(1) from None
        self._report("error", text)
        from torch.distributed.elastic.multiprocessing.errors.error_handler import ErrorHandler

        ErrorHandler().record_exception(error)  # for torchrun's summary
        if self.rank == 0 and isinstance(error, self.mistakes):
            return
        if self.rank == 0 or not self._said_by_rank_0(text):
            self._tell(f"{where} failed:\n{text}")
        raise SystemExit(1) from None

    def _said_by_rank_0(self, text: str) -> bool:
        """Whether rank 0 fails in the same way, as all do where the configuration is wrong."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if (report := self._reports().get(0)) is not None:
                return _last_line(report["text"]) == _last_line(text)
            time.sleep(0.05)
        return False

    def _watching(self) -> None:
        while not self._over.wait(self._interval):
            silent = time.monotonic() - self._beaten
            if silent > self.timeout:
                self._report("hang", all_stacks())
                time.sleep(PATIENCE)
                if self.rank == 0 or not self._reports().get(0):
                    self._tell(self._hang_report())
                os._exit(1)  # the main thread will not listen

    def _hang_report(self) -> str:
        """Where every rank was, the one that is furthest behind first."""
        reports = self._reports()
        order = sorted(reports, key=lambda r: (reports[r]["step"], reports[r]["time_beaten"]))
        silent = sorted(set(range(self.size)) - reports.keys())
        lines = [
            f"no progress for {self.timeout:g} s; the rank that is furthest behind comes first"
        ]
        if silent:
            lines.append(f"ranks {silent} have reported nothing: they are dead or stopped")
        for rank in order:
            r = reports[rank]
            lines.append(f"rank {rank} on {r['host']}: step {r['step']}, {r['phase']}\n{r['text']}")
        return "\n".join(lines)

    def _cause(self) -> dict[str, Any] | None:
        """The report of the rank that failed or hung first, waited for a moment."""
        end = time.monotonic() + PATIENCE + self._interval
        while True:
            others = [r for r in self._reports().values() if r["kind"] != "consequence"]
            if others or time.monotonic() > end:
                return min(others, key=lambda report: report["time"], default=None)
            time.sleep(0.05)

    def _report(self, kind: str, text: str) -> None:
        report = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "kind": kind,  # error | consequence (of another's) | hang
            "time": time.time(),
            "step": self._step,
            "phase": self._phase,
            "time_beaten": self._beaten,
            "text": text,
        }
        write_json(self._report_file(self.rank), report, durable=False)

    def _reports(self) -> dict[int, dict[str, Any]]:
        """Reports of this attempt, by rank."""
        found = {}
        for rank in range(self.size):
            try:
                report = json.loads(self._report_file(rank).read_text())
            except (OSError, ValueError):
                continue
            if report["time"] >= self._began:
                found[rank] = report
        return found

    def _report_file(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.json"

    def _tell(self, text: str) -> None:
        print(text, file=self.terminal, flush=True)


def _last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2]


def is_consequence(error: BaseException) -> bool:
    """Whether an error says that another process is gone or late."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in CONSEQUENCES)


def all_stacks() -> str:
    """The Python stack of every thread of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
