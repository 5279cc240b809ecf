"""How files of token ids look: this project's, nanoGPT's, llm.c's and numpy's.

    gpt2-bench   1024 bytes: "gpt2shrd", version, bytes per id, number of ids, zeros; then the ids
    llmc         1024 bytes of int32: magic, version, number of ids; then the ids.  Magic 20240520
                 (version 1) has 16-bit ids, as GPT-2's, and 20240801 (version 7) 32-bit ids; also
                 modded-nanogpt's and the MARS code's FineWeb-Edu files
    npy          numpy's own, one dimension of uint16 or uint32 (build-nanogpt's FineWeb-Edu files)
    nanogpt      nothing but ids (nanoGPT's train.bin and val.bin)

Ids are little-endian and unsigned, 16 or 32 bits wide.  A header says where they begin and how many
they are, the file's size must agree, and only then is the file mapped.  A raw file says nothing:
its ids are as wide as the tokenizer's vocabulary needs, and what can be told from the content of a
file that holds something else is told by `data.foreign`.
"""

from __future__ import annotations

import io
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"gpt2shrd"
VERSION = 1
HEADER_BYTES = 1024
HEADER = struct.Struct("<8sIIQ")  # magic, version, dtype code (its bytes per id), number of ids
DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
LLMC = {2: (20240520, 1), 4: (20240801, 7)}  # bytes per id -> magic, version
LLMC_HEADER = struct.Struct("<iii")  # magic, version, number of ids
NPY_MAGIC = b"\x93NUMPY"
WILLNEED = getattr(mmap, "MADV_WILLNEED", None)  # Windows has none


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest dtype that holds the ids of a vocabulary."""
    return DTYPES[2 if vocab_size <= 2**16 else 4]


@dataclass(frozen=True)
class Layout:
    """Where the ids of a file lie: `tokens` of them, from byte `offset` to the end."""

    offset: int
    tokens: int
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Format:
    """One kind of file.  `layout` raises ValueError with a reason that follows the file's name."""

    recognizes: Callable[[bytes], bool]  # by the first bytes of a file
    layout: Callable[[bytes, int, np.dtype[Any]], Layout]  # of (first bytes, size, dtype if raw)
    header: Callable[[int, np.dtype[Any]], bytes] | None = (
        None  # of (tokens, dtype); None: unwritten
    )


# --- this project's -----------------------------------------------------------------------------


def _own_layout(head: bytes, size: int, dtype: np.dtype[Any]) -> Layout:
    if not head.startswith(MAGIC):
        raise ValueError(f"is not a token file of this project: no {MAGIC!r} at its start")
    if len(head) < HEADER_BYTES:
        raise ValueError(f"is truncated: {len(head)} bytes, the header alone has {HEADER_BYTES}")
    _, version, code, tokens = HEADER.unpack_from(head)
    if version != VERSION or code not in DTYPES:
        raise ValueError(
            f"has version {version} with {code} bytes per id, expected version {VERSION} with one "
            f"of {sorted(DTYPES)}"
        )
    if any(head[HEADER.size :]):
        raise ValueError(f"is damaged: its header is not zero from byte {HEADER.size} on")
    return Layout(HEADER_BYTES, tokens, DTYPES[code])


def _own_header(tokens: int, dtype: np.dtype[Any]) -> bytes:
    return HEADER.pack(MAGIC, VERSION, dtype.itemsize, tokens).ljust(HEADER_BYTES, b"\0")


# --- llm.c's --------------------------------------------------------------------------------------


def _is_llmc(head: bytes) -> bool:
    return len(head) >= 4 and int.from_bytes(head[:4], "little") in {m for m, _ in LLMC.values()}


