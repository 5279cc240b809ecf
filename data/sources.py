"""Where text comes from: each source turns its settings into documents, stretch by stretch.

`stdlib` is the Python standard library of the interpreter that runs this: ten megabytes of real
source code that every machine already has, enough for a first curve without any download.
`text` is the user's own files (data/textfiles.py), `shakespeare` a small file that is downloaded,
and `huggingface` any data set of the hub (data/huggingface.py).

Which documents are kept for validation is decided by the hash of their text, where the source does
not say it: the choice depends neither on order nor on what else there is, and copies of one
document never land on both sides.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from data import DataConfig
from data.huggingface import open_huggingface
from data.textfiles import download, open_text
from data.texts import Document, Piece, Source, TextError, Texts


def open_source(config: DataConfig) -> Source:
    """The source that `data.source` names.

    Raises ValueError for an unknown name or unusable files, FileNotFoundError for missing ones.
    """
    if config.source not in SOURCES:
        near = get_close_matches(config.source, SOURCES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"data.source={config.source}: expected one of {', '.join(SOURCES)}; "
            f"did you mean {near}?"
        )
    if config.split_by not in SPLIT_RULES:
        raise ValueError(
            f"data.split_by={config.split_by}: expected one of {', '.join(SPLIT_RULES)}"
        )
    if config.split_by == "permutation" and config.source != "huggingface":
        raise ValueError(
            f"data.split_by=permutation needs data.source=huggingface, not {config.source}: read "
            "the files with data=huggingface 'data.files=[...]'"
        )
    return SOURCES[config.source](config)


SPLIT_RULES = ("hash", "permutation")


def split_of(digest: bytes, val_fraction: float) -> str:
    """Either "val", for about `val_fraction` of all texts, or "train"; always the same ones.

    `digest` is the SHA-256 of a text in UTF-8.
    """
    fraction = int.from_bytes(digest[:8], "big") / 2**64
    return "val" if fraction < val_fraction else "train"


def _stdlib(config: DataConfig) -> Source:
    """The .py files of the running interpreter's standard library, sorted by path."""
    if config.files:
        raise ValueError(
            f"data.files={config.files} is not read by data.source=stdlib: use data=text"
        )
    root = Path(sysconfig.get_paths()["stdlib"])
    sizes: dict[str, int] = {}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        for path in (Path(folder, name) for name in files if name.endswith(".py")):
            sizes[path.relative_to(root).as_posix()] = path.stat().st_size
    if not sizes:
        raise FileNotFoundError(f"data.source=stdlib: no .py files under {root}; use data=text")
    listing = sorted(sizes.items())

    def documents() -> Iterator[Document]:
        for name, _ in listing:
            try:
                yield Document(name, (root / name).read_bytes().decode("utf-8"))
            except UnicodeDecodeError:
                continue  # a few files are in other encodings, to exercise the parser

    settings = {
        "python": platform.python_version(),
        "files_sha256": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
    }
    corpus = Texts([Piece("stdlib", documents)], sum(sizes.values()))
    return Source(settings, lambda found: corpus)


# Installed packages differ from machine to machine; tests hold files broken on purpose.
SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"
}  # fmt: skip


SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
    "/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def _shakespeare(config: DataConfig) -> Source:
    """The file, from `data.files` or else downloaded into the cache; its content is checked."""
    settings = {"file_sha256": SHAKESPEARE_SHA256}

    def opened(found: dict[str, Any]) -> Texts:
        files, name = config.files, "tinyshakespeare.txt"
        if not files:
            files = [str(download(SHAKESPEARE, Path(config.cache), name))]
        source = open_text(replace(config, files=files))
        paths = [Path(file["path"]) for file in source.settings["files"]]
        digest = hashlib.sha256(paths[0].read_bytes()).hexdigest()
        if len(paths) != 1 or digest != SHAKESPEARE_SHA256:
            raise TextError(
                f"{files[0]} is not the Tiny Shakespeare of {SHAKESPEARE} (its SHA-256 differs): "
                "read other texts with data=text"
            )
        return source.open(found)

    return Source(settings, opened)


SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "stdlib": _stdlib,
    "text": open_text,
    "shakespeare": _shakespeare,
    "huggingface": open_huggingface,
}
