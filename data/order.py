"""Which tokens belong to which step.

The global batch of step s is a function of (seed, s) alone.  Nothing is remembered between steps,
so a resumed run needs no loader state; nothing depends on the number of processes or on the
micro-batch, so 1, 2 and 8 GPUs see the same batch and differ only in which rows of it they hold.

An order names the start offsets of windows of context + 1 tokens: inputs are the first `context`
of a window, targets the last `context`.  Consecutive blocks therefore start `context` apart and
share one token, which is a target in the one and an input in the other.

The permutation behind `shuffled` is never stored: a Feistel network turns the position within the
epoch into the block to read, in memory proportional to the batch, for any size of corpus.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np

ROUNDS = 16  # below 12, the 120 orders of five blocks are measurably not equally likely
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every input bit reaches every bit.

    Arrays of uint64, on which numpy wraps around in silence, which is what is wanted here.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(position: np.ndarray, n: int, seed: int, epoch: np.ndarray) -> np.ndarray:
    """Where `position` goes under the permutation of range(n) that (seed, epoch) selects.

    Args:
        position: int64, shape (k,), each in [0, n).
        epoch: int64, shape (k,): each entry may belong to another epoch.

    The network splits the smallest 2^b >= n into two halves of bits and in turn replaces each by
    its xor with a keyed hash of the other.  Every such step can be undone, so the whole is a
    bijection of [0, 2^b).  A result of n or more is sent through again until it lands inside
    ("cycle walking", Black and Rogaway 2002), which leaves a bijection of [0, n); since
    2^b < 2n, fewer than two passes are needed on average.
    """
    bits = (n - 1).bit_length()
    low_bits = np.uint64((bits + 1) // 2)
    low_mask = np.uint64((1 << ((bits + 1) // 2)) - 1)
    high_mask = np.uint64((1 << (bits // 2)) - 1)
    seeds = np.full(position.shape, seed % 2**64, np.uint64)
    key = _mix(_mix(seeds + GOLDEN) ^ epoch.astype(np.uint64))

    def once(x: np.ndarray, key: np.ndarray) -> np.ndarray:
        high, low = x >> low_bits, x & low_mask
        for _ in range(ROUNDS):
            key = key + GOLDEN
            high = high ^ (_mix(key ^ low) & high_mask)
            key = key + GOLDEN
            low = low ^ (_mix(key ^ high) & low_mask)
        return (high << low_bits) | low

    out = once(position.astype(np.uint64), key)
    while (outside := out >= n).any():
        out[outside] = once(out[outside], key[outside])
    return out.astype(np.int64)


@dataclass(frozen=True)
class Order:
    """What every order knows; a subclass says which windows step s reads.

    Args:
        tokens: length of the split.
        context: tokens a model sees at once (T); a window has one more.
        global_batch: windows per step, over all processes.
        seed: any integer.
        repeat: whether a run may go on past the last block, into the next epoch.

    Raises ValueError where the split is shorter than one window.
    """

    tokens: int
    context: int
    global_batch: int
    seed: int
    repeat: bool = True

    def __post_init__(self) -> None:
        if self.tokens < self.context + 1:
            raise ValueError(
                f"the split has {self.tokens} tokens, one window of context={self.context} needs "
                f"{self.context + 1}: give more text or lower the context"
            )

    @property
    def n_blocks(self) -> int:
        """Blocks per epoch; up to `context` tokens at the end of the split belong to none."""
        return (self.tokens - 1) // self.context

    def rows(self, step: int) -> np.ndarray:
        """The numbers of a step's rows, counted from the run's first, int64, (global_batch,)."""
        return step * self.global_batch + np.arange(self.global_batch, dtype=np.int64)

    def offsets(self, step: int) -> np.ndarray:
        """Start offsets of the windows of a step, int64, shape (global_batch,), row by row."""
        return self.windows(self.rows(step))

    def windows(self, rows: np.ndarray) -> np.ndarray:
        """Start offsets of the windows of any rows, by their numbers; int64, shape (k,)."""
        raise NotImplementedError

    def check(self, steps: int) -> None:
        """Raises ValueError where `repeat=False` and `steps` steps need more than one epoch."""
        self.check_rows(steps * self.global_batch, f"train.steps={steps}", "the split")

    def check_rows(self, needed: int, what: str, of: str) -> None:
        """`check` for a number of rows, which `what` needs of what the message calls `of`."""
        if not self.repeat and needed > self.n_blocks:
            raise ValueError(
                f"{what} needs {needed} blocks of {self.context} tokens, {of} has {self.n_blocks}: "
                "lower train.steps or set data.repeat=true"
            )


class Shuffled(Order):
    """Every block exactly once per epoch, each epoch in another order.

    A batch that straddles the end of an epoch takes its remaining rows from the next.
    """

    def windows(self, rows: np.ndarray) -> np.ndarray:
        epoch, position = np.divmod(rows, self.n_blocks)
        return permute(position, self.n_blocks, self.seed, epoch) * self.context


class Sequential(Order):
    """The blocks as they lie in the split, again and again."""

    def windows(self, rows: np.ndarray) -> np.ndarray:
        return rows % self.n_blocks * self.context


class RandomCrops(Order):
    """Windows anywhere in the split, with replacement, as nanoGPT and the MARS code draw them.

    There are no epochs, so `repeat` means nothing here.  Only the raw bits of Philox are used:
    numpy guarantees those for all time, but not the streams of its distributions.
    """

    def windows(self, rows: np.ndarray) -> np.ndarray:
        steps, place = np.divmod(rows, self.global_batch)
        bits = np.empty(rows.shape, np.uint64)
        for step in np.unique(steps):
            key = np.array([self.seed % 2**64, step], np.uint64)
            here = steps == step
            bits[here] = np.random.Philox(key=key).random_raw(self.global_batch)[place[here]]
        # The remainder favors small offsets by less than tokens / 2^64: nothing.
        return (bits % np.uint64(self.tokens - self.context)).astype(np.int64)

    def check_rows(self, needed: int, what: str, of: str) -> None:
        """Any number of rows will do."""


SAMPLING: dict[str, type[Order]] = {
    "shuffled": Shuffled,
    "random_crops": RandomCrops,
    "sequential": Sequential,
}


def create_order(
    sampling: str, *, tokens: int, context: int, global_batch: int, seed: int, repeat: bool = True
) -> Order:
    """The order that `data.sampling` names; ValueError for an unknown name."""
    if sampling not in SAMPLING:
        near = get_close_matches(sampling, SAMPLING, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"data.sampling={sampling}: expected one of {', '.join(SAMPLING)}; did you mean {near}?"
        )
    return SAMPLING[sampling](tokens, context, global_batch, seed, repeat)


def validation_offsets(tokens: int, context: int, max_tokens: int | None = None) -> np.ndarray:
    """Start offsets of the fixed validation windows, int64, ascending.

    Non-overlapping windows spread evenly over a split of `tokens` tokens, with at most
    `max_tokens` targets in all (None: every block of the split).  No target occurs twice, and the
    same arguments always give the same windows, so validation losses can be compared.
    """
    n_blocks = (tokens - 1) // context
    if n_blocks < 1:
        raise ValueError(
            f"the validation split has {tokens} tokens, one window of context={context} needs "
            f"{context + 1}: raise data.val_fraction or give more text"
        )
    count = n_blocks if max_tokens is None else min(n_blocks, max_tokens // context)
    if count < 1:
        raise ValueError(
            f"a validation set of at most {max_tokens} tokens holds no window of context={context}"
        )
    return np.arange(count, dtype=np.int64) * n_blocks // count * context
