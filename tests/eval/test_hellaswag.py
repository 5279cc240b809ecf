"""HellaSwag here is HellaSwag there, example by example: recorded answers of lm-evaluation-harness,
its live answers where it is installed, and a plain scorer for the token-mean convention."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lm_eval_tasks import GOLDENS, ROWS, hellaswag, tiny_model
from system import module
from torch.nn import functional as F
from workers import run

from data.tokenizer import get_tokenizer
from eval.checkpoint import load_model, open_device
from eval.documents import read_documents
from eval.hellaswag import DuringTraining, HellaSwag, Result, clean, run_with_options
from eval.hellaswag import Options as HellaSwagOptions
from eval.hellaswag import run as run_hellaswag
from eval.tokenizer_files import write_tokenizer
from model import GPT2
from model.huggingface import to_huggingface
from runtime.config import HellaSwagConfig
from runtime.processes import Processes

CPU = open_device("cpu", "fp32")
FEW = 20
NUMBERS = {"acc", "acc_norm", "acc_token", "acc_norm_token"}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return read_documents(str(ROWS), "", "", None, "data_file")


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    golden: dict[str, Any] = json.loads((GOLDENS / "lm_eval.json").read_text())
    return golden


@pytest.fixture(scope="module")
def model() -> GPT2:
    return tiny_model()


@pytest.fixture(scope="module")
def result(model: GPT2, rows: list[dict[str, Any]]) -> Result:
    """Of a few rows, in both conventions."""
    return HellaSwag(rows[:FEW], get_tokenizer("gpt2")).evaluate(model, CPU, progress=False)


def assert_equal_answers(
    result: Result, theirs: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """Log-likelihoods to 1e-3, both choices the same in every example, and counted alike."""
    answers = zip(result.examples, theirs["loglikelihood"], theirs["scored"], rows, strict=True)
    for line, logs, scored, row in answers:
        assert line["loglikelihood"]["lm_eval"] == pytest.approx(logs, abs=1e-3)
        per_character = [
            log / len(clean(ending)) for log, ending in zip(logs, row["endings"], strict=True)
        ]
        choices = [values.index(max(values)) for values in (logs, per_character)]
        assert [line["choice"][name] for name in ("acc", "acc_norm")] == choices
        assert [float(choice == int(row["label"])) for choice in choices] == scored
    for name in ("acc", "acc_norm"):
        assert result.metrics[name] == pytest.approx(theirs["metrics"][name], abs=1e-12)


def test_equals_lm_eval(model: GPT2, rows: list[dict[str, Any]], golden: dict[str, Any]) -> None:
    task = HellaSwag(rows, get_tokenizer("gpt2"), conventions=["lm_eval"])
    found = task.evaluate(model, CPU, progress=False)
    assert_equal_answers(found, golden["hellaswag"], rows)
    assert found.metrics["truncated"] > 0  # the context is 96


def test_examples_in_front(rows: list[dict[str, Any]], golden: dict[str, Any]) -> None:
    """Drawn as lm_eval draws them, and not the example itself."""
    task = HellaSwag(
        rows[:FEW],
        get_tokenizer("gpt2"),
        conventions=["lm_eval"],
        shots=2,
        drawn_from=rows[:FEW],
        among_them=True,
    )
    found = task.evaluate(tiny_model(context=512), CPU, progress=False)
    assert found.metrics["truncated"] < 3
    assert_equal_answers(found, golden["hellaswag_2shot"], rows[:FEW])


def plain_losses(model: GPT2, row: dict[str, Any]) -> tuple[list[float], list[float]]:
    """build-nanogpt's way, one ending at a time: the loss of its tokens, summed and mean."""
    tokenizer, most = get_tokenizer("gpt2"), model.config.context + 1
    sums, means = [], []
    for ending in row["endings"]:
        given, ids = tokenizer.encode(row["ctx"]), tokenizer.encode(" " + ending)
        tokens = torch.tensor([*given.tolist(), *ids.tolist()])[-most:]
        with torch.no_grad():
            logits = model(tokens[None, :-1])[0]
        losses = F.cross_entropy(logits, tokens[1:], reduction="none")[-len(ids) :]
        sums.append(losses.sum().item())
        means.append(losses.mean().item())
    return sums, means


