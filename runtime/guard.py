"""A job of many processes that fails says which one failed, where, and why; once.

When one process fails, the others fail a moment later, in whatever collective they wait in, and
print as much. A job that hangs ends with a timeout on a process that did nothing wrong. So each
process writes what happened to it into the run's folder, errors/rank_<r>.json, and before it prints
anything looks there for a better reason than its own. Once one of them has ended, so has the job: a
process that does not move any more is then ended by its guard, and shows where it was.
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
from runtime.processes import DecidedElsewhere

PATIENCE = 1.0  # seconds in which the report of the process that failed first arrives
WAITS = (  # files in whose functions the main thread waits for other processes (DDP's in backward)
    "torch/distributed/",
    "torch/autograd/graph.py",
    "runtime/processes.py",
    "optim/transport.py",
)
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
    reports where it stands and ends. ``pause`` is for what may take as long as it wants, while none
    of the others fails. Whatever fails ends in exit code 1; ``mistakes`` are the user's, which rank
    0 lets through to be told in one line. With one process nothing is done.
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
        self._place = (-1, "start", time.time())  # step, phase, since when
        self._expected = time.monotonic() + timeout  # when the next beat is late
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._watching, name="guard", daemon=True)

    def beat(self, step: int, phase: str) -> None:
        self._place = (step, phase, time.time())
        self._expected = time.monotonic() + self.timeout

    def pause(self, step: int, phase: str) -> None:
        """Until the next beat nothing is expected."""
        self._place, self._expected = (step, phase, time.time()), float("inf")

    def __enter__(self) -> Guard:
        if self.size > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
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
        if isinstance(error, DecidedElsewhere):  # which has been said
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
                self._tell_of_hang()
                time.sleep(PATIENCE if self.rank else 0.0)  # the first to go ends the others
            else:
                self._tell_of_error(cause)
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
            if time.monotonic() > self._expected:
                self._end()
            elif self._reports():
                place = self._place
                # an error may be one that all meet, each in its time, and tell in one line
                patience = PATIENCE if self._first("error") is None else 10 * PATIENCE
                if not self._over.wait(patience) and place is self._place:
                    self._end()

    def _end(self) -> None:
        """Say where this process is, or why it must go, and end it: its main thread will not."""
        try:
            kind = "consequence" if self._first("error") else "hang"
            self._report(kind, all_stacks(), _waits())
            time.sleep(2 * PATIENCE if self.rank else PATIENCE)  # the first to go ends the others
            error = self._first("error")
            if error is None:
                self._tell_of_hang()
            elif self.rank == 0:  # the one that failed has said so where it is
                self._tell_of_error(error)
        except Exception:
            self._tell(traceback.format_exc())
        finally:
            os._exit(1)

    def _tell_of_error(self, error: dict[str, Any]) -> None:
        reason = f"rank {error['rank']} failed: {_last_line(error['text'])}"
        self._tell(f"rank {self.rank} on {socket.gethostname()} ended because {reason}")

    def _tell_of_hang(self) -> None:
        """Rank 0 does for all, if it can: where every rank was, those that wait for others last."""
        reports = self._reports()
        if self.rank and 0 in reports:
            return
        keys = ("waits", "step", "since")
        order = sorted(reports, key=lambda rank: tuple(reports[rank][key] for key in keys))
        silent = sorted(set(range(self.size)) - reports.keys())
        lines = [
            f"no progress (parallel.timeout={self.timeout:g}); the rank that is furthest behind "
            f"comes first, those that wait for others last"
        ]
        if silent:
            lines.append(f"ranks {silent} have reported nothing: they are dead or stopped")
        for rank in order:
            r = reports[rank]
            since = time.strftime("%H:%M:%S", time.localtime(r["since"]))
            place = f"step {r['step']}, {r['phase']} since {since}"
            lines.append(f"rank {rank} on {r['host']}: {place}\n{r['text']}")
        self._tell("\n".join(lines))

    def _cause(self) -> dict[str, Any] | None:
        """The report of the rank that failed or hung first, waited for a moment."""
        end = time.monotonic() + 2 * (PATIENCE + self._interval)  # what a hanging one takes
        while (first := self._first("error", "hang")) is None and time.monotonic() < end:
            time.sleep(0.05)
        return first

    def _first(self, *kinds: str) -> dict[str, Any] | None:
        """The earliest report of these kinds."""
        found = [report for report in self._reports().values() if report["kind"] in kinds]
        return min(found, key=lambda report: report["time"], default=None)

    def _report(self, kind: str, text: str, waits: bool = True) -> None:
        step, phase, since = self._place
        report = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "kind": kind,  # error | consequence (of another's) | hang
            "time": time.time(),
            "step": step,
            "phase": phase,
            "since": since,
            "waits": waits,  # for another rank, as far as the stack shows
            "text": text,
        }
        write_json(self._report_file(self.rank), report, durable=False)

    def _reports(self) -> dict[int, dict[str, Any]]:
        """By rank. Those of an attempt before are gone (`open_for_all`): not told by their time,
        for which the clocks of all machines would have to agree."""
        found = {}
        for file in self.folder.glob("rank_*.json"):  # one look where there is none
            try:
                report = json.loads(file.read_text())
            except (OSError, ValueError):
                continue
            found[report["rank"]] = report
        return found

    def _report_file(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.json"

    def _tell(self, text: str) -> None:
        print(text, file=self.terminal, flush=True)


def _last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2]


def _waits() -> bool:
    """Whether the main thread is inside a call that other processes must make, too."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_code.co_filename.endswith("torch/_ops.py"):
        frame = frame.f_back  # an operator, by which torch.distributed may wait
    return frame is not None and any(part in frame.f_code.co_filename for part in WAITS)


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
