"""What is loaded is what was trained, by every name it may be given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from system import TINY, Command, checkpoints, here

from data.tokenizer import Bytes, FromFile, Gpt2, get_tokenizer
from eval.checkpoint import append_results, find, load_model, open_device, results_folder
from eval.tokenizer_files import write_tokenizer
from model import GPT2, GPT2Config
from model.huggingface import to_huggingface
from runtime import checkpoint


@pytest.fixture(scope="module")
def finished(corpus: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return here(*TINY, *corpus, f"run.dir={tmp_path_factory.mktemp('finished')}/run").dir


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


def test_a_run_is_its_last_checkpoint(run: Path) -> None:
    model, tokenizer = load_model(run)
    saved, _ = checkpoint.load(checkpoints(run)[-1])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[f"model.{name}"])
    assert isinstance(tokenizer, Bytes) and not model.training
    place = find(run)
    assert place is not None and place.folder == checkpoints(run)[-1]
    assert (place.meta["step"], place.config["model"]["n_embd"]) == (8, 32)


def test_an_earlier_checkpoint(run: Path) -> None:
    early = checkpoints(run)[0]
    model, _ = load_model(early)
    saved, meta = checkpoint.load(early)
    assert meta["step"] == 4
    assert torch.equal(model.transformer.wte.weight, saved["model.transformer.wte.weight"])


def test_of_schedule_free_optimizers_the_averages(tiny: Command) -> None:
    """They are what the run's losses are of, and what is to be published."""
    run = here(*tiny, "optim=schedule_free_adamw").dir
    model, _ = load_model(run)
    saved, _ = checkpoint.load(checkpoints(run)[-1])
    name = "transformer.h.0.mlp.c_fc.weight"
    assert not torch.equal(model.get_parameter(name), saved[f"model.{name}"])


@pytest.mark.parametrize(
    ("name", "kind"), [("gpt2", FromFile), ("bytes", FromFile)], ids=["gpt2", "bytes"]
)
def test_a_hugging_face_folder(name: str, kind: type, tmp_path: Path) -> None:
    tokenizer = get_tokenizer(name)
    torch.manual_seed(0)
    model = GPT2(GPT2Config(1, 2, 16, context=8, vocab_size=tokenizer.vocab_size)).eval()
    to_huggingface(model, tmp_path, tokenizer.eot)
    write_tokenizer(tokenizer, tmp_path, 8)
    loaded, found = load_model(tmp_path)
    ids = torch.tensor([found.encode("It is.").tolist()])
    assert torch.equal(loaded(ids), model(ids))
    assert isinstance(found, kind) and found.eot == tokenizer.eot
    assert ids[0].tolist() == tokenizer.encode("It is.").tolist()
    (tmp_path / "tokenizer.json").unlink()
    if name == "gpt2":  # 50257 rows can be nothing else
        assert isinstance(load_model(tmp_path)[1], Gpt2)
    else:
        with pytest.raises(ValueError, match=r"has no tokenizer\.json, and its 257 tokens"):
            load_model(tmp_path)


def test_what_cannot_be_loaded(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: expected"):
        load_model(tmp_path / "nowhere")
    last = checkpoints(run)[-1]
    stray = tmp_path / "a" / "checkpoints" / last.name
    stray.parent.mkdir(parents=True)
    last.rename(stray)
    with pytest.raises(ValueError, match="lies in no run"):
        load_model(stray)
    for folder in checkpoints(run):
        (folder / "tensors.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        load_model(run)
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        load_model(checkpoints(run)[0])


@pytest.mark.parametrize(
    ("name", "precision", "message"),
    [
        ("cpu", "fp8", "precision=fp8: expected one of fp32, bf16, fp16"),
        ("gpu", "fp32", "device=gpu: "),
    ],
)
def test_devices(name: str, precision: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_device(name, precision)


def test_results_are_kept_beside_the_metrics(run: Path) -> None:
    for value in (1.5, float("nan")):
        assert append_results(run, {"eval/x": value}) == run / "eval.jsonl"
    lines = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert [line["eval/x"] for line in lines] == [1.5, None]
    assert lines[0]["step"] == 8 and lines[0]["checkpoint"] == "step_00000008"
    assert lines[0]["tokens"] == 8 * 4 * 32
    assert results_folder(run) == run / "eval"
    assert results_folder("user/name") == Path("eval_results/user_name")
