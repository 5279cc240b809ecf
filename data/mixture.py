"""Several sources in fixed proportions: which of them a row comes from, and which of its windows.

Rows are dealt out like a line of people at two doors: of the first r rows, floor(r p + phase) go
through the first door, so that at every moment each source has had its share, to within a row or
two.  The rest of the line is divided the same way among the rest of the sources.  The count is a
formula, so a row knows its source and its place in that source's own line without looking back, and
each source is walked through by its own order: `shuffled` visits every block of a source once
before any for the second time, however small the source's share.

A source's order is keyed by the seed and the source's name: what else is mixed in, and in which
proportion, does not change which of its blocks come first.

The mixture itself is a Split, its sources' files one after another, and an Order whose windows
never reach from one source into the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite

import numpy as np

from data.order import Order, create_order, validation_offsets
from data.shards import Split

DENOMINATOR = 1 << 24  # shares are fractions with at most this denominator: to a few 1e-15 exact


def shares(weights: Mapping[str, float]) -> list[Fraction]:
    """The share of each source in what the sources before it leave; the last one's is 1.

    Raises ValueError for a weight that is not a positive number.
    """
    for name, weight in weights.items():
        if not (isfinite(weight) and weight > 0):
            raise ValueError(
                f"data.mixture.{name}.weight={weight}: expected a positive number; leave a source "
                "out by removing it"
            )
    exact = [Fraction(str(weight)) for weight in weights.values()]
    parts = [
        (weight / sum(exact[i:])).limit_denominator(DENOMINATOR) for i, weight in enumerate(exact)
    ]
    if min(parts) == 0 or 1 in parts[:-1]:
        raise ValueError(
            f"data.mixture: the weights {dict(weights)} lie too far apart: expected shares of more "
            f"than 1 in {DENOMINATOR}"
        )
    return parts


def _key(seed: int, name: str) -> int:
    """63 bits that depend on seed and name in no simple way."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Deal:
    """Which source each row belongs to, a function of (weights, seed, row) alone."""

    weights: Mapping[str, float]
    seed: int

    def _doors(self) -> list[tuple[int, int, int]]:
        """(numerator, denominator, phase) of each source's share of what is left."""
        doors = []
        for name, share in zip(self.weights, shares(self.weights), strict=True):
            part, whole = share.as_integer_ratio()
            doors.append((part, whole, _key(self.seed, f"phase of {name}") % whole))
        return doors

    def __call__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, its how-manieth row) of each row, int64, shape (k,); exact up to row 2^39."""
        source = np.full(rows.shape, -1, np.int64)
        line = rows.astype(np.int64)  # places in the line of those not yet dealt with
        for index, (part, whole, phase) in enumerate(self._doors()):
            before = (line * part + phase) // whole
            enters = (source < 0) & ((line + 1) * part + phase >= (before + 1) * whole)
            source[enters] = index
            line = np.where(source == index, before, np.where(source < 0, line - before, line))
        return source, line

    def counts(self, rows: int) -> list[int]:
        """How many of the first `rows` rows each source gets."""
        counts = []
        for part, whole, phase in self._doors():
            counts.append((rows * part + phase) // whole)
            rows -= counts[-1]
        return counts


class MixedSplit(Split):
    """The same split of several data sets of one tokenizer, one after another.

    Its validation windows are spread over the sources in proportion to their weights, so that the
    loss is that of the mixture.
    """

    def __init__(self, parts: Mapping[str, Split], weights: Mapping[str, float]) -> None:
        first = next(iter(parts.values()))
        super().__init__(
            first.name,
            [file for part in parts.values() for file in part.files],
            tokenizer=first.tokenizer,
            vocab_size=first.vocab_size,
            eot=first.eot,
            bytes=_total(part.bytes for part in parts.values()),
            documents=_total(part.documents for part in parts.values()),
        )
        self.parts, self.weights = dict(parts), dict(weights)
        self.starts = np.cumsum([0, *map(len, parts.values())])[:-1]

    @property
    def bytes_per_token(self) -> float | None:
        rates = {name: part.bytes_per_token for name, part in self.parts.items()}
        total = 0.0
        for name, rate in rates.items():
            if rate is None:
                return None
            total += self.weights[name] * rate
        return total / sum(self.weights.values())

    def validation_offsets(self, context: int, max_tokens: int | None = None) -> np.ndarray:
        """As many windows as keep the proportions, within `max_tokens` and each source's length."""
        total = sum(self.weights.values())
        blocks = {name: (len(part) - 1) // context for name, part in self.parts.items()}
        most = min(blocks[name] * total / weight for name, weight in self.weights.items())
        if max_tokens is not None:
            most = min(most, max_tokens // context)
        found = []
        for start, (name, part) in zip(self.starts, self.parts.items(), strict=True):
            count = int(most * self.weights[name] / total + 1e-9)
            if count < 1:
                raise ValueError(
                    f"a validation set of {int(most)} windows of context={context} holds none of "
                    f"data.mixture.{name}, whose share is {self.weights[name] / total:.2g} and "
                    f"whose validation split has {len(part)} tokens: raise train.eval_tokens or "
                    "its data.val_fraction"
                )
            found.append(start + validation_offsets(len(part), context, count * context))
        return np.concatenate(found)


def _total(counts: Iterable[int | None]) -> int | None:
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)


@dataclass(frozen=True, kw_only=True)
class MixedOrder(Order):
    """The windows of a MixedSplit: a row's source by `deal`, its window by that source's order."""

    deal: Deal
    parts: tuple[Order, ...]
    starts: tuple[int, ...]

    def windows(self, rows: np.ndarray) -> np.ndarray:
        sources, places = self.deal(rows)
        out = np.empty(rows.shape, np.int64)
        for index, part in enumerate(self.parts):
            here = sources == index
            out[here] = self.starts[index] + part.windows(places[here])
        return out

    def check(self, steps: int) -> None:
        needed = self.deal.counts(steps * self.global_batch)
        for name, part, count in zip(self.deal.weights, self.parts, needed, strict=True):
            part.check_rows(count, f"train.steps={steps}", f"data.mixture.{name}")


def create_mixed_order(
    sampling: str, split: MixedSplit, *, context: int, global_batch: int, seed: int, repeat: bool
) -> MixedOrder:
    """The order of a mixture, each of whose sources is read as `sampling` says."""
    parts = []
    for name, part in split.parts.items():
        try:
            parts.append(
                create_order(
                    sampling,
                    tokens=len(part),
                    context=context,
                    global_batch=global_batch,
                    seed=_key(seed, name),
                    repeat=repeat,
                )
            )
        except ValueError as error:
            raise ValueError(f"data.mixture.{name}: {error}") from error
    return MixedOrder(
        tokens=len(split),
        context=context,
        global_batch=global_batch,
        seed=seed,
        repeat=repeat,
        deal=Deal(split.weights, seed),
        parts=tuple(parts),
        starts=tuple(split.starts.tolist()),
    )
