"""Text to token files, once: `python -m data.prepare data=stdlib`.

Everything that decides the ids (the files and their state, the tokenizer, the split, the format)
is written down as `settings`, and their hash names the folder.  So a finished data set is found
again and never made twice, and a changed setting leads to another folder instead of into a mixture.

The work is done in a folder of its own, renamed when it is complete: the name of a data set either
does not exist or holds all of it.  Processes that want the same data set wait for the one that is
preparing it; where the file system has no locks, each prepares its own and the first one wins.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from data import DataConfig
from data.shards import (
    MANIFEST,
    SPLITS,
    VERSION,
    Manifest,
    ShardWriter,
    SplitInfo,
    open_split,
    token_dtype,
)
from data.sources import Source, open_source
from data.tokenizer import Tokenizer, get_tokenizer


def prepare(config: DataConfig) -> Path:
    """The folder of the data set that `config` describes, prepared first if it is not there yet.

    Shows a progress bar on a terminal.  Memory is that of one document, whatever the corpus.

    Raises ValueError for unusable settings or text, or where `config.dir` holds anything else;
    FileNotFoundError for missing files; OSError, with the space needed, where writing fails.
    """
    if not 0 < config.val_fraction < 1:
        raise ValueError(f"data.val_fraction={config.val_fraction}: expected between 0 and 1")
    if config.shard_tokens < 1:
        raise ValueError(f"data.shard_tokens={config.shard_tokens}: expected at least 1")
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
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    default = Path(config.cache) / f"{config.source}-{tokenizer.name}-{digest[:12]}"
    folder = Path(config.dir or default).expanduser().absolute()
    if _is_finished(folder, settings):
        return folder
    needed = _space_needed(source, tokenizer)
    with _lock(folder, needed) as alone:
        if _is_finished(folder, settings):  # by the process that was waited for
            return folder
        if alone:  # then what lies here was left by one that was killed
            for leftover in folder.parent.glob(f"{glob.escape(folder.name)}.*.tmp"):
                shutil.rmtree(leftover)
        work = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            _fill(work, source, tokenizer, settings, needed)
            _publish(work, folder, settings)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def split_of(text: bytes, val_fraction: float) -> str:
    """Either "val", for about `val_fraction` of all texts, or "train"; always the same ones."""
    fraction = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64
    return "val" if fraction < val_fraction else "train"


def _is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether `folder` holds this very data set; ValueError where it holds anything else."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"data.dir={folder} holds files but no data set: choose another data.dir")
    old = Manifest.load(folder).settings
    changed = [key for key in {**old, **settings} if old.get(key) != settings.get(key)]
    if changed:
        then_now = ", ".join(
            f"{key} was {_brief(old.get(key))}, is {_brief(settings.get(key))}" for key in changed
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


@contextmanager
def _progress(title: str, total: int | None) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal; elsewhere nothing, and tqdm need not be installed."""
    if not sys.stderr.isatty():
        yield lambda size: None
        return
    from tqdm import tqdm

    with tqdm(desc=title, total=total, unit="B", unit_scale=True) as bar:
        yield bar.update


def _fill(
    work: Path, source: Source, tokenizer: Tokenizer, settings: dict[str, Any], needed: str
) -> None:
    """Write a whole data set into the new folder `work`."""
    eot = np.array([tokenizer.eot])
    text_bytes, documents = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    with ExitStack() as stack:
        with _explained(work, needed):
            work.mkdir(parents=True)
        writers = {
            split: stack.enter_context(
                ShardWriter(work, split, tokenizer.vocab_size, settings["shard_tokens"])
            )
            for split in SPLITS
        }
        title = f"preparing {settings['source']}"
        advance = stack.enter_context(_progress(title, source.text_bytes))
        for document in source.documents():
            raw = document.text.encode("utf-8")
            if not raw:
                continue
            split = document.split or split_of(raw, settings["val_fraction"])
            ids = tokenizer.encode(document.text)
            with _explained(work, needed):
                writers[split].append(np.append(ids, eot) if document.ends else ids)
            text_bytes[split] += len(raw)
            documents[split] += document.ends
            advance(len(raw))
        for split, count in text_bytes.items():
            if count == 0:
                raise ValueError(
                    f"the {split} split is empty: the source has {sum(documents.values())} "
                    f"documents, of which data.val_fraction={settings['val_fraction']} are for "
                    "validation; give more text or change data.val_fraction"
                )
        with _explained(work, needed):
            for writer in writers.values():
                writer.finish()
            Manifest(
                name=settings["source"],
                tokenizer=tokenizer.name,
                tokenizer_fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                eot=tokenizer.eot,
                settings=settings,
                splits={
                    split: SplitInfo(
                        tokens=sum(shard.tokens for shard in writer.shards),
                        bytes=text_bytes[split],
                        documents=documents[split],
                        shards=tuple(writer.shards),
                    )
                    for split, writer in writers.items()
                },
            ).save(work)


