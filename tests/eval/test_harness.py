"""lm-evaluation-harness on our model gives what its hf backend gives on the export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval_tasks import GOLDENS, PAGES, PASSAGES, ROWS, tiny_model
from system import module

from data.tokenizer import get_tokenizer
from eval.checkpoint import open_device
from eval.documents import read_documents
from eval.harness import SUITES, average, evaluate, table

CPU = open_device("cpu", "fp32")
REASON = "lm_eval is not installed (requirements-eval.txt)"

TASK_FILE = """\
task: own_task
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{answers}}}}"
doc_to_target: "{{{{right}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.mark.slow
def test_equals_the_hf_backend(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason=REASON)
    from lm_eval_tasks import hellaswag_task, lambada_task, wikitext_task

    golden = json.loads((GOLDENS / "lm_eval.json").read_text())

    def local(task: dict[str, Any], split: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        file = tmp_path / f"{task['task']}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        place = {"dataset_path": "json", "dataset_kwargs": {"data_files": {split: str(file)}}}
        return {**task, **place}

    tasks = [
        local(hellaswag_task(), "validation", read_documents(str(ROWS), "", "", None, "file")),
        local(wikitext_task(), "test", [{"page": page} for page in PAGES]),
        local(lambada_task(), "test", [{"text": text} for text in PASSAGES]),
    ]
    [results] = evaluate(tiny_model(), get_tokenizer("gpt2"), CPU, tasks, [0])
    for task in ("hellaswag", "wikitext", "lambada"):
        expected = golden[task].get("metrics", golden[task])
        for metric, value in expected.items():
            assert results[f"{task}_here"][metric] == pytest.approx(value, rel=1e-5)


@pytest.mark.slow
def test_generation_stops() -> None:
    pytest.importorskip("lm_eval", reason=REASON)
    from lm_eval.api.instance import Instance

    from eval.generate import generate
    from eval.harness_model import HarnessModel, before_first

    model, tokenizer = tiny_model(), get_tokenizer("gpt2")
    ids = tokenizer.encode("Rain fell").tolist()
    new = generate(model, torch.tensor([ids]), 6, temperature=0)[0, len(ids) :]
    text = tokenizer.decode(new.tolist())
    request = Instance("generate_until", {}, ("Rain fell", {"max_gen_toks": 6, "until": []}), 0)
    assert HarnessModel(model, tokenizer, CPU).generate_until([request]) == [text]
    assert before_first("one. two\nthree", ["\n", ". "]) == "one"
    assert before_first("one", ["\n"]) == "one"


@pytest.mark.slow
def test_a_task_file_of_ones_own_into_the_runs_record(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason=REASON)
    from eval.tokenizer_files import write_tokenizer
    from model.huggingface import to_huggingface

    folder, tasks = tmp_path / "exported", tmp_path / "tasks"
    folder.mkdir()
    tasks.mkdir()
    tokenizer, model = get_tokenizer("gpt2"), tiny_model()
    to_huggingface(model, folder, tokenizer.eot)
    write_tokenizer(tokenizer, folder, model.config.context)
    rows = [
        {"question": f"What is {a} and {a}?", "answers": ["two", "a pair of them"], "right": a % 2}
        for a in range(6)
    ]
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "own.yaml").write_text(TASK_FILE.format(file=tasks / "rows.jsonl"))
    words = (f"checkpoint={folder}", "tasks=own_task", f"include_path={tasks}", "fewshot=0,2")
    done = module("eval.harness", *words, "device=cpu", folder=tmp_path)
    printed = done.result
    assert printed.keys() >= {"eval/own_task_acc_0shot", "eval/own_task_acc_norm_2shot"}
    assert "0-shot" in done.out and "2-shot" in done.out
    [file] = tmp_path.rglob("eval.jsonl")
    assert json.loads(file.read_text()).items() >= printed.items()


def test_without_lm_eval_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.harness.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -r requirements-eval\.txt"):
        evaluate(tiny_model(), get_tokenizer("gpt2"), CPU, ["hellaswag"], [0])


@pytest.mark.slow
def test_names_of_tasks() -> None:
    pytest.importorskip("lm_eval", reason=REASON)
    assert len(set(SUITES["mars"])) == 9
    names = [*SUITES["mars"], "hellaswagg"]  # the first that is unknown is told
    with pytest.raises(ValueError, match="tasks=hellaswagg: lm_eval has no such task"):
        evaluate(tiny_model(), get_tokenizer("gpt2"), CPU, names, [0])


def test_table_and_average() -> None:
    zero = {"a": {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.25}, "b": {"acc": 0.75}}
    assert average(zero, ["a", "b"]) == 0.5
    assert average({"a": {"perplexity": 3.0}}, ["a"]) is None
    lines = table({0: zero, 5: zero}, ["a", "b"]).splitlines()
    assert lines[0].split() == ["task", "metric", "0-shot", "5-shot"]
    assert lines[1].split() == ["a", "acc", "0.5000", "+-", "0.1000", "0.5000", "+-", "0.1000"]
    assert lines[-1].split() == ["average", "0.5000", "0.5000"]
