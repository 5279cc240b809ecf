"""A corpus as a training run sees it: opened by one function, whatever it is made of.

`data.source` names a source of text, which is prepared first if it is not yet; `shards`, token
files that are already there; or `mixture`, several of these in proportion.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from data import DataConfig
from data.bigram import bigram_bits_per_byte
from data.documents import DOCUMENTS
from data.foreign import describe
from data.loader import Loader
from data.mixture import MixedSplit, create_mixed_order, shares
from data.order import Order, create_order
from data.preparation import prepare
from data.shards import MANIFEST, SPLITS, Manifest, Split, check_vocab, load_split
from data.sources import SOURCES
from data.tokenizer import Tokenizer, get_tokenizer


@dataclass(frozen=True)
class Corpus:
    """Two splits of one tokenizer, and how they are read."""

    config: DataConfig
    tokenizer: Tokenizer
    train: Split
    val: Split

    def check_vocab(self, vocab_size: int) -> None:
        """ValueError where the model's vocabulary has less than the tokenizer's ids."""
        for split in (self.train, self.val):
            check_vocab(split, vocab_size)

    def order(self, context: int, global_batch: int, seed: int) -> Order:
        """Which windows of `train` each step reads; ValueError where it is shorter than one."""
        if isinstance(self.train, MixedSplit):
            return create_mixed_order(
                self.config.sampling,
                self.train,
                context=context,
                global_batch=global_batch,
                seed=seed,
                repeat=self.config.repeat,
            )
        return create_order(
            self.config.sampling,
            tokens=len(self.train),
            context=context,
            global_batch=global_batch,
            seed=seed,
            repeat=self.config.repeat,
        )

    def loader(
        self, order: Order, *, rows: slice | None = None, pin_memory: bool = False
    ) -> Loader:
        """Batches of `train`: this process's `rows` of each step's global batch (None: all)."""
        return Loader(
            self.train, order, rows=rows, pin_memory=pin_memory, prefetch=self.config.prefetch
        )

    def documents(self, tokens: Tensor) -> Tensor | None:
        """The `documents` that the model's forward pass is to be given, by `data.documents`."""
        return DOCUMENTS[self.config.documents](tokens, self.tokenizer.eot)

    def bigram_bits_per_byte(self) -> float | None:
        """The mark of `data.bigram`; None where the ids are not the bytes of one source."""
        if isinstance(self.train, MixedSplit) or self.val.bytes_per_token is None:
            return None
        return bigram_bits_per_byte(self.train, self.val)

    @property
    def fingerprint(self) -> str:
        """Differs where the tokens do; does not depend on where the files lie."""
        shards = [shard.sha256 for split in (self.train, self.val) for shard in split.shards]
        return hashlib.sha256(json.dumps(shards).encode()).hexdigest()

    def __str__(self) -> str:
        """What it is and where, a line for each source of a mixture."""
        lines = [
            f"{len(self.train):,} tokens for training, {len(self.val):,} for validation "
            f"({self.tokenizer.name} tokenizer)"
        ]
        if not isinstance(self.train, MixedSplit):
            return f"{lines[0]}, in {self.train.folder}"
        total = sum(self.train.weights.values())
        for name, part in self.train.parts.items():
            share = self.train.weights[name] / total
            lines.append(f"{share:7.2%} {name}: {len(part):,} tokens, in {part.folder}")
        return "\n      ".join(lines)


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus that the `data` group describes.

    Raises ValueError or OSError, with the name of the setting or file, for whatever is unfit.
    """
    tokenizer = get_tokenizer(config.tokenizer)
    return Corpus(config, tokenizer, **OPENERS.get(config.source, _prepared)(config, tokenizer))


def _prepared(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Split]:
    folder = prepare(config)
    return _load(folder, Manifest.load(folder), tokenizer)


def _shards(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Split]:
    if config.dir is None:
        raise ValueError("data.source=shards needs data.dir, the folder of the token files")
    folder = Path(config.dir).expanduser().absolute()
    ours = (folder / MANIFEST).exists()
    manifest = Manifest.load(folder) if ours else describe(folder, tokenizer)
    return _load(folder, manifest, tokenizer)


def _load(folder: Path, manifest: Manifest, tokenizer: Tokenizer) -> dict[str, Split]:
    if manifest.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{folder / MANIFEST}: the data was made with the tokenizer {manifest.tokenizer} "
            f"({manifest.tokenizer_fingerprint}), expected data.tokenizer={tokenizer.name} "
            f"({tokenizer.fingerprint}): set data.tokenizer or choose another data.dir"
        )
    return {split: load_split(folder, split, manifest) for split in SPLITS}


def _mixture(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Split]:
    if not config.mixture:
        raise ValueError(
            "data.mixture is empty: name sources and their weights, such as "
            "'+data.mixture.web={weight: 0.8, source: shards, dir: /data/web}'"
        )
    if config.dir is not None:
        raise ValueError("data.dir belongs to one source: set data.mixture.NAME.dir")
    weights, parts = {}, {}
    sources = {name: _source(config, name, entry) for name, entry in config.mixture.items()}
    for name, (weight, _) in sources.items():
        weights[name] = weight
    shares(weights)  # refused before anything is prepared
    for name, (_, source) in sources.items():
        parts[name] = OPENERS.get(source.source, _prepared)(source, tokenizer)
    return {
        split: MixedSplit({name: part[split] for name, part in parts.items()}, weights)
        for split in SPLITS
    }


def _source(config: DataConfig, name: str, entry: Any) -> tuple[float, DataConfig]:
    """The weight and the settings of one source of a mixture, its types checked."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key = f"data.mixture.{name}"
    if not isinstance(entry, Mapping) or "weight" not in entry:
        raise ValueError(f"{key} has no weight: expected such as {{weight: 0.8, dir: /data/web}}")
    settings = {field: value for field, value in entry.items() if field != "weight"}
    try:
        weight = float(entry["weight"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key}.weight={entry['weight']}: expected a number") from error
    try:
        default = OmegaConf.structured(replace(config, source="shards", mixture={}))
        source = OmegaConf.to_object(OmegaConf.merge(default, settings))
    except OmegaConfBaseException as error:
        raise ValueError(f"{key}: {str(error).splitlines()[0]}") from error
    assert isinstance(source, DataConfig)
    if source.mixture or source.source == "mixture":
        raise ValueError(f"{key} is a mixture itself: name its sources beside the others")
    if source.tokenizer != config.tokenizer:
        raise ValueError(
            f"{key}.tokenizer={source.tokenizer}, but data.tokenizer={config.tokenizer}: all "
            "sources of a mixture share one; set data.tokenizer"
        )
    return weight, source


OPENERS: dict[str, Callable[[DataConfig, Tokenizer], dict[str, Split]]] = {
    "shards": _shards,
    "mixture": _mixture,
}
KINDS = (*SOURCES, *OPENERS)  # what data.source may be
