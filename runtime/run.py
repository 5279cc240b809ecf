"""The run directory: where a run lives, whether it goes on, and that nobody else writes there.

    runs/<date>_<name>/   config.yaml  parameters.txt  environment.json  metrics.jsonl  log.txt
                          loss.png  summary.json  checkpoints/step_<n>/

``train.resume=auto`` makes the same command continue what it began: an unfinished run of the same
name whose settings decide the same trajectory. A process holds a lock on its run, which the system
releases however it ends, so a second start of the command never takes over a run that is alive.
"""

from __future__ import annotations

import fcntl
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from runtime.checkpoint import Checkpoints
from runtime.config import Config, ConfigError, trajectory
from runtime.files import atomic_write_text, write_json

CONFIG, TRAJECTORY, SUMMARY = "config.yaml", "trajectory.json", "summary.json"


@dataclass
class Run:
    """A run directory that this process owns. ``start`` is the checkpoint to continue from (None:
    from the beginning); ``finished`` says that there is nothing left to do."""

    dir: Path
    lock: IO[str]
    checkpoints: Checkpoints
    start: Path | None
    continued: bool
    notes: list[str]

    @property
    def finished(self) -> bool:
        return self.continued and (self.dir / SUMMARY).exists() and self.summary()["finished"]

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.dir / SUMMARY).read_text())
        return summary

    def close(self) -> None:
        self.lock.close()


def open_run(config: Config) -> Run:
    """Find or make the run directory that ``run.dir`` and ``train.resume`` ask for.

    Raises ConfigError if the directory holds another run, is in use by a living process, or if
    there is nothing to resume; OSError if it cannot be written.
    """
    resume, given = config.train.resume, config.run.dir
    source = None if resume in ("auto", "never") else Path(resume)
    if source is not None and not source.is_dir():
        raise ConfigError(f"train.resume is {resume!r}: expected auto, never or an existing path")
    if source is not None and (source / CONFIG).exists() and given is None:
        return _open(source, config, strict=False)  # a run: go on in place
    if given is not None:
        folder = Path(given)
        if resume == "never" and (folder / CONFIG).exists():
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


class InUse(ConfigError):
    """Another living process holds the run."""


def _open(folder: Path, config: Config, strict: bool, fork: Path | None = None) -> Run:
    notes: list[str] = []
    _make(folder)
    lock = open(folder / ".lock", "w")  # noqa: SIM115 - held as long as the run lives
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise InUse(
            f"{folder} is in use by another process: wait for it or choose another run.dir"
        ) from None
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
    elif any(p.name != ".lock" for p in folder.iterdir()):
        lock.close()
        raise ConfigError(f"run.dir={folder} is not empty and holds no run: choose another folder")
    checkpoints = Checkpoints(folder / "checkpoints", config.train.keep_checkpoints)
    checkpoints.clean()
    steps = checkpoints.steps()
    start = checkpoints.path(steps[-1]) if steps else None
    if start is None and fork is not None and not continued:
        start = _fork_source(fork)
    return Run(folder, lock, checkpoints, start, continued, notes)


def _fork_source(path: Path) -> Path:
    """The checkpoint that a new run starts from: itself, or the latest of a run."""
    if path.name.startswith("step_"):
        return path
    found = Checkpoints(path / "checkpoints", 1)
    if not (steps := found.steps()):
        raise ConfigError(f"train.resume={path} holds no checkpoint")
    return found.path(steps[-1])


def save_config(run: Run, config: Config) -> None:
    """Write the resolved configuration, once, before the first step."""
    atomic_write_text(run.dir / CONFIG, OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
    write_json(run.dir / TRAJECTORY, trajectory(config))


def _unfinished(config: Config) -> list[Path]:
    """Unfinished runs of the same name and settings, latest first."""
    found = []
    for folder in sorted(Path(config.paths.runs).glob(f"*_{config.run.name}"), reverse=True):
        file, summary = folder / TRAJECTORY, folder / SUMMARY
        if not file.exists() or (summary.exists() and json.loads(summary.read_text())["finished"]):
            continue
        if not _differences(json.loads(file.read_text()), config):
            found.append(folder)
    return found


def _differences(saved: dict[str, Any], config: Config) -> list[str]:
    now = json.loads(json.dumps(trajectory(config)))
    return [
        f"{key} was {saved.get(key)}, now {now.get(key)}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    ]


def _new_folder(config: Config) -> Path:
    """runs/<date>_<name>; two starts within a second get different folders."""
    while True:
        stamp = time.strftime("%Y-%m-%d_%H%M%S")
        folder = Path(config.paths.runs) / f"{stamp}_{config.run.name}"
        _make(folder.parent)
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            time.sleep(0.5)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write the run directory {folder} ({error.strerror}): choose another run.dir "
            f"or paths.runs"
        ) from None
