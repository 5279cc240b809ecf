"""How fast batches of token ids are read, by one process, from files on this machine.

    python -m scripts.bench_loader                  20 files of 100 M ids (4 GB) in a temporary
                                                    folder; --files 4 --tokens 10000000 for less
    python -m scripts.bench_loader --cold           and from the disk, not the system's cache
    python -m scripts.bench_loader --dir FOLDER     a data set that is there (its train split)

Prints, for every order, the tokens per second that a loop which does nothing else gets from the
loader, the median of several turns, and the time of what a batch is made of.  `--cold` drops the
files from the system's cache before each turn and reads with and without the announcement of coming
windows (data/loader.py); those turns are short, and depend on the disk alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.loader import Loader, read_windows
from data.order import SAMPLING, Order, create_order
from data.shards import SPLITS, Manifest, ShardWriter, Split, SplitInfo, open_split

VOCAB = 50257


def make(folder: Path, files: int, tokens: int) -> None:
    """A data set of random ids in `files` files of `tokens` each."""
    ids = np.random.default_rng(0).integers(0, VOCAB, tokens, dtype=np.uint16)
    splits = {}
    for split, count in zip(SPLITS, (files, 1), strict=True):
        with ShardWriter(folder, split, VOCAB, tokens) as writer:
            for _ in range(count):
                writer.append(ids)
        splits[split] = SplitInfo(count * tokens, count * tokens, 1, tuple(writer.shards))
    Manifest("bench", "gpt2", "", VOCAB, VOCAB - 1, {}, splits).save(folder)


def timed(work: Callable[[], object], turns: int = 5) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(turns):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def rate(split: Split, order: Order, steps: int, turns: int = 5) -> float:
    """Tokens (targets) per second from a loader that is asked for one batch after another."""
    with Loader(split, order) as loader:
        loader.batch(0)
        first = 1

        def turn() -> None:
            nonlocal first
            for step in range(first, first + steps):
                loader.batch(step)
            first += steps

        return steps * order.global_batch * order.context / timed(turn, turns)


def forget(split: Split) -> None:
    """Drop the split's files from the system's cache (what nobody else has mapped)."""
    for file in split.files:
        with open(file.path, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Unannounced:
    """A split whose announcements nobody hears."""

    def __init__(self, split: Split) -> None:
        self.read_rows = split.read_rows

    def announce(self, offsets: np.ndarray, n: int) -> None:
        pass


def cold(folder: Path, order: Order, steps: int) -> None:
    """Seconds per batch from the disk, announced and not, in turns."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    first = 0
    for turn in range(6):
        announced = turn % 2 == 0
        split = open_split(folder, "train")
        forget(split)
        source = split if announced else Unannounced(split)
        with Loader(source, order) as loader:  # type: ignore[arg-type]
            began = time.perf_counter()
            for step in range(first, first + steps):
                loader.batch(step)
            seconds[announced].append((time.perf_counter() - began) / steps)
        first += steps
    for announced, found in seconds.items():
        word = "announced" if announced else "unannounced"
        print(f"cold, {word:<12} {statistics.median(found) * 1e3:8.1f} ms per batch")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_loader", description=__doc__)
    parser.add_argument("--dir", type=Path, help="a prepared data set; default: one of random ids")
    parser.add_argument("--files", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=100_000_000, help="per file")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=500, help="batches per turn")
    parser.add_argument("--cold", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.dir or Path(temporary)
        if options.dir is None:
            make(folder, options.files, options.tokens)
        split = open_split(folder, "train")
        size = sum(file.path.stat().st_size for file in split.files)
        print(f"{len(split):,} ids in {len(split.files)} files, {size / 1e9:.1f} GB")
        orders = {
            name: create_order(
                name, tokens=len(split), context=options.context, global_batch=options.batch, seed=1
            )
            for name in SAMPLING
        }
        if options.cold:
            cold(folder, orders["shuffled"], min(50, options.steps))
        for file in split.files:
            file.path.read_bytes()  # into the system's cache
        for name, order in orders.items():
            print(f"{name:<13} {rate(split, order, options.steps) / 1e6:8.1f} M tokens/s")
        shuffled = orders["shuffled"]
        offsets = shuffled.offsets(0)
        parts = {
            "which windows": lambda: shuffled.offsets(3),
            "announce": lambda: split.announce(offsets, options.context + 1),
            "copy and check": lambda: read_windows(split, offsets, options.context),
        }
        for name, work in parts.items():
            print(f"{name:<15} {timed(work, 300) * 1e6:8.0f} us per batch of {options.batch}")


if __name__ == "__main__":
    main()
