"""HellaSwag (Zellers et al., 2019): which of four endings goes on with the story?

    python -m eval.hellaswag checkpoint=runs/<date>_<name>
    python -m eval.hellaswag checkpoint=gpt2 data_file=hellaswag_val.jsonl.xz limit=1000
    torchrun --nproc_per_node=8 -m eval.hellaswag checkpoint=...

A model answers by the likeliest ending, and there is more than one way to say that. Two are in use,
and their numbers are not comparable; both are given here, from one pass over the examples.

    acc, acc_norm              lm-evaluation-harness 0.4.13: the activity in front of the context,
                               both cleaned of WikiHow's marks; largest sum of log-probabilities,
                               largest sum per character of the ending
    acc_token, acc_norm_token  build-nanogpt: the text as it is; smallest sum of losses, smallest
                               mean over the ending's tokens

Their contexts differ in every example (by the activity), so nothing but the weights is shared:
the two are two sets of rows in the same batches. Each standard error is that of the mean of as many
independent examples. The last line printed is one JSON object.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from data.tokenizer import Bytes, Tokenizer
from eval.documents import read_documents
from eval.likelihood import Question, Score, Scorer, encode_pair
from eval.options import run_with_options
from model import GPT2
from runtime.config import HellaSwagConfig, TrainConfig
from runtime.device import Device
from runtime.files import atomic_write_text, json_safe
from runtime.processes import Processes, join

HUB = "Rowan/hellaswag"
KEYS = ("activity_label", "ctx", "ctx_a", "ctx_b", "endings", "label")
FEWSHOT_SEED = 1234  # lm-evaluation-harness's
Document = dict[str, Any]


# ---- the conventions: how a document becomes text, and which ending wins


@dataclass(frozen=True)
class Rendered:
    context: str
    endings: list[str]  # as they follow the context, each with its space
    lengths: list[int]  # in characters; the space does not count


def clean(text: str) -> str:
    """What lm-evaluation-harness makes of HellaSwag's text: WikiHow's [title] ends a sentence,
    [step], [header] and the like go."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def as_lm_eval(document: Document) -> Rendered:
    context = document["ctx_a"] + " " + document["ctx_b"].capitalize()  # lowers the rest, as there
    endings = [clean(ending) for ending in document["endings"]]
    return Rendered(
        clean(f"{document['activity_label']}: {context}"),
        [f" {ending}" for ending in endings],
        [len(ending) for ending in endings],
    )


def as_it_is(document: Document) -> Rendered:
    endings = document["endings"]
    return Rendered(
        document["ctx"], [f" {ending}" for ending in endings], [len(ending) for ending in endings]
    )


def encode_apart(tokenizer: Tokenizer, context: str, ending: str) -> tuple[list[int], ...]:
    """build-nanogpt's way: two texts."""
    return tokenizer.encode(context).tolist(), tokenizer.encode(ending).tolist()


@dataclass(frozen=True)
class Convention:
    render: Callable[[Document], Rendered]
    encode: Callable[[Tokenizer, str, str], tuple[list[int], ...]]
    # metric -> what each ending is worth, of its score and its length in characters
    metrics: dict[str, Callable[[Score, int], float]]


CONVENTIONS = {
    "lm_eval": Convention(
        as_lm_eval,
        encode_pair,
        {
            "acc": lambda score, _: score.loglikelihood,
            "acc_norm": lambda score, length: score.loglikelihood / length,
        },
    ),
    "token": Convention(
        as_it_is,
        encode_apart,
        {
            "acc_token": lambda score, _: score.loglikelihood,
            "acc_norm_token": lambda score, _: score.loglikelihood / score.tokens,
        },
    ),
}


# ---- the evaluation


@dataclass(frozen=True)
class Example:
    """A document's questions, one per convention, and the lengths that their metrics need."""

    label: int
    questions: dict[str, Question]
    lengths: dict[str, list[int]]


@dataclass(frozen=True)
class Result:
    """`metrics` by name, with `<name>_stderr`, `n` and `truncated` (examples with an ending before
    which the context was cut off); `examples` are the lines of the file."""

    metrics: dict[str, Any]
    examples: list[dict[str, Any]]


