"""Where documents end in a window of token ids, and how long they are.

A document is its tokens up to and including the end-of-text token.  (modded-nanogpt and llm.c put
the token in front instead; read that way, it ends the document before, and a document begins with
its first word.)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from data.progress import progress
from data.shards import Split

CHUNK = 1 << 22  # ids at a time


def document_numbers(tokens: Tensor, eot: int) -> Tensor:
    """Which document of its row each token belongs to, int64 (B, T), from 0; tokens (B, T)."""
    ends = (tokens == eot).long()
    return ends.cumsum(1) - ends  # the end-of-text itself belongs to what it ends


# What `data.documents` may be: from (tokens, eot) to the `documents` of the model's forward pass.
DOCUMENTS: dict[str, Callable[[Tensor, int], Tensor | None]] = {
    "ignored": lambda tokens, eot: None,
    "masked": document_numbers,
}


def document_lengths(split: Split, max_tokens: int | None = None) -> np.ndarray:
    """Tokens per document, with their end-of-text, int64; what follows the last one is left out.

    Reads the split once, or its first `max_tokens`.
    """
    total = len(split) if max_tokens is None else min(len(split), max_tokens)
    ends = [np.array([-1])]
    with progress("reading the lengths of documents", total, unit=" ids") as bar:
        for start in range(0, total, CHUNK):
            ids = split.read(start, min(CHUNK, total - start))
            ends.append(start + np.flatnonzero(ids == split.eot))
            bar.written(ids.size)
    return np.diff(np.concatenate(ends)).astype(np.int64)
