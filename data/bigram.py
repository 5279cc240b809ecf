"""The floor a language model has to break through: how well do pairs of bytes alone predict?

A table of 257 x 257 counts, fitted in one pass, predicts the Python standard library, and
Shakespeare as well, with 3.6 bits per byte.  A transformer above this line has learned less
than which byte follows which; a run of a few minutes should already be below it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data.shards import Split

CHUNK = 1 << 22  # ids at a time: some 100 MB of temporaries, however long the split
MOST = 1 << 28  # ids counted: seconds of work, and for 66,049 pairs more than enough


def _pair_counts(split: Split) -> np.ndarray:
    """How often id j follows id i, shape (vocab, vocab); the first id follows an end of text."""

    def chunks() -> Iterator[np.ndarray]:
        previous = split.eot
        total = min(len(split), MOST)
        for start in range(0, total, CHUNK):
            ids = split.read(start, min(CHUNK, total - start))
            yield np.concatenate([[previous], ids[:-1]]) * split.vocab_size + ids
            previous = int(ids[-1])

    size = split.vocab_size
    counts = np.zeros(size * size, np.int64)
    for pairs in chunks():
        counts += np.bincount(pairs, minlength=size * size)
    return counts.reshape(size, size)


def bigram_bits_per_byte(train: Split, val: Split) -> float | None:
    """Bits per byte of `val` under the byte bigrams of `train`, or None unless ids are bytes.

    Add-one smoothing: p(j | i) = (count(i, j) + 1) / (count(i, .) + 257).  Counted as a language
    model's loss is: predicting the end of a document costs bits, but it is not a byte of text.
    """
    if train.tokenizer != "bytes" or val.tokenizer != "bytes":
        return None
    fitted = _pair_counts(train) + 1
    log_p = np.log2(fitted / fitted.sum(axis=1, keepdims=True))
    seen = _pair_counts(val)
    text_bytes = seen.sum() - seen[:, val.eot].sum()
    return float(-(seen * log_p).sum() / text_bytes)
