"""Token files that other programs wrote, read where they lie: a folder without our manifest.

    nanoGPT                      train.bin  val.bin
    llm.c, modded-nanogpt, MARS  fineweb_train_000001.bin ...  fineweb_val_000000.bin
    build-nanogpt                edufineweb_train_000001.npy ...  edufineweb_val_000000.npy

The file's name tells its split, its first bytes its format.  None of these files names its
tokenizer, so the user does (`data.tokenizer`), and the ids are held against it: all of them in a
folder of up to `LOOK_AT` ids, evenly spread stretches of a larger one, and every id once more when
it is read.  What can be told from a raw file's content is refused: text, a damaged header, ids of
another width, nanoGPT's character-level sets.

Nothing says how many bytes of text the ids stand for, so there are no bits per byte.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path

import numpy as np

from data.formats import HEADER_BYTES, Ids, Layout, read_layout, recognize, token_dtype
from data.shards import SPLITS, Manifest, Shard, SplitInfo
from data.tokenizer import Tokenizer

ENDINGS = (".bin", ".npy")
RAW = "nanogpt"
UNUSED = "test"
SPLIT_NAMES = {
    "train": "train", "val": "val", "valid": "val", "validation": "val", "test": UNUSED
}  # fmt: skip
LOOK_AT = 1 << 26  # ids; a fraction of a second's reading
STRETCH = 1 << 12  # ids looked at in one place of a folder larger than that
STRETCHES = 512  # places in all, but at least two per file


def describe(folder: Path, tokenizer: Tokenizer) -> Manifest:
    """The manifest that `folder`'s maker did not write; `sha256` is of the ids looked at alone.

    Raises FileNotFoundError where a split or a file of a numbered series is missing, and
    ValueError, with the file's name, for what cannot be ids of `tokenizer`.
    """
    files = _find(folder)
    dtype = token_dtype(tokenizer.vocab_size)
    formats = _formats([path for split in SPLITS for path in files[split]])
    found: list[tuple[str, Path, str, Layout]] = []
    for split in SPLITS:
        for path in files[split]:
            layout = read_layout(path, formats[path], dtype)
            found.append((split, path, formats[path], layout))
    total = sum(layout.tokens for *_, layout in found)
    shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    for split, path, name, layout in found:
        if name == RAW:
            _check_raw(path, tokenizer)
        places = _places(layout.tokens, total, len(found))
        digest = _look(path, Ids(path, layout), places, tokenizer)
        shards[split].append(Shard(path.name, layout.tokens, layout.dtype.name, digest, name))
    return Manifest(
        name=folder.name,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eot=tokenizer.eot,
        settings={"foreign": str(folder)},
        splits={
            split: SplitInfo(sum(shard.tokens for shard in some), None, None, tuple(some))
            for split, some in shards.items()
        },
    )


def _find(folder: Path) -> dict[str, list[Path]]:
    """The token files of each split, a numbered series in the order of its numbers."""
    if not folder.is_dir():
        raise FileNotFoundError(f"data.dir={folder} not found: expected a folder of token files")
    files: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for path in sorted(folder.iterdir(), key=_natural):
        if path.suffix not in ENDINGS:
            continue
        words = re.split(r"[^a-z]+", path.stem.lower())
        splits = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
        if splits == {UNUSED}:
            continue
        if len(splits) != 1:
            raise ValueError(
                f"{path}: its name tells no split; expected names such as train.bin, val.bin, "
                "fineweb_train_000001.bin; move other files out of data.dir"
            )
        files[splits.pop()].append(path)
    for split, paths in files.items():
        if not paths:
            raise FileNotFoundError(
                f"{folder} holds no {split} file: expected a prepared folder, or files such as "
                f"{split}.bin, fineweb_{split}_000001.bin (.bin or .npy)"
            )
        _check_series(paths)
    return files


def _formats(paths: list[Path]) -> dict[Path, str]:
    """The format of each file, one for all of them; a file that stands out has lost its header."""
    formats = {path: recognize(path) for path in paths}
    known = Counter(name for name in formats.values() if name != RAW)
    common = known.most_common(1)[0][0] if known else RAW
    for path, name in formats.items():
        expected = "npy" if path.suffix == ".npy" else common
        if name != expected:
            raise ValueError(
                f"{path} has not the header of {expected} files, which others beside it or its "
                "name promise: it is damaged, or two data sets lie in one folder"
            )
    return formats


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts x_2 before x_10."""
    return [(int(word or 0), text) for text, word in re.findall(r"(\D*)(\d*)", path.name)]


