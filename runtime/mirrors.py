"""Dashboards that mirror metrics.jsonl: Weights & Biases and TensorBoard.

A mirror is a convenience and must never cost training anything. So each one lives on a thread of
its own (`BackgroundMirror`): the loop only puts a record into a queue, and an unreachable server,
a missing key or a full disk ends in one printed line. Only the end of the run waits for a mirror,
and then at most `CLOSE_TIMEOUT` seconds.

Since metrics.jsonl is the truth, a mirror that starts late or resumes reads there what it missed.

wandb: online, the steps already given to the server are remembered in `run_dir/wandb.json` and
not sent twice. Offline, every resumption records the whole run again into a new offline directory
under the same run id, because `wandb sync` starts each directory at line 0 of the server's
history: a directory with only the second half would overwrite the first half.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import queue
import threading
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from runtime.files import write_json
from runtime.metrics import FILE_NAME, Mirror, Record, read_metrics

WANDB_MODES = ("online", "offline", "disabled")
INIT_TIMEOUT = 10.0  # s, for the wandb server's first answer; then the run is recorded offline
FINISH_TIMEOUT = 8.0  # s, for wandb's last uploads
CLOSE_TIMEOUT = 20.0  # s, the longest that the end of a run waits for one mirror

Say = Callable[[str], None]


class BackgroundMirror:
    """Runs a mirror on its own thread, so that it can neither stop nor delay training.

    `open_mirror` is called on that thread. Whatever it, `write` or `close` raises is reported
    once through `say` (called from that thread), and the mirror is off from then on.
    """

    def __init__(self, name: str, open_mirror: Callable[[], Mirror], say: Say) -> None:
        self._name, self._open, self._say = name, open_mirror, say
        self._records: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._off = False
        # A daemon: a mirror that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name=f"mirror-{name}", daemon=True)
        self._thread.start()

    def write(self, record: Mapping[str, Any]) -> None:
        if not self._off:
            self._records.put(record)

    def close(self) -> None:
        self._records.put(None)
        self._thread.join(CLOSE_TIMEOUT)
        if self._thread.is_alive() and not self._off:
            self._off = True
            self._say(
                f"{self._name}: not finished after {CLOSE_TIMEOUT:.0f} s, left behind; "
                f"{FILE_NAME} is complete"
            )

    def _run(self) -> None:
        try:
            mirror = self._open()
            while (record := self._records.get()) is not None:
                mirror.write(record)
            mirror.close()
        except Exception as error:
            if not self._off:
                self._off = True
                self._say(
                    f"{self._name}: switched off ({_one_line(error)}); "
                    f"training goes on, {FILE_NAME} is complete"
                )


class WandbMirror:
    """One Weights & Biases run, `mode` "online" or "offline"; see the module's docstring.

    Online falls back to offline if the server does not answer within `INIT_TIMEOUT` seconds or no
    key is configured. Blocks while connecting: use it inside a `BackgroundMirror`.
    """

    def __init__(
        self,
        run_dir: Path,
        project: str,
        mode: str,
        config: Mapping[str, Any],
        resume_step: int | None,
        say: Say,
    ) -> None:
        self._book = run_dir / "wandb.json"
        self._id, self._sent = uuid.uuid4().hex[:8], -1
        if resume_step is not None and self._book.is_file():
            book = json.loads(self._book.read_text())
            self._id, self._sent = book["id"], book["step"]
        self._run, self._online = self._open(run_dir, project, mode, config, say)
        self._run.define_metric("*", step_metric="step")
        self._last = self._sent if self._online else -1
        self._save_book()
        for record in _past(run_dir, resume_step):
            self.write(record)

    def write(self, record: Mapping[str, Any]) -> None:
        if record["step"] <= self._last:
            return
        self._run.log(_finite(record))  # wandb counts its own steps; ours is the x axis
        self._last = record["step"]
        if self._online:
            self._sent = self._last
            self._save_book()

    def close(self) -> None:
        self._run.finish()  # bounded by FINISH_TIMEOUT

    def _open(
        self, run_dir: Path, project: str, mode: str, config: Mapping[str, Any], say: Say
    ) -> tuple[Any, bool]:
        """The wandb run, and whether it is online."""
        # Before the import, and by environment, because part of wandb reads it nowhere else.
        # Silent: no chatter between our lines, and no prompt for a key on the terminal. No error
        # reporting: wandb's telemetry would hold up the exit for 20 s behind a silent server.
        os.environ["WANDB_SILENT"] = "true"
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        def init(mode: Literal["online", "offline"]) -> Any:
            return wandb.init(
                mode=mode,
                project=project,
                id=self._id,
                resume="allow" if mode == "online" else None,
                name=run_dir.resolve().name,
                dir=run_dir,
                config=dict(config),
                settings=wandb.Settings(
                    init_timeout=INIT_TIMEOUT,
                    login_timeout=INIT_TIMEOUT,
                    finish_timeout=FINISH_TIMEOUT,
                    x_graphql_timeout_seconds=INIT_TIMEOUT,
                    console="off",
                    silent=True,
                ),
            )

        excuse = ""
        if mode == "online":
            try:
                run = init("online")
                say(f"wandb: {run.url}")
                return run, True
            except Exception as error:
                excuse = f"no connection ({_one_line(error)}), "
                wandb.teardown()  # else the run id counts as in use
        run = init("offline")
        say(f"wandb: {excuse}recording offline; upload with: wandb sync {Path(run.dir).parent}")
        return run, False

    def _save_book(self) -> None:
        write_json(self._book, {"id": self._id, "step": self._sent}, durable=False)


class TensorBoardMirror:
    """Event files in `run_dir/tensorboard`, one scalar per value; the x axis is the step.

    On resume TensorBoard is told to forget what lies after the resumed step.
    """

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # 2 s, mostly its own imports

        directory = run_dir / "tensorboard"
        known = directory.is_dir()
        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(directory), purge_step=purge_step)
        for record in [] if known else _past(run_dir, resume_step):
            self.write(record)

    def write(self, record: Mapping[str, Any]) -> None:
        values = _finite(record)
        step = values.pop("step")
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        self._writer.close()


def open_mirrors(
    run_dir: Path,
    wandb_mode: str,
    wandb_project: str,
    tensorboard: bool,
    config: Mapping[str, Any],
    resume_step: int | None,
    say: Say,
) -> list[Mirror]:
    """The mirrors that a run asked for, already at work in the background.

    `wandb_mode`: online, offline or disabled. `resume_step` as in `MetricsLog`. `say` prints a
    line and may be called from other threads. ValueError for an unknown mode, and for a dashboard
    whose package is not installed.
    """
    if wandb_mode not in WANDB_MODES:
        near = difflib.get_close_matches(str(wandb_mode), WANDB_MODES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(
            f"logging.wandb={wandb_mode}: expected one of {', '.join(WANDB_MODES)}{hint}"
        )
    wanted: dict[str, Callable[[], Mirror]] = {}
    if wandb_mode != "disabled":
        wanted["wandb"] = partial(
            WandbMirror, run_dir, wandb_project, wandb_mode, config, resume_step, say
        )
    if tensorboard:
        wanted["tensorboard"] = partial(TensorBoardMirror, run_dir, resume_step)
    for package in wanted:
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"logging.{package} needs the package {package}, which is not installed: "
                f"pip install {package}, or switch logging.{package} off"
            )
    return [BackgroundMirror(name, open_mirror, say) for name, open_mirror in wanted.items()]


def _past(run_dir: Path, resume_step: int | None) -> list[Record]:
    """What metrics.jsonl says about the steps before the resumption."""
    path = run_dir / FILE_NAME
    if resume_step is None or not path.is_file():
        return []
    return [record for record in read_metrics(path) if record["step"] <= resume_step]


def _finite(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if value is not None}


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
