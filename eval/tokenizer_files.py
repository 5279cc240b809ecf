"""Our tokenizers as the files that transformers, vLLM and the hub read.

Both are byte-level: a token is a string of bytes, and the files write each byte as one printable
character (GPT-2's table: printable Latin-1 stands for itself, the others follow from U+0100).
`gpt2` is vocab.json, merges.txt and tokenizer.json with the contents of OpenAI's files, made of
tiktoken's table of ranks. `bytes` is tokenizer.json alone: the 256 bytes and no merges. Both have
<|endoftext|>, which these files recognize in a text, where ours read it as ordinary characters. A
tokenizer that came as a tokenizer.json goes as one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from data.tokenizer import Bytes, FromFile, Gpt2, Tokenizer, gpt2_encoding

EOT = "<|endoftext|>"
Table = tuple[dict[str, int], list[tuple[str, str]]]  # token -> id, merges in their order


def write_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write `tokenizer` for `AutoTokenizer.from_pretrained(folder)`; `context` is the longest text
    in tokens that the model takes."""
    fast = _FAST[type(tokenizer)](tokenizer)
    fast.save(str(folder / "tokenizer.json"))
    of_gpt2 = isinstance(tokenizer, Gpt2)
    if of_gpt2:
        vocab, merges = _gpt2_table()
        _write_json(folder / "vocab.json", {**vocab, EOT: tokenizer.eot}, indent=None)
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        # GPT2Tokenizer would split any text at GPT-2's own pattern.
        "tokenizer_class": "GPT2Tokenizer" if of_gpt2 else "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": fast.id_to_token(tokenizer.eot) for role in ("bos", "eos")},
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _fast(table: Table, eot: int) -> Any:
    """A byte-level `tokenizers.Tokenizer` with the ids of the table and `eot`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    vocab, merges = table
    fast = Tokenizer(models.BPE(vocab={**vocab, EOT: eot}, merges=merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(merges))
    fast.post_processor = processors.ByteLevel(trim_offsets=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(EOT, special=True, normalized=False)])
    return fast


def _write_json(path: Path, values: Any, indent: int | None = 2) -> None:
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


@cache
def _gpt2_table() -> Table:
    encoding = gpt2_encoding()
    tokens = [encoding.decode_single_token_bytes(rank) for rank in range(encoding.eot_token)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = [_parts(token, ranks) for token in tokens if len(token) > 1]
    vocab = {_spell(token): rank for token, rank in ranks.items()}
    return vocab, [(_spell(left), _spell(right)) for left, right in merges]


def _parts(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge made this one: what is left of its bytes when all merges learned
    before it have been made."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [left + right for left, right in pairwise(parts)]
        first = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
        parts[first : first + 2] = [pairs[first]]
    left, right = parts
    return left, right


def _letters() -> list[str]:
    """GPT-2's character for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


_LETTERS: list[str] = _letters()


def _spell(token: bytes) -> str:
    return "".join(_LETTERS[byte] for byte in token)


_FAST: dict[type[Any], Callable[[Any], Any]] = {
    Bytes: lambda own: _fast(({letter: i for i, letter in enumerate(_LETTERS)}, []), own.eot),
    Gpt2: lambda own: _fast(_gpt2_table(), own.eot),
    FromFile: lambda own: own.backend,
}