def _check_series(paths: list[Path]) -> None:
    """Numbers without a gap: a file that is missing was not downloaded."""
    series: dict[str, dict[int, Path]] = {}
    for path in paths:
        if match := re.fullmatch(r"(.*?)(\d+)", path.stem):
            series.setdefault(match[1], {})[int(match[2])] = path
    for name, found in series.items():
        missing = sorted(set(range(min(found), max(found))) - set(found))
        if missing:
            last = found[max(found)]
            number = str(missing[0]).zfill(len(last.stem) - len(name))
            raise FileNotFoundError(
                f"{last.parent / (name + number + last.suffix)} not found, one of {len(missing)} "
                f"missing before {last.name}: download them, or move what follows away"
            )


def _check_raw(path: Path, tokenizer: Tokenizer) -> None:
    """Refuse what a file without a header can be seen to be instead of ids of `tokenizer`."""
    if (path.parent / "meta.pkl").exists():
        raise ValueError(
            f"{path} stands beside a meta.pkl: nanoGPT's character-level ids, which no tokenizer "
            "here reads; prepare the text itself with data=text data.tokenizer=bytes"
        )
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    if any(head) and bytes(HEADER_BYTES // 2) in head:
        raise ValueError(f"{path} begins with a damaged header, not with ids")
    text = head[: len(head) // 2 * 2]
    if 0 not in text and _is_text(text):
        raise ValueError(f"{path} holds text, not token ids: read it with data=text data.files=")
    ids = np.frombuffer(text, "<u2")
    odd, even = ids[1::2], ids[::2]
    narrow = token_dtype(tokenizer.vocab_size).itemsize == 2
    if narrow and np.count_nonzero(even) > even.size / 2 > 2 and not odd.any():
        raise ValueError(
            f"{path} holds 32-bit ids, expected the 16-bit ids of data.tokenizer={tokenizer.name}: "
            "name the tokenizer that it was made with"
        )


def _is_text(raw: bytes) -> bool:
    try:
        return raw.decode("utf-8", "strict").replace("\n", " ").replace("\t", " ").isprintable()
    except UnicodeDecodeError as error:
        return error.start >= len(raw) - 3 and raw[: error.start].isascii()


def _places(tokens: int, total: int, files: int) -> list[tuple[int, int]]:
    """Which stretches (start, stop) of a file are looked at: its ends are always among them."""
    if total <= LOOK_AT:
        return [(start, min(start + (1 << 22), tokens)) for start in range(0, tokens, 1 << 22)]
    count = max(2, STRETCHES // files)
    starts = np.linspace(0, max(0, tokens - STRETCH), count).astype(np.int64).tolist()
    return [(start, min(start + STRETCH, tokens)) for start in starts]


def _look(path: Path, ids: Ids, places: list[tuple[int, int]], tokenizer: Tokenizer) -> str:
    """Check the ids at `places` against the vocabulary; returns a digest of them."""
    digest = hashlib.sha256(str(ids.layout.tokens).encode())
    for start, stop in places:
        ids.announce(start, stop - start)
    for start, stop in places:
        part = ids.ids[start:stop]
        if part.max() >= tokenizer.vocab_size:
            raise ValueError(
                f"{path}: id {part.max()} at position {start + int(part.argmax())} is outside the "
                f"vocabulary of data.tokenizer={tokenizer.name}, {tokenizer.vocab_size} ids: it "
                "is damaged, no token file, or made with another tokenizer"
            )
        digest.update(part.tobytes())
    return f"of-the-ids-looked-at:{digest.hexdigest()}"
