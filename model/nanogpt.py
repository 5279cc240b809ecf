"""nanoGPT's `ckpt.pt`, weights only.

The file is a pickle, of which torch's `weights_only` reader takes tensors and plain values and
nothing that runs. nanoGPT says `block_size` for the context and counts padding rows as tokens (its
GPT-2 has 50304, all of them in the softmax); the names and the layout are ours. Its GELU is the
exact one. The MARS code, whose checkpoints have the same form with one key more, uses the tanh.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from model.gpt2 import GPT2
from model.pretrained import WTE, Pretrained, build

REQUIRED = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size"}
OF_MARS = "scale_attn_by_inverse_layer_idx"
# nanoGPT's default, "GPT-2 vocab_size of 50257, padded up to nearest multiple of 64".
PADDED_GPT2 = {"vocab_size": 50257, "vocab_multiple": 64, "mask_padding": False}


def from_nanogpt(path: str | Path, **settings: Any) -> GPT2:
    """The model of a `ckpt.pt`, on the CPU, in evaluation mode; see `pretrained.build`.

    50304 rows are taken for GPT-2's 50257 tokens and padding, and compute what nanoGPT computes.
    """
    pretrained = read_nanogpt(path)
    padded = PADDED_GPT2 if pretrained.shape["vocab_size"] == 50304 else {}
    return build(pretrained, {**padded, **settings})


def read_nanogpt(path: str | Path) -> Pretrained:
    """The weights of a `ckpt.pt`. Raises ValueError for what is no checkpoint of nanoGPT."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError:
        raise ValueError(
            f"{path} holds more than weights and plain values, and reading it could run code: "
            f"expected a ckpt.pt as nanoGPT writes it"
        ) from None
    except (RuntimeError, EOFError) as error:  # cut off, or no file of torch.save
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as a checkpoint ({reason})") from None
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise ValueError(f"{path} is no checkpoint of nanoGPT: expected `model` and `model_args`")
    args = content["model_args"]
    if missing := REQUIRED - args.keys():
        raise ValueError(f"{path}: model_args lack {', '.join(sorted(missing))}")
    if unknown := args.keys() - REQUIRED - {"dropout", OF_MARS}:
        raise ValueError(
            f"{path}: model_args have {', '.join(sorted(unknown))}, which nanoGPT's GPT-2 has not"
        )
    shape = {key: args[key] for key in ("n_layer", "n_head", "n_embd", "bias", "vocab_size")}
    shape |= {"context": args["block_size"], "exact_gelu": OF_MARS not in args}
    shape[OF_MARS] = bool(args.get(OF_MARS, False))
    return Pretrained(str(path), shape, lambda: _tensors(content["model"], str(path)))


def _tensors(saved: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    # torch.compile puts its prefix before every name; DDP's appears in checkpoints of forks.
    names = {name: name.removeprefix("_orig_mod.").removeprefix("module.") for name in saved}
    tensors = {
        new: saved[name] for name, new in names.items() if not new.endswith(".attn.bias")
    }  # the causal mask of nanoGPT without flash attention is called so
    head = tensors.pop("lm_head.weight", None)
    if head is not None and WTE in tensors and not torch.equal(head, tensors[WTE]):
        raise ValueError(f"{source}: its head is not tied to its embedding, as a GPT-2's is")
    return tensors
