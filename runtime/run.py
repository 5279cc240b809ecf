"""The run directory: where a run lives, whether it goes on, and that nobody else writes there.

    runs/<date>_<name>/   config.yaml  parameters.txt  environment.json  metrics.jsonl  log.txt
                          loss.png  summary.json  checkpoints/step_<n>/

``train.resume=auto`` makes the same command continue what it began: an unfinished run of the same
name whose settings decide the same trajectory. A process holds a lock on its run, which the system
releases however it ends, so a second start of the command never takes over a run that is alive.
"""

from __future__ import annotations

import fcntl
import glob
import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from runtime.checkpoint import Checkpoints, is_whole
from runtime.config import Config, trajectory
from runtime.errors import ConfigError
from runtime.files import atomic_write_text, json_safe, write_json
from runtime.processes import Processes

CONFIG, TRAJECTORY, SUMMARY = "config.yaml", "trajectory.json", "summary.json"
LOCK = ".run.lock"
LOGS, ERRORS = "logs", "errors"  # of each process: what it prints, why it failed
BEFORE_THE_START = {
    LOCK,
    "log.txt",
    LOGS,
    ERRORS,
}  # all that a run has while its parts are being built


@dataclass
class Run:
    """A run directory that this process owns, or of many processes rank 0. ``start`` is the
    checkpoint to continue from (None: from the beginning); ``finished`` says that there is nothing
    left to do."""

    dir: Path
    lock: IO[str] | None  # None on other ranks
    checkpoints: Checkpoints
    start: Path | None
    continued: bool
    finished: bool
    notes: list[str]

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.dir / SUMMARY).read_text())
        return summary

    def close(self) -> None:
        """Give the lock back. A run that a mistake ended before it began leaves no folder."""
        if self.lock is None:
            return
        if {path.name for path in self.dir.iterdir()} <= BEFORE_THE_START:
            shutil.rmtree(self.dir, ignore_errors=True)  # other ranks may be writing to logs/
        self.lock.close()


def open_run(config: Config) -> Run:
    """Find or make the run directory that ``run.dir`` and ``train.resume`` ask for.

    Raises ConfigError if the directory holds another run, is in use by a living process, or if
    there is nothing to resume; OSError if it cannot be written.
    """
    resume, given = config.train.resume, config.run.dir
    source = None if resume in ("auto", "never") else Path(resume).expanduser()
    if source is not None and not source.is_dir():
        raise ConfigError(f"train.resume is {resume!r}: expected auto, never or an existing path")
    if source is not None and (source / TRAJECTORY).exists() and given is None:
        return _open(source, config, strict=False)  # a run: go on in place
    if source is not None:
        source = _fork_source(source)
    if given is not None:
        folder = Path(given).expanduser()
        if resume == "never" and (folder / TRAJECTORY).exists():
            raise ConfigError(
                f"run.dir={given} already holds a run: choose another run.dir, or "
                f"train.resume=auto to continue it"
            )
        return _open(folder, config, strict=source is None, fork=source)
    if resume == "auto":
        for folder in _unfinished(config):
            try:
                return _open(folder, config, strict=True)
            except InUse:
                continue
    return _open(_new_folder(config), config, strict=True, fork=source)


def open_for_all(config: Config, processes: Processes) -> Run:
    """The same run on every rank: rank 0 finds or makes it (`open_run`), and holds its lock. What
    the processes of an attempt before said when they failed is removed before any goes on."""
    opened: list[Run] = []

    def decide() -> Run:
        opened.append(open_run(config))
        for report in (opened[0].dir / ERRORS).glob("rank_*.json"):
            report.unlink()
        return replace(opened[0], lock=None)

    run = processes.decide(decide)
    return opened[0] if opened else run


class InUse(ConfigError):
    """Another living process holds the run."""


