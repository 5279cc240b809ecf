"""Whether the files of a data set still hold what was written: every checksum computed anew."""

from __future__ import annotations

import hashlib
from pathlib import Path

from data.progress import progress
from data.shards import SPLITS, open_split

BLOCK = 1 << 22  # bytes at a time


def verify(folder: Path) -> int:
    """The number of files, all of them as their manifest says.

    Raises FileNotFoundError or ValueError that names the files which are missing, of another size
    or of other content.
    """
    splits = [open_split(folder, name) for name in SPLITS]
    total = sum(
        file.shard.tokens * file.layout.dtype.itemsize for split in splits for file in split.files
    )
    damaged = []
    with progress("verifying", total) as bar:
        for file in (file for split in splits for file in split.files):
            digest = hashlib.sha256()
            with open(file.path, "rb") as stored:
                stored.seek(file.layout.offset)
                while block := stored.read(BLOCK):
                    digest.update(block)
                    bar.written(len(block))
            if digest.hexdigest() != file.shard.sha256:
                damaged.append(file.shard.file)
    if damaged:
        raise ValueError(
            f"{folder}: {', '.join(damaged)} changed after being written (its SHA-256 is not the "
            "manifest's): delete the folder and prepare the data again"
        )
    return sum(len(split.shards) for split in splits)