class HellaSwag:
    """The examples, tokenized once; evaluates any number of models.

    Args:
        documents: HellaSwag's rows, in its order.
        conventions: names of CONVENTIONS.
        shots: number of documents that are answered in front of each question, drawn from
            `drawn_from` as lm-evaluation-harness draws them.
        among_them: the documents are themselves in `drawn_from`: none is its own example.

    Raises ValueError for documents that are not HellaSwag's.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        tokenizer: Tokenizer,
        *,
        conventions: Sequence[str] = tuple(CONVENTIONS),
        shots: int = 0,
        drawn_from: Sequence[Document] = (),
        among_them: bool = False,
    ) -> None:
        for number, document in enumerate(documents):
            check(document, number)
        self.conventions = tuple(conventions)
        drawn = draw(documents, drawn_from, shots, among_them)
        self.examples = [
            self._example(document, before, tokenizer)
            for document, before in zip(documents, drawn, strict=True)
        ]

    def _example(
        self, document: Document, before: Sequence[Document], tokenizer: Tokenizer
    ) -> Example:
        questions, lengths = {}, {}
        for name in self.conventions:
            convention = CONVENTIONS[name]
            shown = [(convention.render(each), int(each["label"])) for each in before]
            prefix = "".join(f"{r.context}{r.endings[answer]}\n\n" for r, answer in shown)
            rendered = convention.render(document)
            pairs = [
                convention.encode(tokenizer, prefix + rendered.context, ending)
                for ending in rendered.endings
            ]
            questions[name] = Question(pairs[0][0], [ending for _, ending in pairs])
            lengths[name] = rendered.lengths
        return Example(int(document["label"]), questions, lengths)

    def evaluate(
        self,
        model: GPT2,
        device: Device,
        processes: Processes | None = None,
        *,
        batch_tokens: int | None = None,
        compile: bool = False,
        progress: bool = True,
    ) -> Result:
        """All processes take part, and get the same result, whatever their number."""
        scorer = Scorer(
            model, device, batch_tokens=batch_tokens, compile=compile, processes=processes
        )
        asked = [e.questions[name] for e in self.examples for name in self.conventions]
        found = iter(scorer.scores(asked, label="HellaSwag", progress=progress))
        lines = [
            self._line(number, example, {name: next(found) for name in self.conventions})
            for number, example in enumerate(self.examples)
        ]
        n = len(lines)
        metrics: dict[str, Any] = {}
        for name in self.conventions:
            for metric in CONVENTIONS[name].metrics:
                share = sum(line["choice"][metric] == line["label"] for line in lines) / n
                metrics[metric] = share
                metrics[f"{metric}_stderr"] = standard_error(share, n)
        metrics["n"] = n
        metrics["truncated"] = sum(line["truncated"] for line in lines)
        return Result(metrics, lines)

    def _line(
        self, number: int, example: Example, scores: dict[str, list[Score]]
    ) -> dict[str, Any]:
        choice, logs, tokens = {}, {}, {}
        for name, endings in scores.items():
            for metric, worth in CONVENTIONS[name].metrics.items():
                pairs = zip(endings, example.lengths[name], strict=True)
                values = [worth(score, length) for score, length in pairs]
                choice[metric] = values.index(max(values))  # the first of equals, as numpy's argmax
            logs[name] = [score.loglikelihood for score in endings]
            tokens[name] = [score.tokens for score in endings]
        return {
            "example": number,
            "label": example.label,
            "choice": choice,
            "loglikelihood": logs,
            "tokens": tokens,
            "truncated": any(score.truncated for all in scores.values() for score in all),
        }


def standard_error(share: float, n: int) -> float:
    """Of a share of n independent examples; nan for one."""
    return math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else math.nan


def check(document: Document, number: int) -> None:
    """Raise ValueError for what is no labelled row of HellaSwag."""
    if missing := [key for key in KEYS if key not in document]:
        raise ValueError(f"example {number} has no {missing[0]}: expected HellaSwag's rows")
    endings, label = document["endings"], str(document["label"])
    if len(endings) != 4 or label not in {"0", "1", "2", "3"}:
        raise ValueError(
            f"example {number} has {len(endings)} endings and label {label!r}: expected four and 0 "
            f"to 3 (the test split has no labels: use the validation split)"
        )
    if not all(map(clean, endings)):
        raise ValueError(f"example {number} has an empty ending")


def draw(
    documents: Sequence[Document], drawn_from: Sequence[Document], shots: int, among_them: bool
) -> list[list[Document]]:
    """The documents in front of each, in lm-evaluation-harness's order of random numbers."""
    pool, random = list(drawn_from), Random(FEWSHOT_SEED)
    wanted = shots + (among_them and shots > 0)  # one more, in case one is the document itself
    if len(pool) < wanted:
        raise ValueError(f"fewshot={shots}, but there are {len(pool)} examples to draw from")
    drawn = [random.sample(pool, wanted) for _ in documents]
    return [
        [each for each in some if not among_them or each != document][:shots]
        for document, some in zip(documents, drawn, strict=True)
    ]


# ---- inside training


