"""What the tests put to lm-evaluation-harness and to us: models, rows, and lm_eval's own tasks.

    python tests/eval/lm_eval_tasks.py hellaswag_val.jsonl.xz

records tests/goldens/eval anew, with the lm_eval that is installed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from eval.documents import read_documents
from eval.harness import quiet_lm_eval
from model import GPT2, GPT2Config
from scripts.bench_hellaswag import LmEval, hellaswag_task

GOLDENS = Path(__file__).resolve().parents[1] / "goldens" / "eval"
ROWS = GOLDENS / "hellaswag_100.jsonl"  # every 100th row of the validation split (MIT licence)


def tiny_model(seed: int = 0, context: int = 96) -> GPT2:
    """Far from initial values, where all endings are alike; with masked padding. A context that is
    too short for the longest examples."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT2(GPT2Config(2, 2, 32, context=context, vocab_size=50257, vocab_multiple=64))
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.transformer.wte.weight[50257:] = 0
    return model.eval()


# Written for these tests, in WikiText's spelling: spaces around punctuation, @-@ within words.
# Joined by line breaks they are a file of three articles.
PAGES = [
    " = The Lighthouse = \n \n The <unk> lighthouse , built in 1 @,@ 874 , is a well @-@ known "
    'landmark ; it stands ( as its keeper \'s notes say ) on " the last rock " of the coast . \n'
    " \n = = Keepers = = \n \n Its light is 21 @.@ 5 m above the sea : the keepers ' rooms are "
    "below . Who lived there ? Nobody knows ! In winter it is 3 ° colder . \n "
    + "The sea went on and the light went round , and the keeper wrote it down . "
    * 12,
    " = A Short Page = \n \n One sentence with a [ note ] and { braces } is all there is . \n ",
    " = Third = \n \n = = = Depth = = = \n \n " + "Rain fell on N roofs 's edge , again . " * 30,
]
PASSAGES = [
    "Anna looked for her umbrella in the hall, but it was raining and there was no umbrella",
    '"You said seven," he answered.\n\n"I said eight," she told him. "You never heard me say seven',
    "The train was late again, and the passengers on the platform waited for the train",
    "He counted the coins twice. There were nine of them, and on the table lay a tenth coin",
    "Nobody in the village had seen the fox, but everybody talked about the old red fox",
    "x y z",
    "over and over and over and over over over over over over over",
]


def wikitext_task() -> dict[str, Any]:
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    metrics = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    return {
        "task": "wikitext_here",
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": wikitext_detokenizer,
        "process_results": process_results,
        "metric_list": [{"metric": metric} for metric in metrics],
    }


def lambada_task() -> dict[str, Any]:
    return {
        "task": "lambada_here",
        "output_type": "loglikelihood",
        "test_split": "test",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    }


def metrics(results: Any) -> dict[str, float]:
    """The metrics of lm_eval's only task, by their short names."""
    [values] = results["results"].values()
    return {
        key.partition(",")[0]: value
        for key, value in values.items()
        if "," in key and "stderr" not in key
    }


def hellaswag(lm_eval: LmEval, rows: list[dict[str, Any]], shots: int = 0) -> dict[str, Any]:
    """lm_eval's metrics, and per example its log-likelihoods and what it scored (acc, acc_norm)."""
    task = hellaswag_task()
    if shots:  # so lm_eval knows that what it draws from is what it asks
        task |= {"test_split": "validation", "fewshot_split": "validation"}
    results = lm_eval(
        lm_eval.local(task, "validation", rows), 8, shots=shots or None, log_samples=True
    )
    [samples] = results["samples"].values()
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    return {
        "metrics": metrics(results),
        "loglikelihood": [[answer[0] for answer in s["filtered_resps"]] for s in samples],
        "scored": [[s["acc"], s["acc_norm"]] for s in samples],
    }


def perplexities(lm_eval: LmEval) -> dict[str, dict[str, float]]:
    pages = lm_eval.local(wikitext_task(), "test", [{"page": page} for page in PAGES])
    passages = lm_eval.local(lambada_task(), "test", [{"text": text} for text in PASSAGES])
    return {
        "wikitext": metrics(lm_eval(pages, 4)),
        "lambada": metrics(lm_eval(passages, 4)),
    }


def record(source: str) -> None:
    rows = read_documents(source, "", "", None, "file")[::100][:100]
    GOLDENS.mkdir(parents=True, exist_ok=True)
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as other,
        quiet_lm_eval(),
    ):
        lm_eval = LmEval(tiny_model(), Path(folder))
        longer = LmEval(tiny_model(context=512), Path(other))
        golden = {
            "made_by": "lm_eval 0.4.13, HFLM in float32, on the export of tiny_model()",
            "hellaswag": hellaswag(lm_eval, rows),
            "hellaswag_2shot": hellaswag(longer, rows[:20], shots=2),
            **perplexities(lm_eval),
        }
    (GOLDENS / "lm_eval.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    record(sys.argv[1])
