"""Look at data: `python -m data.inspect data=... [overrides as for train.py]`.

    python -m data.inspect data=shards data.dir=DIR    files, counts, lengths of documents, samples
    python -m data.inspect data=stdlib step=1234       what the model saw at step 1234
    python -m data.inspect run=RUN_DIR step=1234       the same of a run, by its config.yaml

Steps are counted as in metrics.jsonl: step 1 is the first update.  Of its own settings, besides
these two, it has samples=3 (random ones, by `seed`), sample_tokens=200, rows=4 (of a step; all),
max_tokens=100000000 (read for the lengths of documents; null: all) and
picture=document_lengths.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.compose import compose_tree, data_config, in_one_line
from data.corpus import Corpus, open_corpus
from data.documents import document_lengths
from data.shards import Split
from data.tokenizer import Tokenizer

END = "<|endoftext|>"
FILES_SHOWN = 20


@dataclass
class Look:
    """The settings of this program alone."""

    run: str | None = None
    step: int | None = None
    rows: int | None = None
    samples: int = 3
    sample_tokens: int = 200
    max_tokens: int | None = 100_000_000
    picture: str = "document_lengths.png"


def decode(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """The text of some ids, the ends of documents shown."""
    pieces = np.split(ids, np.flatnonzero(ids == tokenizer.eot))
    texts = [tokenizer.decode(piece[piece != tokenizer.eot]) for piece in pieces]
    return END.join(texts)


def files_table(corpus: Corpus) -> str:
    """The files of both splits, the first ones of many."""
    lines = [f"{'file':<40} {'format':<11} {'ids':>15} {'dtype':<7} {'MB':>10}"]
    for split in (corpus.train, corpus.val):
        for file in split.files[:FILES_SHOWN]:
            size = file.path.stat().st_size / 1e6
            lines.append(
                f"{file.path.name:<40} {file.shard.format:<11} {file.shard.tokens:>15,} "
                f"{file.shard.dtype:<7} {size:>10,.1f}"
            )
        if len(split.files) > FILES_SHOWN:
            lines.append(f"... and {len(split.files) - FILES_SHOWN} more {split.name} files")
    return "\n".join(lines)


def counts_table(corpus: Corpus) -> str:
    """Tokens, documents and text bytes of both splits; what is not known is a dash."""
    lines = [
        f"{'split':<6} {'documents':>14} {'text bytes':>18} {'tokens':>18} {'bytes/token':>12}"
    ]
    for split in (corpus.train, corpus.val):
        documents, size = (
            "-" if count is None else f"{count:,}" for count in (split.documents, split.bytes)
        )
        rate = "-" if split.bytes_per_token is None else f"{split.bytes_per_token:.3f}"
        lines.append(f"{split.name:<6} {documents:>13} {size:>17} {len(split):>17,} {rate:>12}")
    return "\n".join(lines)


def lengths_line(lengths: np.ndarray) -> str:
    if not lengths.size:
        return "no document ends in what was read"
    low, middle, high = np.percentile(lengths, [10, 50, 90])
    return (
        f"{lengths.size:,} documents: {lengths.mean():,.1f} tokens on average, "
        f"median {middle:,.0f}, 10 % up to {low:,.0f}, 90 % up to {high:,.0f}, "
        f"longest {lengths.max():,}"
    )


def plot_lengths(lengths: np.ndarray, title: str, path: Path) -> None:
    """A histogram of tokens per document, in bins of equal width on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    edges = np.geomspace(lengths.min(), lengths.max() + 1, 61)
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    bins = np.unique(np.round(edges)) - 0.5  # whole numbers between the edges
    axes.hist(lengths, bins=bins.tolist())
    axes.set_xscale("log")
    median = float(np.median(lengths))
    axes.axvline(median, color="black", linestyle="--", linewidth=1, label=f"median {median:,.0f}")
    axes.set_xlabel("tokens per document, with its end-of-text")
    axes.set_ylabel("documents")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    axes.set_title(title)
    axes.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def samples(split: Split, tokenizer: Tokenizer, count: int, tokens: int, seed: int) -> list[str]:
    """Texts from random places of a split; the same ones for the same seed."""
    tokens = min(tokens, len(split))
    places = np.random.default_rng(seed).integers(0, len(split) - tokens + 1, count)
    return [
        f"--- {_where(split, place)}\n{decode(tokenizer, split.read(place, tokens))}"
        for place in places.tolist()
    ]


def step_text(
    corpus: Corpus, step: int, context: int, global_batch: int, seed: int, rows: int | None = None
) -> list[str]:
    """What the update that ended step `step` (1 is the first) was computed from, row by row: the
    inputs and, as the last token, the last target.  Raises ValueError for step 0 or less."""
    if step < 1:
        raise ValueError(f"step={step}: expected 1 or more; step 1 is the first update")
    order = corpus.order(context, global_batch, seed)
    return [
        f"--- step {step}, row {row}: {_where(corpus.train, offset)}\n"
        + decode(corpus.tokenizer, corpus.train.read(offset, context + 1))
        for row, offset in enumerate(order.offsets(step - 1)[:rows].tolist())
    ]


def _where(split: Split, offset: int) -> str:
    file, start = split.locate(offset)
    return f"{file.path}, token {start:,}"


# --- command line -------------------------------------------------------------------------------


def _settings(words: list[str]) -> tuple[Look, Any]:
    """This program's own settings, and the configuration tree that the others make."""
    from omegaconf import OmegaConf

    names = tuple(f"{name}=" for name in Look.__dataclass_fields__)
    own = OmegaConf.from_dotlist([word for word in words if word.startswith(names)])
    look = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Look), own))
    assert isinstance(look, Look)
    overrides = [word for word in words if not word.startswith(names)]
    if look.run is not None:
        path = Path(look.run).expanduser() / "config.yaml"
        if not path.is_file():
            raise FileNotFoundError(f"{path} not found: run={look.run} is no run directory")
        return look, OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(overrides))
    return look, compose_tree(overrides)


def report(look: Look, tree: Any) -> dict[str, Any]:
    """Print what was asked for; returns the last line."""
    corpus = open_corpus(data_config(tree))
    print(f"{corpus}\n")
    if look.step is not None:
        context, batch = tree.model.context, tree.train.global_batch
        for text in step_text(corpus, look.step, context, batch, tree.seed, look.rows):
            print(text, end="\n\n")
        return {"step": look.step, "global_batch": batch, "context": context, "seed": tree.seed}
    print(files_table(corpus), counts_table(corpus), sep="\n\n", end="\n\n")
    lengths = document_lengths(corpus.train, look.max_tokens)
    print(lengths_line(lengths), end="\n\n")
    picture = None
    if lengths.size:
        picture = str(Path(look.picture).absolute())
        plot_lengths(lengths, f"Training documents of {tree.data.source}", Path(picture))
    texts = samples(corpus.train, corpus.tokenizer, look.samples, look.sample_tokens, tree.seed)
    for text in texts:
        print(text, end="\n\n")
    return {
        "train_tokens": len(corpus.train),
        "val_tokens": len(corpus.val),
        "documents_read": int(lengths.size),
        "picture": picture,
    }


def main() -> int:
    """Print a description and, as the last line, a JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m data.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="e.g. data=stdlib step=3")
    overrides = parser.parse_args().overrides
    return in_one_line(lambda: print(json.dumps(report(*_settings(overrides)))))


if __name__ == "__main__":
    sys.exit(main())
