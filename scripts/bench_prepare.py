"""How fast and in how much memory text becomes shards, beside what tiktoken alone reaches.

    python -m scripts.bench_prepare --files 'corpus/*.jsonl.xz'                  a sample of it
    python -m scripts.bench_prepare --files 'corpus/*.jsonl.xz' --megabytes 0    all of it

Each repetition runs, one after another on the same cores, tiktoken's encode_ordinary_batch over
texts in memory and the whole preparation (reading, decompressing, tokenizing, hashing, writing) in
each of its variants: one process with as many threads as cores, and, with --processes, several that
share files and threads equally, started together (the slowest counts).  Ratios are of the medians.
Memory is the sum of the resident sizes of the preparing processes, sampled every 50 ms.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil

from data import DataConfig
from data.sources import open_source
from data.texts import Piece
from data.tokenizer import GPT2_PATTERN, get_tokenizer

ROOT = Path(__file__).resolve().parent.parent
CHUNK = 32_000_000  # characters of text that tiktoken is given at once: its lists are large

PREPARE = """
import json, sys, time
from data import DataConfig
from data.preparation import prepare
from data.tokenizer import get_tokenizer
if __name__ == "__main__":
    get_tokenizer("gpt2").encode("loaded before the clock starts")
    start = time.perf_counter()
    folder = prepare(DataConfig(**json.loads(sys.argv[1])))
    seconds = time.perf_counter() - start
    from data.shards import Manifest
    splits = Manifest.load(folder).splits.values()
    tokens = sum(split.tokens - split.documents for split in splits)
    print(json.dumps([tokens, seconds]))
"""


@dataclass(frozen=True)
class Run:
    tokens: int
    seconds: float
    peak_bytes: int = 0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def sample(pieces: list[Piece], megabytes: float, groups: int, folder: Path) -> list[list[str]]:
    """The first documents of every piece, some `megabytes` in all, dealt out to `groups` of
    .jsonl.xz files."""
    share = int(megabytes * 1e6 / len(pieces))
    files: list[list[str]] = [[] for _ in range(groups)]
    for index, piece in enumerate(pieces):
        rows: list[list[str]] = [[] for _ in range(groups)]
        sizes = [0] * groups
        for document in piece.documents():
            least = sizes.index(min(sizes))
            rows[least].append(json.dumps({"text": document.text}) + "\n")
            sizes[least] += len(document.text)
            if sum(sizes) >= share:
                break
        for group in range(groups):
            path = folder / f"{group}_{index:03d}.jsonl.xz"
            with lzma.open(path, "wt", encoding="utf-8") as file:
                file.writelines(rows[group])
            files[group].append(str(path))
    return files


def chunks(files: list[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for piece in open_source(DataConfig(source="text", files=files)).open({}).pieces:
        for document in piece.documents():
            chunk.append(document.text)
            size += len(document.text)
            if size >= CHUNK:
                yield chunk
                chunk, size = [], 0
    yield chunk


def tiktoken_alone(files: list[str], threads: int) -> Run:
    """encode_ordinary_batch over texts in memory; reading them is not timed."""
    encoding = get_tokenizer("gpt2")._encoding  # type: ignore[attr-defined]
    assert encoding._pat_str == GPT2_PATTERN
    tokens, seconds = 0, 0.0
    for chunk in chunks(files):
        start = time.perf_counter()
        ids = encoding.encode_ordinary_batch(chunk, num_threads=threads)
        seconds += time.perf_counter() - start
        tokens += sum(map(len, ids))
    return Run(tokens, seconds)


def whole_preparation(groups: list[list[str]], threads: int) -> Run:
    """The preparation of each group of files, at the same time, in a process of its own."""
    with tempfile.TemporaryDirectory() as cache:
        script = Path(cache) / "prepare.py"
        script.write_text(PREPARE)
        peak: list[int] = [0]
        processes = []
        for files in groups:
            config = {
                "source": "text", "files": files, "tokenizer": "gpt2", "cache": cache,
                "threads": threads, "val_fraction": 0.01,
            }  # fmt: skip
            process = subprocess.Popen(
                [sys.executable, str(script), json.dumps(config)],
                cwd=ROOT, stdout=subprocess.PIPE, text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            processes.append(process)
        watcher = threading.Thread(target=_watch, args=([p.pid for p in processes], peak))
        watcher.start()
        outputs = [process.communicate()[0] for process in processes]
        watcher.join()
        if any(process.returncode for process in processes):
            raise RuntimeError("the preparation failed; see above")
        results = [json.loads(out) for out in outputs]
        return Run(
            sum(tokens for tokens, _ in results), max(seconds for _, seconds in results), peak[0]
        )


def _watch(pids: list[int], peak: list[int]) -> None:
    alive = True
    while alive:
        alive, total = False, 0
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                alive |= process.status() != psutil.STATUS_ZOMBIE
                total += process.memory_info().rss
        peak[0] = max(peak[0], total)
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", nargs="+", required=True)
    parser.add_argument("--megabytes", type=float, default=40.0, help="of text; 0: all of it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="a second variant: so many")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    variants = sorted({1, args.processes})
    with tempfile.TemporaryDirectory() as folder:
        groups = [args.files]
        if args.megabytes:
            # Every file is a piece of its own, so that each is in the sample.
            entries = open_source(DataConfig(source="text", files=args.files)).settings["files"]
            pieces = [
                piece
                for entry in entries
                for piece in open_source(DataConfig(source="text", files=[entry["path"]]))
                .open({})
                .pieces
            ]
            groups = sample(pieces, args.megabytes, args.processes, Path(folder))
        elif args.processes > 1:
            parser.error("--processes needs a sample: --megabytes above 0")
        files = [file for group in groups for file in group]
        alone: list[Run] = []
        prepared: dict[int, list[Run]] = {count: [] for count in variants}
        for _ in range(args.repeats):
            alone.append(tiktoken_alone(files, cores))
            for count in variants:
                shares = groups if count > 1 else [files]
                prepared[count].append(whole_preparation(shares, max(1, cores // count)))
    base = median(run.rate for run in alone)
    print(f"{cores} cores, {alone[0].tokens:,} tokens, {args.repeats} repetitions")
    print(f"{'':<40} {'M tokens/s':>10} {'ratio':>6} {'peak MB':>8}")
    print(f"{f'tiktoken encode_ordinary_batch({cores})':<40} {base / 1e6:>10.2f} {1.0:>6.2f}")
    for count, runs in prepared.items():
        rate = median(run.rate for run in runs)
        peak = max(run.peak_bytes for run in runs) / 1e6
        name = f"data.prepare, {count} processes x {max(1, cores // count)} threads"
        print(f"{name:<40} {rate / 1e6:>10.2f} {rate / base:>6.2f} {peak:>8.0f}")
    tokens = {run.tokens for runs in prepared.values() for run in runs} | {alone[0].tokens}
    assert len(tokens) == 1, f"the variants made different numbers of tokens: {tokens}"


if __name__ == "__main__":
    main()
