"""Text in, batches of token ids out: a package that needs numpy and torch alone.

    sources  ->  prepare  ->  shards  ->  order   ->  loader
    (texts)      (once)       (ids)       (which)     (batches)

`sources` yields documents, `prepare` turns them once into files of token ids, `shards` presents
those files as one long array, `order` says which of its windows make up step s, and `loader` reads
them ahead of the step.  `DataConfig` below is the `data` group of the configuration.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class DataConfig:
    """What a data source's YAML (configs/data/*.yaml) says; the defaults are stdlib.yaml's.

    The fields up to `shard_tokens` decide the prepared files, `dir` and `cache` where they lie, and
    the last three how training reads them.
    """

    source: str = "stdlib"  # a name in data.sources.SOURCES
    files: list[str] = field(default_factory=list)  # for source=text: files, folders, globs
    text_field: str = "text"  # the key of a .jsonl line that holds the text
    tokenizer: str = "bytes"  # a name in data.tokenizer.TOKENIZERS
    val_fraction: float = 0.05  # share of the documents kept for validation
    shard_tokens: int = 100_000_000  # tokens per file
    dir: str | None = None  # the folder of the prepared files; None: one in `cache`
    cache: str = "cache"
    sampling: str = "shuffled"  # a name in data.order.SAMPLING
    repeat: bool = True  # a run longer than one epoch starts the next one
    prefetch: int = 4  # batches read ahead of the step
