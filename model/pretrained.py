"""Weights that somebody else trained, in our names and layout, and how they enter a GPT2.

`model/huggingface.py` and `model/nanogpt.py` read files into a `Pretrained`; whatever must be
checked before such weights can be used is checked here, once for all sources. A model and its
weights agree in everything that the weights determine; three things are the model's own choice:
the dropout, a context shorter than the pretrained one (its first positions are kept), and the
padding of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.gpt2 import GPT2, GPT2Config

# What weights determine of a GPT2Config, besides their context and vocabulary.
FIXED = ("n_layer", "n_head", "n_embd", "bias", "exact_gelu", "scale_attn_by_inverse_layer_idx")
SHAPE = (*FIXED, "context")  # what `model=pretrained` takes from its source
PADDINGS = (1, 8, 16, 32, 64, 128, 256, 512)  # multiples to which others round the vocabulary up
WTE, WPE = "transformer.wte.weight", "transformer.wpe.weight"


@dataclass(frozen=True)
class Pretrained:
    """Somebody's GPT-2. `shape` has the keys of SHAPE and `vocab_size`, the rows of the embedding;
    `read` gives the tensors by our names, in `nn.Linear`'s layout (out x in), any float dtype."""

    source: str
    shape: Mapping[str, Any]
    read: Callable[[], dict[str, Tensor]]


def load_pretrained(model: GPT2, pretrained: Pretrained) -> None:
    """Copy the weights into `model`, in the model's dtype and on its device.

    Raises ValueError where model and weights disagree, or where tensors are missing, unexpected or
    of a wrong size; the model is unchanged then.
    """
    check_agreement(model.config, pretrained)
    tensors = pretrained.read()
    check_tensors(tensors, pretrained)
    config, rows = model.config, pretrained.shape["vocab_size"]
    live = config.live_vocab_size
    if live not in (config.vocab_size, rows):
        raise ValueError(
            f"model.mask_padding=false, but {pretrained.source} has {rows} rows of the embedding, "
            f"none for the spare ones up to {live}: set model.mask_padding=true, or "
            f"model.vocab_multiple=1"
        )
    wte = tensors[WTE]
    padded = wte.new_zeros(config.padded_vocab_size, config.n_embd)
    padded[:live] = wte[:live]
    model.load_state_dict({**tensors, WTE: padded, WPE: tensors[WPE][: config.context]})


def build(pretrained: Pretrained, settings: Mapping[str, Any]) -> GPT2:
    """A GPT2 on the CPU with these weights, in evaluation mode. `settings` are fields of GPT2Config
    that differ from the shape of the weights (dropout, context, vocab_size and its padding).

    Raises ValueError as `load_pretrained` does, TypeError for a field that does not exist.
    """
    with torch.device("meta"):  # nothing is drawn that would be overwritten
        model = GPT2(GPT2Config(**{**pretrained.shape, **settings}))
    model.to_empty(device="cpu")
    load_pretrained(model, pretrained)
    return model.eval()


def check_agreement(config: GPT2Config, pretrained: Pretrained) -> None:
    """Raise ValueError if a model of this config cannot take these weights."""
    source, shape = pretrained.source, pretrained.shape
    for key in FIXED:
        if (value := getattr(config, key)) != shape[key]:
            raise ValueError(
                f"model.{key} is {value}, but {source} has {shape[key]}: leave it out "
                f"(model=pretrained takes the shape from the weights)"
            )
    if config.context > shape["context"]:
        raise ValueError(
            f"model.context is {config.context}, but {source} has positions for {shape['context']} "
            f"tokens: expected that or less"
        )
    rows = shape["vocab_size"]
    if rows not in {-(-config.vocab_size // multiple) * multiple for multiple in PADDINGS}:
        raise ValueError(
            f"the model has {config.vocab_size} tokens, but {source} has {rows}: expected the "
            f"tokenizer that it was trained with (data.tokenizer=gpt2 for OpenAI's models)"
        )


def check_tensors(tensors: Mapping[str, Tensor], pretrained: Pretrained) -> None:
    """Raise ValueError unless these are exactly the tensors of a GPT-2 of the source's shape."""
    with torch.device("meta"):
        expected = GPT2(GPT2Config(**pretrained.shape)).state_dict()
    source = pretrained.source
    if missing := expected.keys() - tensors.keys():
        raise ValueError(f"{source} lacks {_some(missing)}: expected the weights of a whole GPT-2")
    if unexpected := tensors.keys() - expected.keys():
        raise ValueError(
            f"{source} has {_some(unexpected)}, which a GPT-2 with a language-model head has not"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, but its configuration says "
                f"{tuple(expected[name].shape)}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{source}: {name} holds {tensor.dtype}: expected float weights")


def _some(names: set[str]) -> str:
    first, *others = sorted(names)
    return first + (f" and {len(others)} other tensors" if others else "")
