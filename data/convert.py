"""Token files in other programs' form: `python -m data.convert SRC out=DIR format=llmc`.

    own       manifest.json, train_00000.bin, ...: this project's
    nanogpt   train.bin, val.bin: raw ids
    llmc      NAME_train_000001.bin, ..., NAME_val_000000.bin: llm.c's, modded-nanogpt's and the
              MARS code's (which expects name=fineweb)

SRC is any folder that `data=shards` reads.  Only ids are copied, in stretches, every one of them
held against the vocabulary: a conversion to `own` is also the way to check a foreign folder whole.
The new folder appears when it is complete.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.foreign import describe
from data.formats import OWN, token_dtype
from data.progress import progress
from data.shards import MANIFEST, SPLITS, Manifest, ShardWriter, SplitInfo, load_split
from data.tokenizer import get_tokenizer

CHUNK = 1 << 22  # ids at a time
WHOLE = 2**62  # ids in a file: all of them


@dataclass(frozen=True)
class Target:
    """A form to write: `name` of file by (data set, split, number), `most` ids in one file."""

    format: str
    name: Callable[[str, str, int], str]
    most: int


TARGETS = {
    "own": Target(OWN, lambda name, split, number: f"{split}_{number:05d}.bin", WHOLE),
    "nanogpt": Target("nanogpt", lambda name, split, number: f"{split}.bin", WHOLE),
    "llmc": Target(  # its first shard is the validation split, so training begins with number 1
        "llmc",
        lambda name, split, number: f"{name}_{split}_{number + (split == 'train'):06d}.bin",
        2**31 - 1,
    ),
}


def convert(
    source: Path,
    out: Path,
    format: str,
    *,
    tokenizer: str = "gpt2",
    name: str | None = None,
    shard_tokens: int = 100_000_000,
) -> Path:
    """Write the data set in `source` to the new folder `out`; returns it.

    `tokenizer` is that of a source without a manifest, `name` what llm.c's files begin with (None:
    the data set's own).  Raises ValueError for unfit arguments or files, OSError where writing
    fails or the disk is too small.
    """
    if format not in TARGETS:
        raise ValueError(f"format={format}: expected one of {', '.join(TARGETS)}")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens={shard_tokens}: expected at least 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={out} exists and is not empty: choose another folder")
    ours = (source / MANIFEST).exists()
    manifest = Manifest.load(source) if ours else describe(source, get_tokenizer(tokenizer))
    prefix = name or manifest.name
    if Path(prefix).name != prefix:
        raise ValueError(f"name={prefix}: expected a plain name, which file names begin with")
    _check_space(out, manifest)
    work = out.with_name(f"{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    work.mkdir(parents=True)
    try:
        splits = _copy(source, manifest, work, TARGETS[format], prefix, shard_tokens)
        if format == "own":
            _describe(manifest, splits, source.name).save(work)
        if out.exists():
            out.rmdir()  # empty, as was seen above
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def _copy(
    source: Path, manifest: Manifest, work: Path, target: Target, prefix: str, shard_tokens: int
) -> dict[str, SplitInfo]:
    splits = {name: load_split(source, name, manifest) for name in SPLITS}
    found = {}
    total = sum(map(len, splits.values()))
    per_file = target.most if target.format == "nanogpt" else min(shard_tokens, target.most)
    with progress("converting", total, unit=" ids") as bar:
        for name, split in splits.items():
            documents = 0
            with ShardWriter(
                work,
                name,
                split.vocab_size,
                per_file,
                format=target.format,
                name=lambda number, split=name: target.name(prefix, split, number),  # type: ignore[misc]
            ) as writer:
                for start in range(0, len(split), CHUNK):
                    ids = split.read(start, min(CHUNK, len(split) - start))
                    documents += int(np.count_nonzero(ids == split.eot))
                    writer.append(ids)
                    bar.written(ids.size)
            known = documents if split.documents is None else split.documents
            found[name] = SplitInfo(len(split), split.bytes, known, tuple(writer.shards))
    return found


def _describe(manifest: Manifest, splits: dict[str, SplitInfo], source: str) -> Manifest:
    return Manifest(
        name=manifest.name,
        tokenizer=manifest.tokenizer,
        tokenizer_fingerprint=manifest.tokenizer_fingerprint,
        vocab_size=manifest.vocab_size,
        eot=manifest.eot,
        settings={"converted_from": source, **manifest.settings},
        splits=splits,
    )


def _check_space(out: Path, manifest: Manifest) -> None:
    width = token_dtype(manifest.vocab_size).itemsize
    needed = width * sum(split.tokens for split in manifest.splits.values())
    home = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(home).free
    if needed > free:
        raise OSError(
            f"out={out}: {needed / 1e9:,.1f} GB needed, {free / 1e9:,.1f} GB free: choose a folder "
            "with room"
        )


# --- command line -------------------------------------------------------------------------------


def main() -> int:
    """Convert and print, as the last line, a JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m data.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="a folder of token files")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help=f"out=DIR, format={'|'.join(TARGETS)}, and where need be tokenizer=gpt2 (of a source "
        "without a manifest), name=fineweb (of llm.c's files), shard_tokens=100000000",
    )
    options = parser.parse_intermixed_args()
    try:
        given = dict(word.split("=", 1) if "=" in word else (word, "") for word in options.settings)
        unknown = sorted(given.keys() - {"out", "format", "tokenizer", "name", "shard_tokens"})
        if unknown or not given.get("out") or not given.get("format"):
            what = f"unknown setting {unknown[0]}" if unknown else "out=DIR and format= are needed"
            raise ValueError(
                f"{what}: python -m data.convert SRC out=DIR format={'|'.join(TARGETS)}"
            )
        folder = convert(
            options.source.expanduser(),
            Path(given["out"]).expanduser(),
            given["format"],
            tokenizer=given.get("tokenizer", "gpt2"),
            name=given.get("name"),
            shard_tokens=int(given.get("shard_tokens", 100_000_000)),
        )
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    files = sorted(folder.iterdir())
    size = sum(path.stat().st_size for path in files)
    print(json.dumps({"dir": str(folder), "files": len(files), "bytes": size}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
