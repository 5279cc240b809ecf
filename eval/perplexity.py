"""Perplexities on texts that others have measured too.

    python -m eval.perplexity checkpoint=RUN task=wikitext [data_file=wiki.test.raw]
    python -m eval.perplexity checkpoint=RUN task=lambada [data_file=lambada_openai.jsonl.xz]

Both are lm-evaluation-harness 0.4.13's tasks (`wikitext`, `lambada_openai`), and give its numbers.

wikitext: WikiText-2 (Merity et al., 2016), test, article by article. WikiText's spaces around
punctuation are taken out before tokenizing, but words and bytes are counted in the text as it was:
`word_perplexity` = exp(-log-likelihood / words), likewise per byte, and `bits_per_byte`. An article
longer than the model's context is read in windows that do not overlap, but for the last, which
begins earlier to be a full one.

lambada: the last word of a passage (Paperno et al., 2016; OpenAI's version). `acc` is the share of
words that the model would have written, `perplexity` exp(-mean log-likelihood of the word).
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.tokenizer import Tokenizer
from eval.documents import open_text, read_documents
from eval.likelihood import Question, Scorer, encode_pair
from eval.options import run_with_options
from runtime.files import json_safe
from runtime.processes import join

WIKITEXT, LAMBADA = "EleutherAI/wikitext_document_level", "EleutherAI/lambada_openai"


def rolling_windows(ids: list[int], eot: int, context: int) -> Iterator[Question]:
    """A text of any length as questions that together predict each of its tokens once, the first
    after an end-of-text; the last window reaches back to fill the context."""
    first = ids[:context]
    if first:
        yield Question([eot], [first])
    for start in range(context, len(ids), context):
        piece = ids[start : start + context]
        before = start - 1 - (context - len(piece))
        yield Question(ids[before:start], [piece])


# ---- WikiText


def articles(file: str | None, limit: int | None) -> list[str]:
    """WikiText's test articles, as EleutherAI/wikitext_document_level cuts them: an article begins
    at a line `= Title =`."""
    if file is None:
        rows = read_documents(None, WIKITEXT, "test", limit, "data_file", "wikitext-2-raw-v1")
        return [row["page"] for row in rows]
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{file} does not exist: expected WikiText's wiki.test.raw")
    with open_text(path) as stream:
        lines = stream.read().split("\n")
    pages: list[list[str]] = [[]]
    for line in lines:
        title = line.replace("= = =", "===").replace("= =", "==").strip()
        if title.startswith("= ") and title.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    texts = ["\n".join(page) for page in pages]
    last = len(texts) - 1  # which counts even where it is empty, as there
    return [text for i, text in enumerate(texts) if text.strip() or i == last][:limit]


# (pattern, replacement): lm-evaluation-harness's steps back to ordinary text, in their order
DETOKENIZE: tuple[tuple[str, str], ...] = (
    (r"s '", "s'"),
    (r"/' [0-9]/", r"/'[0-9]/"),
    (r" @-@ ", "-"),
    (r" @,@ ", ","),
    (r" @\.@ ", "."),
    *((rf" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="),
    (r"= = =", "==="),
    (r"= =", "=="),
    (r" ° ", "°"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", " 1 "),
    (r" 's", "'s"),
)


def detokenize(page: str) -> str:
    for pattern, replacement in DETOKENIZE:
        page = re.sub(pattern, replacement, page)
    return page


def wikitext(
    scorer: Scorer, tokenizer: Tokenizer, file: str | None, limit: int | None
) -> dict[str, Any]:
    """`word_perplexity`, `byte_perplexity`, `bits_per_byte`, and `n` articles."""
    pages = articles(file, limit)
    questions = [
        window
        for page in pages
        for window in rolling_windows(
            tokenizer.encode(detokenize(page)).tolist(),
            tokenizer.eot,
            scorer.model.config.context,
        )
    ]
    found = scorer.scores(questions, label="WikiText")
    nats = -math.fsum(score.loglikelihood for [score] in found)
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    size = sum(len(page.encode()) for page in pages)
    return {
        "word_perplexity": math.exp(nats / words),
        "byte_perplexity": math.exp(nats / size),
        "bits_per_byte": nats / size / math.log(2),
        "unknown_words": sum(page.count("<unk>") for page in pages),
        "n": len(pages),
    }


# ---- LAMBADA


def passage(row: dict[str, Any]) -> tuple[str, str]:
    """Context and last word, with its space; rows have `text`, or `context` and `continuation`."""
    if not ("text" in row or {"context", "continuation"} <= row.keys()):
        raise ValueError(f"a row has {', '.join(row)}: expected text, or context and continuation")
    text = row["text"] if "text" in row else f"{row['context']} {row['continuation'].strip(' ')}"
    context, _, word = text.rpartition(" ")
    return context, f" {word}"


def lambada(
    scorer: Scorer, tokenizer: Tokenizer, file: str | None, limit: int | None
) -> dict[str, Any]:
    """`acc` and `perplexity` with standard errors, and `n` passages."""
    rows = read_documents(file, LAMBADA, "test", limit, "data_file", "default")
    questions = []
    for row in rows:
        given, word = encode_pair(tokenizer, *passage(row))
        questions.append(Question(given, [word]))
    found = [score for [score] in scorer.scores(questions, greedy=True, label="LAMBADA")]
    n = len(found)
    logs = [score.loglikelihood for score in found]
    acc = sum(bool(score.greedy) for score in found) / n
    perplexity = math.exp(-math.fsum(logs) / n)
    spread = statistics.stdev(logs) / math.sqrt(n) if n > 1 else math.nan
    return {
        "acc": acc,
        "acc_stderr": math.sqrt(acc * (1 - acc) / (n - 1)) if n > 1 else math.nan,
        "perplexity": perplexity,
        "perplexity_stderr": perplexity * spread,  # of exp, to first order
        "n": n,
        "truncated": sum(score.truncated for score in found),
    }


TASKS: dict[str, Callable[[Scorer, Tokenizer, str | None, int | None], dict[str, Any]]] = {
    "wikitext": wikitext,
    "lambada": lambada,
}


# ---- command line


@dataclass(frozen=True)
class Options:
    """What to evaluate, and on what."""

    checkpoint: str  # a run, a checkpoint of one, a Hugging Face folder or hub name
    task: str  # wikitext or lambada
    data_file: str | None = None  # null: from the hub
    limit: int | None = None  # the first so many articles or passages
    device: str = "auto"  # cuda, mps or cpu
    precision: str = "fp32"  # or bf16
    compile: bool = False
    batch_tokens: int | None = None  # of a forward pass; null: by the kind of device


def run(options: Options) -> None:
    """Evaluate, add the metrics to the run's eval.jsonl, print them."""
    from eval.checkpoint import append_results, load_model, open_device

    if options.task not in TASKS:
        raise ValueError(f"task={options.task}: expected one of {', '.join(TASKS)}")
    processes = join()
    device = open_device(options.device, options.precision, processes.local_rank)
    model, tokenizer = load_model(options.checkpoint, device.device)
    scorer = Scorer(
        model,
        device,
        batch_tokens=options.batch_tokens,
        compile=options.compile,
        processes=processes,
    )
    metrics = TASKS[options.task](scorer, tokenizer, options.data_file, options.limit)
    if processes.first:
        if metrics.get("unknown_words"):
            print(
                f"this text has {metrics['unknown_words']} <unk>: it is not WikiText's raw form, "
                f"and its perplexity cannot be compared with published ones"
            )
        values = {f"eval/{options.task}_{key}": value for key, value in metrics.items()}
        append_results(options.checkpoint, {**values, "options": asdict(options)})
        for key, value in metrics.items():
            print(f"{key:<20}{value:.6g}")
        print(json.dumps(json_safe(metrics)))
    processes.leave()


if __name__ == "__main__":
    sys.exit(run_with_options(Options, run, __doc__))
