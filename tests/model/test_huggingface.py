"""Hugging Face both ways: the same numbers, the same function, and one clear line otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from weights import TINY, batch, random_model

from eval.generate import generate
from model import GPT2, GPT2Config
from model.huggingface import from_huggingface, to_huggingface

WTE = "transformer.wte.weight"
EOT = TINY.vocab_size - 1


def export(model: GPT2, folder: Path, **options: Any) -> Path:
    folder.mkdir()
    to_huggingface(model, folder, eot=EOT, **options)
    return folder


def theirs(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def zero_spare_rows(model: GPT2) -> GPT2:
    """As training leaves the rows of masked padding."""
    with torch.no_grad():
        model.transformer.wte.weight[model.config.vocab_size :] = 0
    return model.eval()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"bias": False},
        {"scale_attn_by_inverse_layer_idx": True, "exact_gelu": True},
        {"vocab_multiple": 64, "dropout": 0.1},
        {"bias": False, "scale_attn_by_inverse_layer_idx": True, "vocab_multiple": 64},
    ],
    ids=str,
)
def test_round_trip(tmp_path: Path, change: dict[str, Any]) -> None:
    model = zero_spare_rows(random_model(replace(TINY, **change)))
    friend = theirs(export(model, tmp_path / "ours"))
    tokens, _ = batch(TINY)
    torch.testing.assert_close(friend(tokens).logits, model(tokens), rtol=0, atol=1e-4)

    friend.save_pretrained(tmp_path / "theirs")
    settings = {key: value for key, value in change.items() if key in ("vocab_multiple", "dropout")}
    back = from_huggingface(tmp_path / "theirs", **settings)
    assert back.config == model.config and not back.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize("inverse_layer", [False, True])
def test_greedy_text_is_theirs_token_by_token(tmp_path: Path, inverse_layer: bool) -> None:
    config = replace(TINY, scale_attn_by_inverse_layer_idx=inverse_layer, vocab_multiple=64)
    model = zero_spare_rows(random_model(config))
    friend = theirs(export(model, tmp_path / "it"))
    prompt = batch(TINY)[0][:, :3]
    new = config.context - prompt.size(1)
    text = friend.generate(
        prompt, do_sample=False, max_new_tokens=new, min_new_tokens=new, eos_token_id=None
    )
    assert torch.equal(generate(model, prompt, new, temperature=0), text)
    assert len(text[:, 3:].unique()) > 4  # it does say something


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "width"), [(12, 768), (16, 1024), (20, 1280), (25, 1600)])
def test_published_sizes_at_two_layers(tmp_path: Path, heads: int, width: int) -> None:
    config = GPT2Config(2, heads, width, 1024, 50257, vocab_multiple=64)
    torch.manual_seed(0)
    model = GPT2(config).eval()
    friend = theirs(export(model, tmp_path / "it"))
    tokens = torch.randint(50257, (1, 256))
    with torch.no_grad():
        torch.testing.assert_close(friend(tokens).logits, model(tokens), rtol=0, atol=1e-4)
    text = friend.generate(tokens[:, :8], do_sample=False, max_new_tokens=8, eos_token_id=None)
    assert torch.equal(generate(model, tokens[:, :8], 8, temperature=0), text)


@pytest.mark.slow
def test_theirs_in_several_files_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2(GPT2Config(2, 12, 768, 1024, 50257, vocab_multiple=64))
    friend = theirs(export(model, tmp_path / "it"))
    friend.save_pretrained(tmp_path / "theirs", max_shard_size="100MB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    back = from_huggingface(tmp_path / "theirs", vocab_multiple=64)
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_folded_attention_scale_is_the_same_function(tmp_path: Path) -> None:
    model = random_model(replace(TINY, scale_attn_by_inverse_layer_idx=True)).eval()
    friend = theirs(export(model, tmp_path / "it", fold_attention_scale=True))
    # What vLLM's GPT-2 asserts of a configuration, and how it finds the tensors.
    for option in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        assert getattr(friend.config, option) is False
    assert friend.config.reorder_and_upcast_attn is False and friend.config.tie_word_embeddings
    names = load_file(tmp_path / "it" / "model.safetensors")
    assert all(name.startswith("transformer.") for name in names)
    tokens, _ = batch(TINY)
    torch.testing.assert_close(friend(tokens).logits, model(tokens), rtol=0, atol=1e-4)


def test_ids_of_the_end_of_text(tmp_path: Path) -> None:
    friend = theirs(export(random_model(TINY), tmp_path / "it"))
    assert friend.generation_config.eos_token_id == friend.config.bos_token_id == EOT


# ---------------------------------------------------------------------------------- foreign folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as transformers writes it, without its 3 seconds of import."""
    return export(random_model(TINY), tmp_path / "foreign")


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_old_files(folder: Path) -> None:
    """OpenAI's weights as the hub has them: bare names, masks as buffers, n_ctx beside
    n_positions. And half precision."""

    def age(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name).half()
        mask = torch.ones(TINY.context, TINY.context).tril()[None, None]
        tensors |= {"h.0.attn.bias": mask, "h.0.attn.masked_bias": torch.tensor(-1e4)}

    before = from_huggingface(folder)
    edit_weights(folder, age)
    edit_config(folder, n_positions="gone", n_ctx=TINY.context, bias="gone")
    after = from_huggingface(folder)
    assert after.config == before.config == TINY
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor.half().float()), name


