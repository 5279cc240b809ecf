"""Text to token files, once (the command is data/prepare.py).

The work is done in a folder beside that of the data set (data/plan.py): data/work.py fills it with
parts, data/assemble.py joins them, and the result takes its name in one step: the name of a data
set either does not exist or holds all of it.  What a killed process leaves is where the next one
goes on.  Processes that want the same data set wait for the one that is preparing it; where the
file system has no locks, each prepares its own, from the start, and the first one wins.

Many machines share the work with `data.worker=i/n`: each does every n-th piece, and the last to
finish assembles; `merge` (or the command without data.worker) does it where there are no locks.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from data import DataConfig
from data.assemble import Parts, assemble, finished_parts, first_of_each
from data.formats import token_dtype
from data.plan import Plan, existing, explained, is_finished, locked, plan
from data.progress import Progress, progress
from data.shards import SPLITS, Manifest, SplitInfo, write_atomically
from data.texts import Document, TextError, Texts
from data.work import Journal, encode, write_pieces

SAMPLE = 1 << 18  # characters of text that are tokenized to estimate the disk space


def prepare(config: DataConfig) -> Path:
    """The folder of the data set that `config` describes, prepared first if it is not there yet.

    Interrupted at any moment, by SIGKILL too, and called again, it goes on where it stopped, to the
    same files.  Shows a progress bar on a terminal.  Memory does not grow with the corpus, but for
    de-duplication (`data.assemble.first_of_each`).

    Raises ValueError for unusable settings or text, or where `config.dir` holds anything else;
    FileNotFoundError for missing files; OSError, with the space needed, where writing fails.
    """
    this = plan(config)
    if is_finished(this):
        _remove(this.work)  # what is left where a process was killed at the very end
        return this.folder
    with locked(this) as alone:
        if is_finished(this):  # by the process that was waited for
            return this.folder
        work = this.work if alone else this.work.with_suffix(f".{uuid.uuid4().hex[:8]}.work")
        try:
            corpus = _opened(this, work)
            if corpus.pieces:
                _write(this, work, corpus, range(len(corpus.pieces)))
            _finish(this, work, len(corpus.pieces))
        finally:
            if not alone:  # nobody would find it again
                _remove(work)
    return this.folder


def prepare_share(config: DataConfig) -> Path | None:
    """The share of the work that `config.worker`, "i/n", names: every n-th piece, from the i-th.

    The last of the workers to finish assembles the data set and returns its folder; None from the
    others, and from all where the file system has no locks (`merge` is then the last step).
    """
    index, count = _share(config.worker or "1/1")
    this = plan(config)
    if is_finished(this):
        return this.folder
    with locked(this, shared=True) as locks:
        corpus = _opened(this, this.work)
        _write(this, this.work, corpus, range(index - 1, len(corpus.pieces), count))
    done = [Journal.load(this.work / "parts", i).done for i in range(len(corpus.pieces))]
    if not (locks and all(done)):
        return this.folder if is_finished(this) else None
    return merge(config)


def merge(config: DataConfig) -> Path:
    """Assemble what workers have prepared; ValueError where pieces are missing."""
    this = plan(config)
    if is_finished(this):
        return this.folder
    with locked(this):
        if not is_finished(this):
            recorded = _recorded(this.work)
            if recorded is None:
                raise ValueError(f"no worker has prepared anything yet in {this.work}")
            _finish(this, this.work, len(recorded["pieces"]))
    return this.folder


def _share(worker: str) -> tuple[int, int]:
    """(i, n) of "i/n"."""
    index, _, count = worker.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ValueError(f"data.worker={worker}: expected i/n, from 1/n to n/n, such as 3/16")
    return int(index), int(count)


# --- the folder of the work -------------------------------------------------------------------


def _recorded(work: Path) -> dict[str, Any] | None:
    """What the first process that opened the source wrote down about it."""
    path = work / "source.json"
    return json.loads(path.read_bytes()) if path.is_file() else None


def _opened(this: Plan, work: Path) -> Texts:
    """The source, as it was found when this preparation began; checks the disk when it begins."""
    recorded = _recorded(work)
    corpus = this.source.open(recorded["found"] if recorded else {})
    names = [piece.name for piece in corpus.pieces]
    published = any((work / "parts").glob("*_shards.json")) and not (work / "out").is_dir()
    if published or (recorded is not None and recorded["pieces"] != names):
        # Finished, then deleted; or cut into pieces by another version of this program.
        _remove(work)
        recorded = None
    if recorded is None:
        if this.config.check:
            _check_space(this, corpus)
        new = work.with_name(f"{work.name}.{uuid.uuid4().hex[:8]}.tmp")
        with explained(this.folder):
            (new / "parts").mkdir(parents=True)
            record = json.dumps({"found": corpus.found, "pieces": names}, indent=2)
            write_atomically(new / "source.json", record.encode())
            try:
                os.rename(new, work)  # whole or not at all, for workers that begin at once
            except OSError:
                if _recorded(work) is None:
                    raise
                shutil.rmtree(new)
                return _opened(this, work)
    return corpus


def _remove(work: Path) -> None:
    """Whole or not at all, so that nobody takes up the half of it; and what was left half-way."""
    with suppress(FileNotFoundError):
        os.rename(work, work.with_name(f"{work.name}.{uuid.uuid4().hex[:8]}.tmp"))
    for old in work.parent.glob(f"{glob.escape(work.name)}.*.tmp"):
        shutil.rmtree(old, ignore_errors=True)


def _check_space(this: Plan, corpus: Texts) -> None:
    """OSError where the disk is too small for the files and, while they are joined, one more."""
    documents = (d for piece in corpus.pieces for d in piece.documents())
    sample: list[Document] = []
    size = 0
    for document in islice(documents, 1000):
        sample.append(document)
        size += len(document.text)
        if size >= SAMPLE:
            break
    encoded = encode(sample, this.recipe)
    ids_per_byte = sum(encoded.tokens.values()) / max(1, sum(encoded.bytes.values()))
    itemsize = token_dtype(this.tokenizer.vocab_size).itemsize
    total = corpus.text_bytes * ids_per_byte * itemsize
    needed = total + min(total, this.config.shard_tokens * itemsize)
    free = shutil.disk_usage(existing(this.folder)).free
    if needed > free:
        raise OSError(
            f"{this.folder} needs about {needed / 1e6:,.0f} MB of disk, {free / 1e6:,.0f} MB are "
            "free: make room, set data.dir or paths.cache to a larger disk, or data.check=false to "
            "begin regardless"
        )


def _write(this: Plan, work: Path, corpus: Texts, indices: Sequence[int]) -> None:
    """Prepare pieces, in this process or in several."""
    config, parts = this.config, work / "parts"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = config.threads or max(1, (cores or 1) // config.processes)
    journals = [Journal.load(parts, index) for index in indices]
    done = sum(sum(part.bytes.values()) for journal in journals for part in journal.parts)
    share = int(corpus.text_bytes * len(indices) / max(1, len(corpus.pieces)))
    try:
        with (
            explained(this.folder),
            progress(f"preparing {config.name or config.source}", share, done) as bar,
        ):
            if config.processes == 1:
                write_pieces(parts, corpus.pieces, indices, this.recipe, threads, bar.tokenized)
            else:
                todo = [i for i, j in zip(indices, journals, strict=True) if not j.done]
                _write_in_processes(config, work, corpus.found, todo, threads, bar)
    except TextError:
        # The source has to change, and then its settings will be others.
        _remove(work)
        raise


def _write_in_processes(
    config: DataConfig,
    work: Path,
    found: dict[str, Any],
    indices: Sequence[int],
    threads: int,
    bar: Progress,
) -> None:
    """Each process takes the next piece that nobody has taken."""
    with ProcessPoolExecutor(config.processes, get_context("spawn")) as pool:
        tasks = {pool.submit(_write_one, config, work, found, i, threads): i for i in indices}
        try:
            for task in as_completed(tasks):
                bar.tokenized(*task.result())
        except BrokenProcessPool as error:
            raise OSError(
                "one of the processes was killed, by the system if memory ran out: the same command"
                f" goes on; data.processes={config.processes} may be too many"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _write_one(
    config: DataConfig, work: Path, found: dict[str, Any], index: int, threads: int
) -> tuple[int, int]:
    """In a process of its own: one piece.  Returns what was done of it here."""
    this = plan(config)
    amounts: list[tuple[int, int]] = []
    pieces = this.source.open(found).pieces
    advance: Callable[[int, int], object] = lambda size, tokens: amounts.append((size, tokens))  # noqa: E731
    write_pieces(work / "parts", pieces, [index], this.recipe, threads, advance)
    return sum(size for size, _ in amounts), sum(tokens for _, tokens in amounts)


def _finish(this: Plan, work: Path, pieces: int) -> None:
    """Assemble the finished parts, give the result its name, and remove the work."""
    parts_folder, out = work / "parts", work / "out"
    parts = finished_parts(parts_folder, pieces)
    keep = first_of_each(parts_folder, parts) if this.config.dedup else None
    _check_splits(this, parts, work)
    total = sum(part.tokens[split] for _, _, part in parts for split in SPLITS)
    with explained(this.folder), progress("writing shards", total, unit=" ids") as bar:
        splits = assemble(
            parts_folder, out, parts, this.tokenizer, this.config.shard_tokens, keep, bar.written
        )
    if this.config.check:
        _check_counts(this, splits)
    with explained(this.folder):
        recorded = _recorded(work) or {}
        found = {"found": recorded["found"]} if recorded.get("found") else {}
        Manifest(
            name=this.settings["source"],
            tokenizer=this.tokenizer.name,
            tokenizer_fingerprint=this.tokenizer.fingerprint,
            vocab_size=this.tokenizer.vocab_size,
            eot=this.tokenizer.eot,
            settings={**this.settings, **found},
            splits=splits,
        ).save(out)
        try:
            os.rename(out, this.folder)
        except OSError:  # another process, where there are no locks, was faster
            if not is_finished(this):
                raise
    _remove(work)


def _check_splits(this: Plan, parts: Parts, work: Path) -> None:
    documents = {split: sum(part.documents[split] for _, _, part in parts) for split in SPLITS}
    for split, count in documents.items():
        if count == 0:
            _remove(work)
            raise ValueError(
                f"the {split} split is empty: the source has {sum(documents.values())} "
                f"documents, of which data.val_fraction={this.config.val_fraction} are for "
                "validation; give more text or change data.val_fraction"
            )


def _check_counts(this: Plan, splits: dict[str, SplitInfo]) -> None:
    if this.config.source == "huggingface":
        from data.huggingface import check_published

        documents = sum(info.documents or 0 for info in splits.values())
        tokens = {split: info.tokens for split, info in splits.items()}
        check_published(this.settings, documents, tokens)