def assert_equal_to_plain(model: GPT2, rows: list[dict[str, Any]], result: Result) -> None:
    """Of the token-mean convention: log-likelihoods, every choice, both accuracies."""
    right = {"acc_token": 0, "acc_norm_token": 0}
    apart = 0
    for row, line in zip(rows, result.examples, strict=True):
        sums, means = plain_losses(model, row)
        assert line["loglikelihood"]["token"] == pytest.approx([-s for s in sums], abs=1e-3)
        for name, values in (("acc_token", sums), ("acc_norm_token", means)):
            assert line["choice"][name] == values.index(min(values))
            right[name] += values.index(min(values)) == row["label"]
        apart += sums.index(min(sums)) != means.index(min(means))
    assert apart > len(rows) / 10  # the two do differ
    for name, count in right.items():
        assert result.metrics[name] == count / len(rows)


def test_token_mean_equals_a_plain_scorer(
    model: GPT2, rows: list[dict[str, Any]], result: Result
) -> None:
    assert_equal_to_plain(model, rows[:FEW], result)


def test_metrics(result: Result) -> None:
    metrics = result.metrics
    assert metrics["n"] == FEW
    for name in NUMBERS:
        p = metrics[name]
        assert metrics[f"{name}_stderr"] == pytest.approx((p * (1 - p) / (FEW - 1)) ** 0.5)


# ---- any number of processes, the same numbers


@pytest.fixture(scope="module")
def folder(model: GPT2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = get_tokenizer("gpt2")
    to_huggingface(model, folder, tokenizer.eot)
    write_tokenizer(tokenizer, folder, model.config.context)
    return folder


def evaluated(file: str, folder: str) -> Result:
    """On each of several processes."""
    world = dist.group.WORLD
    processes = Processes(dist.get_rank(), dist.get_world_size(), control=world)
    task = HellaSwag(read_documents(file, "", "", FEW, "file"), get_tokenizer("gpt2"))
    return task.evaluate(load_model(folder)[0], CPU, processes, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_processes_gives_the_same(size: int, folder: Path, result: Result) -> None:
    """To the last bit: metrics, and every log-likelihood."""
    for found in run(size, evaluated, str(ROWS), str(folder)):
        assert found == result


@pytest.mark.slow
def test_the_command_under_torchrun(folder: Path, result: Result, tmp_path: Path) -> None:
    words = (f"checkpoint={folder}", f"data_file={ROWS}", f"limit={FEW}", "device=cpu")
    done = module("eval.hellaswag", *words, "out=examples.jsonl", folder=tmp_path, ranks=2)
    assert done.result == result.metrics
    lines = (tmp_path / "examples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.examples


def test_the_command_prints_and_keeps_its_numbers(
    folder: Path,
    result: Result,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"checkpoint={folder}", f"data_file={ROWS}", f"limit={FEW}", "device=cpu"]
    assert run_with_options(HellaSwagOptions, run_hellaswag, None, words) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == pytest.approx(result.metrics)
    [file] = tmp_path.rglob("hellaswag.jsonl")
    assert [json.loads(line)["choice"] for line in file.read_text().splitlines()] == [
        line["choice"] for line in result.examples
    ]
    [line] = [json.loads(line) for line in (file.parent / "eval.jsonl").read_text().splitlines()]
    assert line["eval/hellaswag_acc_norm"] == printed["acc_norm"]


# ---- inside training, and mistakes


def test_during_training(model: GPT2, result: Result) -> None:
    task = during_training(ROWS, every=2)
    metrics = task.metrics(40, model.train(), CPU)  # every second evaluation, of every 20 steps
    assert model.training
    assert metrics["eval/hellaswag_acc_norm"] == result.metrics["acc_norm"]
    assert task.metrics(20, model, CPU) == {}
    assert task.metrics(50, model, CPU) == metrics  # the last step
    model.eval()
    assert during_training("no file is read", every=0).metrics(50, model, CPU) == {}


def during_training(file: Path | str, every: int = 1, tokenizer: str = "gpt2") -> DuringTraining:
    config = HellaSwagConfig(every=every, limit=FEW, data_file=str(file))
    train: Any = SimpleNamespace(eval_every=20, steps=50)
    return DuringTraining(config, train, get_tokenizer(tokenizer))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "data_file=.* has no rows"),
        ([{"ctx": "a"}], "example 0 has no activity_label"),
        ([{"label": ""}], "example 0 has 4 endings and label ''.*no labels"),
        ([{"endings": ["a"]}], "example 0 has 1 endings"),
        ([{"endings": ["a", "b", "c", "[x]"]}], "example 0 has an empty ending"),
    ],
)
def test_rows_that_cannot_be_evaluated(
    rows: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    whole = {"activity_label": "A", "ctx": "a b", "ctx_a": "a", "ctx_b": "b", "label": 0}
    whole["endings"] = ["a", "b", "c", "d"]
    file = tmp_path / "rows.jsonl"
    full = [row if "ctx" in row else {**whole, **row} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in full))
    with pytest.raises(ValueError, match=message):
        during_training(file)