def test_untied_head_that_is_equal_is_tied(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t[WTE].clone()}))
    assert from_huggingface(folder).num_parameters() == random_model(TINY).num_parameters()


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def index_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "secret")
    index = {"weight_map": {WTE: "../secret"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: edit_config(f, model_type="llama"), "a model of type llama: expected gpt2"),
        (lambda f: edit_config(f, model_type="gone"), "a model of type None"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda f: edit_config(f, n_head="gone"), "config.json lacks n_head"),
        (lambda f: edit_config(f, activation_function="relu"), "activation_function is relu"),
        (lambda f: edit_config(f, layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06"),
        (lambda f: edit_config(f, scale_attn_weights=False), "scale_attn_weights is False"),
        (lambda f: edit_config(f, n_inner=99), "n_inner is 99, where a GPT-2 has 128"),
        (lambda f: edit_config(f, bias=False), r"no biases \(bias: false\), but .* is not zero"),
        (lambda f: edit_config(f, n_layer=2), "has transformer.h.2.attn.c_attn.bias and 11 other"),
        (lambda f: edit_config(f, n_layer=4), "lacks transformer.h.3.attn.c_attn.bias and 11"),
        (lambda f: edit_config(f, n_positions=32), r"shape \(24, 32\), .* says \(32, 32\)"),
        (lambda f: edit_weights(f, lambda t: t.pop(WTE)), f"lacks {WTE}: expected"),
        (lambda f: edit_weights(f, lambda t: t.update({"score.weight": torch.ones(2)})), "score"),
        (lambda f: edit_weights(f, lambda t: t.update({WTE: t[WTE].int()})), "torch.int32"),
        (
            lambda f: edit_weights(f, lambda t: t.update({"lm_head.weight": t[WTE] + 1})),
            "not tied",
        ),
        (pickle_only, "as a pickle .*pytorch_model.bin.*save_pretrained"),
        (cut_off, "is not a whole safetensors file"),
        (index_elsewhere, "lists ../secret, which is not a file beside it"),
    ],
)
def test_refused(folder: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(folder)
    with pytest.raises(ValueError, match=message) as error:
        from_huggingface(folder)
    assert "\n" not in str(error.value)


def test_no_such_source(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a folder with config.json"):
        from_huggingface(folder / "nothing")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors"):
        from_huggingface(folder)
    (folder / "config.json").unlink()
    (folder / "checkpoints").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"is a run of this program.*eval.export checkpoint="
    ):
        from_huggingface(folder)


def test_a_hub_name_without_network_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"cannot be fetched from the hub") as error:
        from_huggingface("gpt2")
    assert "\n" not in str(error.value)
