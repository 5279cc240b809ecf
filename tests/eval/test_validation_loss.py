"""The validation loss is the mean over tokens, whatever the batch and the number of processes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from system import Command, here, module
from torch import Tensor, nn
from torch.nn import functional as F

from data import DataConfig
from data.documents import document_numbers
from data.preparation import prepare
from data.shards import Split, open_split
from eval.checkpoint import open_device
from eval.loss import Options, Validation, run
from eval.options import run_with_options
from model import GPT2, GPT2Config
from model.document_mask import WithDocuments
from runtime.processes import Processes

CONTEXT = 16
CPU = open_device("cpu", "fp32")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("".join(f"line {i} of a text\n" for i in range(400)))
    config = DataConfig(source="text", files=[str(folder / "a.txt")], cache=str(folder / "cache"))
    return open_split(prepare(config), "val")


@pytest.fixture(scope="module")
def model() -> GPT2:
    torch.manual_seed(0)
    return GPT2(
        GPT2Config(n_layer=1, n_head=2, n_embd=16, context=CONTEXT, vocab_size=257, dropout=0.5)
    )


def test_equals_one_pass_over_all_windows(split: Split, model: GPT2) -> None:
    validation = Validation(split, CONTEXT, None, rows=5)
    windows = torch.stack(
        [torch.from_numpy(split.read(int(o), CONTEXT + 1)) for o in validation.offsets]
    )
    model.eval()
    with torch.no_grad():
        logits = model(windows[:, :-1])
    expected = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    model.train()
    assert validation.loss(model, CPU) == pytest.approx(expected.item(), rel=1e-6)
    assert model.training  # dropout was off meanwhile, or the losses would differ


@pytest.mark.parametrize("rows", [1, 3, 7, 1000])
def test_does_not_depend_on_the_batch(split: Split, model: GPT2, rows: int) -> None:
    a = Validation(split, CONTEXT, None, rows=4).loss(model, CPU)
    assert Validation(split, CONTEXT, None, rows=rows).loss(model, CPU) == pytest.approx(
        a, rel=1e-6
    )


class Replayed(nn.Module):
    """A model that gives every loss in the same memory, as a CUDA graph does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, torch.zeros(())

    def forward(self, *given: Any, **options: Any) -> Tensor:
        return self.loss.copy_(self.model(*given, **options))


def test_losses_are_kept_though_their_memory_is_used_again(split: Split, model: GPT2) -> None:
    validation = Validation(split, CONTEXT, None, rows=5)
    assert validation.loss(Replayed(model), CPU) == validation.loss(model, CPU)


def test_every_target_counts_once(split: Split) -> None:
    validation = Validation(split, CONTEXT, None, rows=4)
    assert validation.tokens == (len(split) - 1) // CONTEXT * CONTEXT
    assert Validation(split, CONTEXT, 5 * CONTEXT, rows=4).tokens == 5 * CONTEXT


class Alone(Processes):
    """One of many processes, by itself: it keeps what it would send."""

    def gather(self, value: Any) -> list[Any]:
        self.sent = value
        return [value]


@pytest.mark.parametrize("size", [2, 3, 7, 50])
def test_shares_of_many_processes_are_the_whole(split: Split, model: GPT2, size: int) -> None:
    """Each makes as many passes as any other, and their sums add up to the last bit."""
    validation = Validation(split, CONTEXT, None, rows=4)
    expected = validation.loss(model, CPU)
    sent = []
    for rank in range(size):
        alone = Alone(rank, size)
        validation.loss(model, CPU, alone)
        sent.append(alone.sent)
    assert len({len(values) for values in sent}) == 1
    assert math.fsum(value for values in sent for value in values) / validation.tokens == expected


def test_masked_documents_are_masked_here_too(split: Split, model: GPT2) -> None:
    def documents(tokens: torch.Tensor) -> torch.Tensor:
        return document_numbers(tokens, ord("\n"))

    validation = Validation(split, CONTEXT, None, rows=4)
    masked = WithDocuments(model, documents, "cpu", dropout=0.0)
    inputs = torch.stack(
        [torch.from_numpy(split.read(int(o), CONTEXT + 1)) for o in validation.offsets]
    )
    model.eval()
    with torch.no_grad():
        expected = model(inputs[:, :-1], inputs[:, 1:], documents=documents(inputs[:, :-1]))
    model.train()
    assert validation.loss(masked, CPU) == pytest.approx(expected.item(), rel=1e-6)
    assert validation.loss(masked, CPU) != validation.loss(model, CPU)


# ---- the command


@pytest.fixture
def trained(tiny: Command) -> tuple[Path, float]:
    """A finished run that evaluated its whole validation split, and its loss."""
    outcome = here(*tiny, "train.eval_tokens=null")
    return outcome.dir, outcome.result["val_loss"]


def test_of_a_run_is_what_the_run_said(
    trained: tuple[Path, float], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, loss = trained
    words = [f"checkpoint={run_dir}", "device=cpu", "rows=3"]
    assert run_with_options(Options, run, None, words) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["loss"] == pytest.approx(loss, rel=1e-6)
    assert printed["perplexity"] == pytest.approx(math.exp(printed["loss"]))
    summary = json.loads((run_dir / "summary.json").read_text())
    assert printed["bits_per_byte"] == pytest.approx(summary["val_bits_per_byte"], rel=1e-6)
    [line] = [json.loads(line) for line in (run_dir / "eval.jsonl").read_text().splitlines()]
    assert (line["step"], line["tokens"]) == (summary["step"], summary["tokens"])
    assert line["eval/val_loss"] == printed["loss"]


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same(trained: tuple[Path, float]) -> None:
    words = (f"checkpoint={trained[0]}", "device=cpu", "rows=2")
    printed = set()
    for processes in (1, 2):
        done = module("eval.loss", *words, folder=Path.cwd(), ranks=processes)
        assert done.code == 0, done.err
        printed.add(done.out.splitlines()[-1])
    assert len(printed) == 1


def test_what_has_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"checkpoint={tmp_path}/nowhere"]
    assert run_with_options(Options, run, None, words) == 1
    assert "nowhere does not exist: expected" in capsys.readouterr().err
