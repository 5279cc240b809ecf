"""What is to be prepared and where: a data set's settings, its folder, and the right to make it.

Everything that decides the ids (the files and their state, the tokenizer, the split, the format)
is written down as `settings`, and their hash names the folder.  So a finished data set is found
again and never made twice, and a changed setting leads to another folder instead of into a mixture.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from data import DataConfig
from data.formats import VERSION
from data.shards import MANIFEST, SPLITS, Manifest, open_split
from data.sources import open_source
from data.texts import Source
from data.tokenizer import Tokenizer, get_tokenizer
from data.work import Recipe


@dataclass(frozen=True)
class Plan:
    """What is to be prepared, and where; known without network."""

    config: DataConfig
    tokenizer: Tokenizer
    source: Source
    settings: dict[str, Any]
    folder: Path
    work: Path

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.tokenizer, self.config.val_fraction, self.config.dedup)


def plan(config: DataConfig) -> Plan:
    """Raises ValueError for unusable settings, FileNotFoundError for missing files."""
    if not 0 < config.val_fraction < 1:
        raise ValueError(f"data.val_fraction={config.val_fraction}: expected between 0 and 1")
    for name in ("shard_tokens", "processes", "threads"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"data.{name}={value}: expected at least 1")
    tokenizer = get_tokenizer(config.tokenizer)
    source = open_source(config)
    settings = {
        "format": VERSION,
        "source": config.source,
        **source.settings,
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "val_fraction": config.val_fraction,
        "shard_tokens": config.shard_tokens,
        **({"dedup": True} if config.dedup else {}),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    label = config.name if config.source == "huggingface" else config.source
    names = (str(label), config.subset, Path(tokenizer.name).stem, digest[:12])
    default = Path(config.cache) / "-".join(Path(name).name for name in names if name)
    folder = Path(config.dir or default).expanduser().absolute()
    work = folder.with_name(f"{folder.name}.{digest[:8]}.work")
    return Plan(config, tokenizer, source, settings, folder, work)


def is_finished(this: Plan) -> bool:
    """Whether the folder holds this very data set; ValueError where it holds anything else."""
    folder = this.folder
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"data.dir={folder} holds files but no data set: choose another data.dir")
    old = {key: value for key, value in Manifest.load(folder).settings.items() if key != "found"}
    changed = [key for key in {**old, **this.settings} if old.get(key) != this.settings.get(key)]
    if changed:
        then_now = ", ".join(
            f"{key} was {_brief(old.get(key))}, is {_brief(this.settings.get(key))}"
            for key in changed
        )
        raise ValueError(
            f"data.dir={folder} holds a data set of other settings ({then_now}): choose another "
            "data.dir, or delete that folder to prepare it anew"
        )
    for split in SPLITS:
        open_split(folder, split)  # every file is there and whole
    return True


def _brief(setting: Any) -> str:
    """A setting, short enough for a line; of a list of files, their names and sizes."""
    if isinstance(setting, list):
        setting = [f"{Path(file['path']).name} ({file['bytes']} bytes)" for file in setting]
    text = str(setting)
    return text if len(text) <= 100 else f"{text[:97]}..."


def existing(folder: Path) -> Path:
    return next(parent for parent in folder.parents if parent.exists())


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn a failed write (full disk, no permission) into a line that says where and how much."""
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, FileNotFoundError):
            raise  # a message of this project, or nothing to do with room
        free = shutil.disk_usage(existing(folder)).free
        raise OSError(
            f"cannot write {folder} ({error.strerror}), {free / 1e6:,.0f} MB free: make room and "
            "the same command goes on, or set data.dir or paths.cache to a folder with room that "
            "you may write to"
        ) from error


@contextmanager
def locked(this: Plan, shared: bool = False) -> Iterator[bool]:
    """Hold the only right to prepare the folder, or, if `shared`, one of the rights of workers.
    False where the system has no locks to give.

    The operating system gives a lock back when its holder dies, however it dies.
    """
    folder = this.folder
    path = folder.parent / f".{folder.name}.lock"
    with explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115
    with file:
        yield _acquire(file, folder, shared)
        if not shared:
            # Only after success: from here on everybody finds a finished data set, lock or no lock.
            path.unlink(missing_ok=True)


def _acquire(file: TextIO, folder: Path, shared: bool) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process that prepares {folder}", file=sys.stderr)
        fcntl.flock(file, kind)
    except OSError:  # a network file system without locks
        return False
    return True
