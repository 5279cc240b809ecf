"""Hugging Face both ways: transformers' `GPT2LMHeadModel` folders and hub names.

Their files hold the same numbers under the same names with three differences: the linear weights of
a block are transposed (their Conv1D is in x out), biases always exist, and old files carry the
causal mask as a buffer. Nothing here needs transformers: a folder is `config.json` and safetensors.
Pickles (`pytorch_model.bin`) are not read, because reading one can run anything.

`python -m eval.export checkpoint=RUN out=DIR` makes a folder of a run, with tokenizer and model
card.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.gpt2 import GPT2, LAYER_NORM_EPS
from model.pretrained import WTE, Pretrained, build

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
BUFFER = re.compile(r"\.attn\.(bias|masked_bias)$")  # c_attn.bias is a parameter
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
EXACT_GELU = {"gelu_new": False, "gelu_pytorch_tanh": False, "gelu_fast": False, "gelu": True}
# What our GPT-2 does not compute otherwise: (key, their default, ours).
ONLY: tuple[tuple[str, Any, Any], ...] = (
    ("layer_norm_epsilon", LAYER_NORM_EPS, LAYER_NORM_EPS),
    ("scale_attn_weights", True, True),
    ("add_cross_attention", False, False),
    ("tie_word_embeddings", True, True),
)


def from_huggingface(source: str | Path, **settings: Any) -> GPT2:
    """The model of a folder or hub name ("gpt2-medium", "user/name"), on the CPU, in float32 and in
    evaluation mode. Dropout is 0 unless `settings`, fields of GPT2Config, say otherwise; see
    `pretrained.build`. Raises ValueError for what is no GPT-2, OSError for what cannot be had."""
    return build(read_huggingface(source), settings)


def read_huggingface(source: str | Path) -> Pretrained:
    """The GPT-2 of a folder or hub name, of which only config.json is read for now."""
    path = Path(source).expanduser()
    if path.is_dir():
        file = path / CONFIG
        if not file.is_file():
            raise FileNotFoundError(_no_config(path))
    elif HUB_NAME.fullmatch(str(source)):
        file = _download(str(source), [CONFIG]) / CONFIG
    else:
        raise FileNotFoundError(
            f"{source} does not exist: expected a folder with {CONFIG} and {WEIGHTS}, a hub name "
            f"such as gpt2 or user/name, or a ckpt.pt of nanoGPT"
        )
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    shape = _shape(config, str(source))
    return Pretrained(str(source), shape, lambda: _tensors(source, shape))


def to_huggingface(
    model: GPT2, folder: Path, eot: int | None = None, fold_attention_scale: bool = False
) -> None:
    """Write model.safetensors (float32), config.json and generation_config.json into an existing
    folder, for `AutoModelForCausalLM.from_pretrained`.

    Padding rows are left out; biases that the model has not are written as zeros, and config.json
    says so, for the way back. `eot` is the id that ends a text. `fold_attention_scale` divides the
    queries by (layer + 1) instead of asking the reader to divide the logits, for programs that
    refuse `scale_attn_by_inverse_layer_idx` (vLLM); equal to rounding. Without such a scale it
    changes nothing.
    """
    from safetensors.torch import save_file

    ours = model.config
    scaled = ours.scale_attn_by_inverse_layer_idx
    tensors = dict(_their_tensors(model, fold=scaled and fold_attention_scale))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})  # transformers demands it
    special = {"bos_token_id": eot, "eos_token_id": eot}
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": ours.n_layer,
        "n_head": ours.n_head,
        "n_embd": ours.n_embd,
        "n_inner": None,
        "n_positions": ours.context,
        "vocab_size": ours.vocab_size,
        "activation_function": "gelu" if ours.exact_gelu else "gelu_new",
        "scale_attn_by_inverse_layer_idx": scaled and not fold_attention_scale,
        "reorder_and_upcast_attn": False,
        "resid_pdrop": ours.dropout,
        "embd_pdrop": ours.dropout,
        "attn_pdrop": ours.dropout,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "float32",
        "bias": ours.bias,  # ours, for the way back: false says that all biases are zeros
        **{key: value for key, _, value in ONLY},
        **special,
    }
    _write(folder / CONFIG, config)
    _write(folder / "generation_config.json", special | {"pad_token_id": eot})
    # safetensors lets the owner alone read its file.
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)


def _write(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")


def _their_tensors(model: GPT2, fold: bool) -> Iterator[tuple[str, Tensor]]:
    width = model.config.n_embd
    for name, parameter in model.state_dict().items():
        tensor = parameter.detach().cpu().float()
        if name == WTE:
            tensor = tensor[: model.config.vocab_size]
        if fold and ".attn.c_attn." in name:
            layer = int(name.split(".")[2])
            tensor = torch.cat([tensor[:width] / (layer + 1), tensor[width:]])
        stored = (tensor.T if name.endswith(CONV1D) else tensor).contiguous()
        yield name, stored
        if not model.config.bias and name != WTE and not name.endswith("wpe.weight"):
            yield name.removesuffix("weight") + "bias", tensor.new_zeros(tensor.size(0))


# ---- reading


def _shape(config: Any, source: str) -> dict[str, Any]:
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "gpt2":
        raise ValueError(f"{source} is a model of type {kind}: expected gpt2")
    for key, default, supported in ONLY:
        if (value := config.get(key, default)) != supported:
            raise ValueError(f"{source}: {key} is {value}, where a GPT-2 has {supported}")
    activation = config.get("activation_function", "gelu_new")
    if activation not in EXACT_GELU:
        raise ValueError(
            f"{source}: activation_function is {activation}: expected one of "
            f"{', '.join(EXACT_GELU)}"
        )
    context = "n_positions" if "n_positions" in config else "n_ctx"  # as older files say
    sizes = {"n_layer", "n_head", "n_embd", "vocab_size", context}
    if missing := sizes - config.keys():
        raise ValueError(f"{source}: config.json lacks {', '.join(sorted(missing))}")
    inner = config.get("n_inner")
    if inner not in (None, 4 * config["n_embd"]):
        raise ValueError(f"{source}: n_inner is {inner}, where a GPT-2 has {4 * config['n_embd']}")
    return {
        **{key: config[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")},
        "context": config[context],
        "bias": config.get("bias", True),  # false in our exports alone
        "exact_gelu": EXACT_GELU[activation],
        "scale_attn_by_inverse_layer_idx": config.get("scale_attn_by_inverse_layer_idx", False),
    }


def _tensors(source: str | Path, shape: Mapping[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    saved: dict[str, Tensor] = {}
    for file in _weight_files(source):
        try:
            saved |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a whole safetensors file: {error}") from None
    tensors = {}
    for name, tensor in saved.items():
        if BUFFER.search(name):
            continue
        # Files of the bare GPT2Model, OpenAI's among them, do not say `transformer.`.
        bare = name.removeprefix("transformer.")
        name = name if name.startswith("lm_head.") else f"transformer.{bare}"
        tensors[name] = tensor.T if name.endswith(CONV1D) and tensor.dim() == 2 else tensor
    head = tensors.pop("lm_head.weight", None)
    if head is not None and WTE in tensors and not torch.equal(head, tensors[WTE]):
        raise ValueError(f"{source}: its head is not tied to its embedding, as a GPT-2's is")
    return tensors if shape["bias"] else _without_biases(tensors, source)


def _without_biases(tensors: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if name.endswith(".bias") and tensor.any():
            raise ValueError(
                f"{source}: config.json says that there are no biases (bias: false), but {name} is "
                f"not zero: set it to true there if they were trained since"
            )
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".bias")}


def _weight_files(source: str | Path) -> list[Path]:
    """The safetensors of a folder or hub name: one file, or the parts that an index lists."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _download(str(source), [WEIGHTS, INDEX, "model-*.safetensors"])
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        parts = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        for part in parts:
            if Path(part).name != part or not (folder / part).is_file():
                raise ValueError(f"{folder / INDEX} lists {part}, which is not a file beside it")
        return [folder / part for part in sorted(parts)]
    if pickles := sorted(folder.glob("*.bin")):
        raise ValueError(
            f"{source} has its weights as a pickle ({pickles[0].name}), which can run code when it "
            f"is read: expected {WEIGHTS}; transformers' save_pretrained writes one"
        )
    raise FileNotFoundError(f"{source} has no {WEIGHTS}")


def _download(name: str, patterns: list[str]) -> Path:
    """Files of a hub repository, from the local cache where they are there already."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except RepositoryNotFoundError:
        reason = "there is no such public model on the hub"
    except Exception as error:  # the hub's HTTP library has errors of its own
        reason = f"it cannot be fetched from the hub ({type(error).__name__})"
    raise FileNotFoundError(
        f"{name} is no folder here, and {reason}: expected a folder with {CONFIG} and {WEIGHTS}, "
        f"or a name that is on the hub or in its local cache (HF_HOME)"
    ) from None


def _no_config(folder: Path) -> str:
    if (folder / "checkpoints").is_dir() or (folder / "checkpoint.json").is_file():
        return (
            f"{folder} is a run of this program: expected a Hugging Face folder, which python -m "
            f"eval.export checkpoint={folder} out=DIR makes of it"
        )
    return f"{folder} has no {CONFIG}: expected a Hugging Face folder of a GPT-2"
