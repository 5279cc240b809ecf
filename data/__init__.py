"""Text in, batches of token ids out: a package that needs numpy and torch alone.

    sources  ->  prepare  ->  shards  ->  order   ->  loader
    (texts)      (once)       (ids)       (which)     (batches)

`sources` yields documents, `prepare` turns them once into files of token ids, `shards` presents
those files as one long array, `order` says which of its windows make up step s, and `loader` reads
them ahead of the step.  `corpus` is all of that behind one function.  `DataConfig` below is the
`data` group of the configuration.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class DataConfig:
    """What a source's YAML (configs/data/*.yaml) and configs/data_defaults.yaml say.

    The fields up to `shard_tokens` decide the prepared files, `dir` and `cache` where they lie,
    those up to `check` how the work of preparing them is done, and the last ones how training reads
    them.
    """

    source: str = "stdlib"  # a name in data.sources.SOURCES
    files: list[str] = field(default_factory=list)  # files, folders, globs to read
    name: str | None = None  # for source=huggingface: the data set on the hub, or a folder
    subset: str | None = None  # its configuration, such as sample-10BT
    revision: str | None = None  # its commit, tag or branch; None: main
    split: str = "train"  # the part of it that is read
    val_split: str | None = None  # the part of it for validation; None: split_by decides
    text_field: str = "text"  # the key or column that holds the text
    document_start: str | None = None  # a pattern: rows are joined until one matches it
    tokenizer: str = "bytes"  # a name in data.tokenizer.TOKENIZERS, a tokenizer.json, a hub name
    split_by: str = "hash"  # a name in data.sources.SPLIT_RULES
    val_fraction: float = 0.05  # share of the documents kept for validation
    split_seed: int = 2357  # of split_by=permutation
    dedup: bool = False  # keep the first of identical documents alone
    shard_tokens: int = 100_000_000  # tokens per file
    dir: str | None = None  # the folder of the prepared files; None: one in `cache`
    cache: str = "cache"
    worker: str | None = None  # i/n: do the i-th of n shares, for a job array
    processes: int = 1  # that prepare different stretches of the source
    threads: int | None = None  # of each process, that tokenize; None: all cores
    check: bool = True  # refuse where the disk is too small or published counts do not come out
    sampling: str = "shuffled"  # a name in data.order.SAMPLING
    repeat: bool = True  # a run longer than one epoch starts the next one
    documents: str = "ignored"  # a name in data.documents.DOCUMENTS
    mixture: dict[str, Any] = field(default_factory=dict)  # for source=mixture: name -> settings
    prefetch: int = 4  # batches read ahead of the step