def _open(folder: Path, config: Config, strict: bool, fork: Path | None = None) -> Run:
    notes: list[str] = []
    _make(folder)
    # A folder with a lock is one of ours, even if the start that made it was killed at once.
    if any(folder.iterdir()) and not (folder / LOCK).exists():
        raise ConfigError(f"run.dir={folder} is not empty and holds no run: choose another folder")
    lock = open(folder / LOCK, "w")  # noqa: SIM115 - held as long as the run lives
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise InUse(
            f"{folder} is in use by another process: wait for it or choose another run.dir"
        ) from None
    for leftover in folder.glob(".*.tmp"):  # of a write that a kill cut off (runtime/files.py)
        leftover.unlink(missing_ok=True)
    continued = (folder / TRAJECTORY).exists()
    if continued:
        differences = _differences(json.loads((folder / TRAJECTORY).read_text()), config)
        if differences and strict:
            lock.close()
            raise ConfigError(
                f"{folder} holds a run with other settings: {'; '.join(differences[:3])}. Choose "
                f"another run.dir, or train.resume={folder} to continue it with the new settings"
            )
        notes += [f"continuing with changed settings: {line}" for line in differences]
    checkpoints = Checkpoints(folder / "checkpoints", config.train.keep_checkpoints)
    notes += [
        f"{path} is not whole: set aside, continuing without it" for path in checkpoints.clean()
    ]
    steps = checkpoints.steps()
    start = checkpoints.path(steps[-1]) if steps else fork
    return Run(folder, lock, checkpoints, start, continued, _is_finished(folder, config), notes)


def _fork_source(path: Path) -> Path:
    """The checkpoint that a new run starts from: itself, or the latest whole one of a run."""
    found = Checkpoints(path / "checkpoints", 1)
    for candidate in (path, *map(found.path, reversed(found.steps()))):
        if is_whole(candidate):
            return candidate
    raise ConfigError(
        f"train.resume={path} is neither a run with a checkpoint nor a checkpoint: expected such "
        f"as runs/<date>_<name> or runs/<date>_<name>/checkpoints/step_<n>"
    )


def recorded(folder: Path, key: str) -> Any:
    """The value that the run in this folder has for train.<key>; None where there is no run."""
    if not (folder / CONFIG).is_file():
        return None
    saved: Any = OmegaConf.load(folder / CONFIG)
    return saved.train.get(key)


def save_config(run: Run, config: Config) -> None:
    """Write the resolved configuration, once, before the first step."""
    atomic_write_text(run.dir / CONFIG, OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
    write_json(run.dir / TRAJECTORY, trajectory(config))


def _unfinished(config: Config) -> list[Path]:
    """Unfinished runs of the same name and settings, latest first."""
    found = []
    name = f"????-??-??_??????_{glob.escape(config.run.name)}"  # not those that merely end so
    for folder in sorted(_runs(config).glob(name), reverse=True):
        file = folder / TRAJECTORY
        if not file.exists() or _is_finished(folder, config):
            continue
        if not _differences(json.loads(file.read_text()), config):
            found.append(folder)
    return found


def _is_finished(folder: Path, config: Config) -> bool:
    """Whether the run in ``folder`` has made all the steps that are now asked for."""
    file = folder / SUMMARY
    return file.exists() and json.loads(file.read_text())["step"] >= config.train.steps


def _differences(saved: dict[str, Any], config: Config) -> list[str]:
    now = json.loads(json.dumps(json_safe(trajectory(config))))
    return [
        f"{key} was {saved.get(key)}, now {now.get(key)}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    ]


def _new_folder(config: Config) -> Path:
    """runs/<date>_<name>; two starts within a second get different folders."""
    while True:
        stamp = time.strftime("%Y-%m-%d_%H%M%S")
        folder = _runs(config) / f"{stamp}_{config.run.name}"
        _make(folder.parent)
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            time.sleep(0.5)


def _runs(config: Config) -> Path:
    return Path(config.paths.runs).expanduser()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write the run directory {folder} ({error.strerror}): choose another run.dir "
            f"or paths.runs"
        ) from None
