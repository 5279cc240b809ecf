"""Compressed files, read as a stream of the bytes that they hold."""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from data.texts import TextError


def compression(path: Path) -> str:
    return path.suffix if path.suffix in COMPRESSIONS else ""


@contextmanager
def broken_file(path: Path) -> Iterator[None]:
    """Whatever shows that a file is not what its name says, as one line."""
    try:
        yield
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise TextError(f"{path} is not a whole {path.suffix} file ({error})") from error


@contextmanager
def readable(path: Path) -> Iterator[BinaryIO]:
    """The uncompressed bytes of a file, in order."""
    with open(path, "rb") as stored:
        yield decompressed(path, stored)


class _Zstd(io.RawIOBase):
    """The text of a .zst file, of one or several frames; EOFError where the last one is cut off.

    (zstandard's own reader takes a cut-off file for a short one.)
    """

    def __init__(self, path: Path, stored: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise TextError(
                f"{path}: reading .zst needs a package: pip install zstandard"
            ) from error
        self._new = partial(zstandard.ZstdDecompressor().decompressobj)
        self._error: type[Exception] = zstandard.ZstdError
        self._stored, self._frame = stored, self._new()
        self._text, self._begun = b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            if self._frame.eof:
                block, self._frame, self._begun = self._frame.unused_data, self._new(), False
            else:
                block = b""
            block = block or self._stored.read(1 << 17)
            if not block:
                if self._begun:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._begun = True
            try:
                self._text = self._frame.decompress(block)
            except self._error as error:
                raise EOFError(str(error)) from error
        n = min(len(buffer), len(self._text))
        buffer[:n], self._text = self._text[:n], self._text[n:]
        return n


def decompressed(path: Path, stored: BinaryIO) -> BinaryIO:
    return DECOMPRESSORS[compression(path)](path, stored)


DECOMPRESSORS: dict[str, Callable[[Path, BinaryIO], Any]] = {
    "": lambda path, stored: stored,
    ".gz": lambda path, stored: gzip.GzipFile(fileobj=stored),
    ".xz": lambda path, stored: lzma.LZMAFile(stored),  # noqa: SIM115
    ".zst": lambda path, stored: io.BufferedReader(_Zstd(path, stored), 1 << 17),
}
COMPRESSIONS = (".gz", ".xz", ".zst")
