"""A run becomes a folder that others read, and a text that we write is theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from system import Command, here, module

from eval.checkpoint import load_model
from eval.export import Options, run
from eval.generate import Options as Generation
from eval.generate import run as write


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Command) -> Path:
    """A run of 8 steps on bytes, with padding rows and the MARS code's attention."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    tiny = [f"model.{size}" for size in ("n_layer=2", "n_head=2", "n_embd=32", "context=32")]
    switches = ["model.scale_attn_by_inverse_layer_idx=true", "model.bias=false"]
    train = ["steps=8", "global_batch=4", "eval_every=4", "eval_tokens=640", "checkpoint_every=4"]
    train += ["sample_tokens=0", "device=cpu", "threads=1"]
    done = here(
        *tiny, *switches, *corpus, *(f"train.{t}" for t in train), f"run.dir={folder}",
        "logging.picture=false",
    )  # fmt: skip
    assert done.code == 0, done.err
    return folder


def test_the_folder_is_the_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "exported"
    run(Options(str(trained), str(out)))
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    ours, tokenizer = load_model(trained)
    ours.eval()
    assert said == {"dir": str(out), "parameters": ours.num_parameters(), "upload": None}
    assert {file.name for file in out.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = AutoTokenizer.from_pretrained(out)("def main():\n", return_tensors="pt").input_ids
    assert ids[0].tolist() == tokenizer.encode("def main():\n").tolist()
    torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=0, atol=1e-4)

    again, _ = load_model(out)  # our own commands read the folder too
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name][: len(tensor)]), name


def test_the_card_says_how_it_was_trained_and_no_paths(trained: Path, tmp_path: Path) -> None:
    run(Options(str(trained), str(tmp_path / "it")))
    card = (tmp_path / "it" / "README.md").read_text()
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"| val/loss | {last['val/loss']:.6g} |" in card
    for said in ('optim.name: "adamw"', 'data.tokenizer: "bytes"', "no biases", "vLLM", "cut"):
        assert said in card, said
    assert str(trained.parent) not in card and str(Path.home()) not in card


def test_an_earlier_checkpoint_has_its_own_results(trained: Path, tmp_path: Path) -> None:
    run(Options(str(trained / "checkpoints" / "step_00000004"), str(tmp_path / "it")))
    card = (tmp_path / "it" / "README.md").read_text()
    losses = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    [loss] = [line["val/loss"] for line in losses if line["step"] == 4]
    assert "| step | 4 |" in card and f"| val/loss | {loss:.6g} |" in card


def test_what_is_there_is_not_overwritten(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("something")
    with pytest.raises(ValueError, match="is not empty: choose a new folder"):
        run(Options(str(trained), str(tmp_path)))
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_an_upload_that_fails_leaves_the_export(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"upload=not/a/name failed .* is whole in"):
        run(Options(str(trained), str(tmp_path / "it"), upload="not/a/name"))
    assert (tmp_path / "it" / "model.safetensors").is_file()


@pytest.mark.parametrize("stream", [True, False])
def test_samples_are_written_the_same_at_once_or_as_they_come(
    trained: Path, capsys: pytest.CaptureFixture[str], stream: bool
) -> None:
    how: dict[str, Any] = {"prompt": "é def", "tokens": 40, "samples": 2, "device": "cpu"}
    write(Generation(str(trained), **how, stream=stream))
    first = capsys.readouterr()
    write(Generation(str(trained), **how))
    assert capsys.readouterr().out == first.out
    assert first.out.count("é def") == 2 and "---- sample 2 of 2" in first.out
    assert "beyond 32 tokens, the model's context, the window slides" in first.err


@pytest.mark.slow
def test_the_commands(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "it"
    exported = module("eval.export", f"checkpoint={trained}", f"out={out}", folder=tmp_path)
    assert exported.result["dir"] == str(out)
    for source in (trained, out):
        words = (f"checkpoint={source}", "prompt=def", "temperature=0")
        done = module("eval.generate", *words, folder=tmp_path)
        assert done.code == 0 and done.out.startswith("def"), done.err
    for name, *words in (
        ("eval.export", f"checkpoint={trained}", f"out={out}"),
        ("eval.export", "import"),
        ("eval.generate", "checkpoint=/nowhere"),
        ("eval.generate", f"checkpoint={out}", "top_p=2"),
    ):
        assert module(name, *words, folder=tmp_path).error


@pytest.mark.slow
def test_the_pipeline_writes_what_we_write(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import pipeline

    run(Options(str(trained), str(tmp_path / "it")))
    capsys.readouterr()
    write(Generation(str(trained), prompt="def ", tokens=20, temperature=0, device="cpu"))
    text = pipeline("text-generation", str(tmp_path / "it"))(
        "def ", do_sample=False, max_new_tokens=20
    )
    assert capsys.readouterr().out.startswith(text[0]["generated_text"])