def test_found_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.jsonl does not exist"):
        during_training(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="an ending would not fit"):
        during_training(ROWS, tokenizer="bytes")
    (tmp_path / "torn.jsonl").write_text('{"ctx": ')
    with pytest.raises(ValueError, match=r"torn.jsonl is not JSON lines"):
        during_training(tmp_path / "torn.jsonl")
    with pytest.raises(ValueError, match="fewshot=3, but there are 1 examples"):
        rows = read_documents(str(ROWS), "", "", 1, "data_file")
        HellaSwag(rows, get_tokenizer("gpt2"), shots=3, drawn_from=rows)


# ---- live


def trained(rows: list[dict[str, Any]]) -> GPT2:
    """A model that has read the contexts for a few steps; LM_EVAL_CHECKPOINT names another."""
    if (source := os.environ.get("LM_EVAL_CHECKPOINT")) is not None:
        return load_model(source)[0]
    text = get_tokenizer("gpt2").encode(" ".join(row["ctx"] for row in rows)).astype("int64")
    model = tiny_model(1, context=256).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(40):
        start = 100 * step % (len(text) - 257)
        tokens = torch.from_numpy(text[start : start + 257])[None]
        optimizer.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    with torch.no_grad():
        model.transformer.wte.weight[model.config.vocab_size :] = 0
    return model.eval()


@pytest.mark.slow
def test_equals_lm_eval_live(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    """LM_EVAL_ROWS=hellaswag_val.jsonl.xz compares 1,000 rows of that file instead of these 100. A
    random model's answers are among the recorded ones."""
    for package in ("lm_eval", "accelerate"):
        pytest.importorskip(package, reason=f"{package} is not installed (requirements-eval.txt)")
    from lm_eval.tasks.hellaswag.utils import preprocess

    from eval.harness import quiet_lm_eval
    from scripts.bench_hellaswag import LmEval

    for text in (" How to [title] Do it. [step] First  a. ", "[header]  x", "a [title] b [title]"):
        assert clean(text) == preprocess(text)  # also where its own rule leaves spaces behind
    if (file := os.environ.get("LM_EVAL_ROWS")) is not None:
        rows = read_documents(file, "", "", None, "LM_EVAL_ROWS")[::10][:1000]
    model = trained(rows)
    with quiet_lm_eval():
        theirs = hellaswag(LmEval(model, tmp_path), rows)
    found = HellaSwag(rows, get_tokenizer("gpt2")).evaluate(model, CPU, progress=False)
    assert_equal_answers(found, theirs, rows)
    assert_equal_to_plain(model, rows, found)