def _llmc_layout(head: bytes, size: int, dtype: np.dtype[Any]) -> Layout:
    if len(head) < HEADER_BYTES:
        raise ValueError(f"is truncated: {len(head)} bytes, llm.c's header has {HEADER_BYTES}")
    magic, version, tokens = LLMC_HEADER.unpack_from(head)
    sizes = [size for size, known in LLMC.items() if known == (magic, version)]
    if not sizes:
        raise ValueError(
            f"has magic {magic} and version {version}, expected llm.c's "
            + " or ".join(f"{magic} with version {version}" for magic, version in LLMC.values())
        )
    return Layout(HEADER_BYTES, tokens, DTYPES[sizes[0]])


def _llmc_header(tokens: int, dtype: np.dtype[Any]) -> bytes:
    magic, version = LLMC[dtype.itemsize]
    return LLMC_HEADER.pack(magic, version, tokens).ljust(HEADER_BYTES, b"\0")


# --- numpy's --------------------------------------------------------------------------------------


def _npy_layout(head: bytes, size: int, dtype: np.dtype[Any]) -> Layout:
    stream, expected = io.BytesIO(head), "expected version 1.0, one dimension, uint16 or uint32"
    try:
        version = np.lib.format.read_magic(stream)
        shape, _, kind = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:  # it parses Python, which fails in a dozen ways
        raise ValueError(f"has no readable numpy header, {expected}") from error
    if version != (1, 0) or len(shape) != 1 or kind not in DTYPES.values():
        raise ValueError(f"is a numpy file, version {version}, of {kind} {shape}, {expected}")
    return Layout(stream.tell(), shape[0], kind)


# --- registry -------------------------------------------------------------------------------------


OWN = "gpt2-bench"
FORMATS = {
    OWN: Format(lambda head: head.startswith(MAGIC), _own_layout, _own_header),
    "llmc": Format(_is_llmc, _llmc_layout, _llmc_header),
    "npy": Format(lambda head: head.startswith(NPY_MAGIC), _npy_layout),
    "nanogpt": Format(
        lambda head: True,
        lambda head, size, dtype: Layout(0, size // dtype.itemsize, dtype),
        lambda tokens, dtype: b"",
    ),
}


def recognize(path: Path) -> str:
    """The name of a file's format, by its first bytes; what has no header is nanoGPT's."""
    with open(path, "rb") as file:
        head = file.read(16)
    return next(name for name, form in FORMATS.items() if form.recognizes(head))


def read_layout(path: Path, format: str, dtype: np.dtype[Any]) -> Layout:
    """Where the ids of a file lie, from its header and its size, which must agree.

    `dtype` is believed only of a file without a header.  Raises ValueError with the file's name.
    """
    if format not in FORMATS:
        raise ValueError(f"{path}: format {format!r}, expected one of {', '.join(FORMATS)}")
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
        size = file.seek(0, io.SEEK_END)
    try:
        layout = FORMATS[format].layout(head, size, dtype)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    width = layout.dtype.itemsize
    expected = layout.offset + layout.tokens * width
    if layout.tokens < 1:
        raise ValueError(f"{path} holds {layout.tokens} ids")
    if size != expected:
        raise ValueError(
            f"{path} is truncated or damaged: {size} bytes, expected {expected} for "
            f"{layout.tokens} ids of {width} bytes"
        )
    return layout


class Ids:
    """The ids of one file, memory-mapped: `ids`, shape (tokens,), read-only."""

    def __init__(self, path: Path, layout: Layout) -> None:
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # The file may have become shorter since its header was read.
        if len(self._map) != layout.offset + layout.tokens * layout.dtype.itemsize:
            raise ValueError(f"{path} changed while it was opened: {len(self._map)} bytes")
        self.layout = layout
        self.ids = np.frombuffer(self._map, layout.dtype, layout.tokens, layout.offset)

    def announce(self, start: int, n: int) -> None:
        """Have the system fetch ids [start, start + n) from the disk, without waiting for them."""
        width, offset = self.layout.dtype.itemsize, self.layout.offset
        first = (offset + start * width) // mmap.PAGESIZE * mmap.PAGESIZE
        end = min(offset + (start + n) * width, len(self._map))
        if WILLNEED is not None:
            self._map.madvise(WILLNEED, first, end - first)
