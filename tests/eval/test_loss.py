"""The validation loss is the mean over tokens, whatever the batch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from data import DataConfig
from data.prepare import prepare
from data.shards import Split, open_split
from eval.loss import Validation
from model import GPT2, GPT2Config
from runtime.device import Device

CONTEXT = 16


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


CPU = Device(torch.device("cpu"), "fp32", torch.amp.GradScaler("cpu", enabled=False))


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


def test_every_target_counts_once(split: Split) -> None:
    validation = Validation(split, CONTEXT, None, rows=4)
    assert validation.tokens == (len(split) - 1) // CONTEXT * CONTEXT
    assert Validation(split, CONTEXT, 5 * CONTEXT, rows=4).tokens == 5 * CONTEXT