def _publish(work: Path, folder: Path, settings: dict[str, Any]) -> None:
    """Give the finished folder its name, unless another process was faster."""
    try:
        os.rename(work, folder)
    except OSError:
        if not _is_finished(folder, settings):
            raise


def _space_needed(source: Source, tokenizer: Tokenizer) -> str:
    """For a message: a byte-level tokenizer makes no more ids than the text has bytes."""
    itemsize = token_dtype(tokenizer.vocab_size).itemsize
    if source.text_bytes is None:
        return f"{itemsize} bytes per token of the uncompressed text"
    return f"up to {itemsize * source.text_bytes / 1e6:,.0f} MB"


@contextmanager
def _explained(folder: Path, needed: str) -> Iterator[None]:
    """Turn a failed write (full disk, no permission) into a line that says where and how much."""
    try:
        yield
    except OSError as error:
        home = next(parent for parent in folder.parents if parent.exists())
        raise OSError(
            f"cannot write {folder} ({error.strerror}): {needed} needed, "
            f"{shutil.disk_usage(home).free / 1e6:,.0f} MB free; set data.dir or paths.cache to "
            "a folder with room that you may write to"
        ) from error


@contextmanager
def _lock(folder: Path, needed: str) -> Iterator[bool]:
    """Hold the only right to prepare `folder`.  False where the system has no locks to give.

    The operating system gives a lock back when its holder dies, however it dies.
    """
    path = folder.parent / f".{folder.name}.lock"
    with _explained(folder, needed):
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115
    with file:
        yield _acquire(file, folder)
        # Only after success: from here on everybody finds a finished data set, lock or no lock.
        path.unlink(missing_ok=True)


def _acquire(file: TextIO, folder: Path) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process that prepares {folder}", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a network file system without locks
        return False
    return True


# --- command line -----------------------------------------------------------------------------


def _compose(overrides: list[str]) -> DataConfig:
    """The `data` group of configs/train.yaml under hydra overrides, with its types checked."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    configs = Path(__file__).resolve().parent.parent / "configs"
    with initialize_config_dir(str(configs), version_base=None):
        config = compose("train", overrides)
    values = OmegaConf.to_container(config.data, resolve=True)
    typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), values))
    assert isinstance(typed, DataConfig)
    return typed


def _table(manifest: Manifest) -> str:
    lines = [f"{'split':<6} {'documents':>12} {'text bytes':>16} {'tokens':>16} {'files':>6}"]
    for name, split in manifest.splits.items():
        lines.append(
            f"{name:<6} {split.documents:>12,} {split.bytes:>16,} {split.tokens:>16,} "
            f"{len(split.shards):>6}"
        )
    return "\n".join(lines)


def main() -> int:
    """Prepare, print a table and, as the last line, a JSON object."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    parser = argparse.ArgumentParser(prog="python -m data.prepare", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="e.g. data=text data.files=[book.txt]")
    try:
        folder = prepare(_compose(parser.parse_args().overrides))
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        # hydra's messages have several lines, of which the last tell of its search path.
        line = " ".join(str(error).partition("Config search path")[0].split())
        print(f"error: {line}", file=sys.stderr)
        return 1
    manifest = Manifest.load(folder)
    tokens = {name: split.tokens for name, split in manifest.splits.items()}
    print(_table(manifest))
    print(
        json.dumps(
            {"dir": str(folder), "train_tokens": tokens["train"], "val_tokens": tokens["val"]}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