class DuringTraining:
    """`eval.hellaswag` of a run: built, and everything checked, before the first step.

    Raises ValueError or OSError for what cannot be evaluated.
    """

    def __init__(self, config: HellaSwagConfig, train: TrainConfig, tokenizer: Tokenizer) -> None:
        self.interval, self.last = config.every * train.eval_every, train.steps
        self.task: HellaSwag | None = None
        if not self.interval:
            return
        if isinstance(tokenizer, Bytes):
            raise ValueError(
                "eval.hellaswag with data.tokenizer=bytes: an ending would not fit in the context; "
                "set data.tokenizer=gpt2 or eval.hellaswag.every=0"
            )
        documents = read_documents(
            config.data_file, HUB, "validation", config.limit, "eval.hellaswag.data_file"
        )
        self.task = HellaSwag(documents, tokenizer, conventions=("lm_eval",))

    def metrics(
        self, step: int, model: GPT2, device: Device, processes: Processes | None = None
    ) -> dict[str, float]:
        """For metrics.jsonl, empty at a step where none are due; the same on every process, and all
        of them take part. ``model`` is the network itself, not what torch.compile or DDP made of
        it."""
        if self.task is None or (step % self.interval and step != self.last):
            return {}
        found = self.task.evaluate(model, device, processes, progress=False).metrics
        return {
            "eval/hellaswag_acc_norm": found["acc_norm"],
            "eval/hellaswag_acc": found["acc"],
            "eval/hellaswag_acc_norm_stderr": found["acc_norm_stderr"],
        }


# ---- command line


@dataclass(frozen=True)
class Options:
    """What to evaluate, and on what."""

    checkpoint: str  # a run, a checkpoint of one, a Hugging Face folder or hub name
    data_file: str | None = None  # hellaswag_val.jsonl(.xz|.gz); null: the hub's validation split
    limit: int | None = None  # the first so many examples
    fewshot: int = 0  # answered examples in front of each question
    fewshot_file: str | None = None  # what they are drawn from; null: the hub's training split
    conventions: str = "lm_eval,token"
    out: str | None = None  # a file for the examples; null: RUN/eval, or eval_results/<name>
    device: str = "auto"  # cuda, mps or cpu
    precision: str = "fp32"  # bf16 is faster on a GPU, and is not lm-evaluation-harness's number
    compile: bool = False
    batch_tokens: int | None = None  # of a forward pass; null: by the kind of device


def run(options: Options) -> None:
    """Evaluate, save the examples, add the metrics to the run's eval.jsonl, print them."""
    from eval.checkpoint import append_results, find, load_model, open_device, results_folder

    conventions = options.conventions.split(",")
    for name in conventions:
        if name not in CONVENTIONS:
            raise ValueError(f"conventions={name}: expected some of {','.join(CONVENTIONS)}")
    processes = join()
    device = open_device(options.device, options.precision, processes.local_rank)
    model, tokenizer = load_model(options.checkpoint, device.device)
    documents = read_documents(options.data_file, HUB, "validation", options.limit, "data_file")
    pool: Sequence[Document] = ()
    if options.fewshot:
        pool = read_documents(options.fewshot_file, HUB, "train", None, "fewshot_file")
    task = HellaSwag(
        documents,
        tokenizer,
        conventions=conventions,
        shots=options.fewshot,
        drawn_from=pool,
        among_them=options.fewshot_file is not None and options.fewshot_file == options.data_file,
    )
    result = task.evaluate(
        model,
        device,
        processes,
        batch_tokens=options.batch_tokens,
        compile=options.compile,
    )
    if processes.first:
        place = find(options.checkpoint)
        step = "" if place is None else f"_{place.folder.name}"
        shots = f"_{options.fewshot}shot" if options.fewshot else ""
        default = results_folder(options.checkpoint) / f"hellaswag{shots}{step}.jsonl"
        out = default if options.out is None else Path(options.out).expanduser()
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(out, "".join(json.dumps(line) + "\n" for line in result.examples))
        values = {f"eval/hellaswag{shots}_{key}": v for key, v in result.metrics.items()}
        append_results(options.checkpoint, {**values, "options": asdict(options)})
        print(table(result.metrics))
        print(f"examples in {out}")
        print(json.dumps(json_safe(result.metrics)))
    processes.leave()


def table(metrics: dict[str, Any]) -> str:
    lines = [
        f"{name:<16}{metrics[name]:.4f} +- {metrics[f'{name}_stderr']:.4f}"
        for convention in CONVENTIONS.values()
        for name in convention.metrics
        if name in metrics
    ]
    cut = f", {metrics['truncated']} cut off on the left" if metrics["truncated"] else ""
    return "\n".join([*lines, f"{metrics['n']} examples{cut}"])


if __name__ == "__main__":
    sys.exit(run_with_options(Options, run, __doc__))
