"""`model.init_from`: where a model's first weights come from, if they are not drawn.

A folder or hub name of Hugging Face, or a `ckpt.pt` of nanoGPT.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.gpt2 import GPT2
from model.huggingface import from_huggingface, read_huggingface
from model.nanogpt import from_nanogpt, read_nanogpt
from model.pretrained import SHAPE, Pretrained, load_pretrained


def complete(settings: Mapping[str, Any], init_from: str | None) -> dict[str, Any]:
    """`settings` (fields of GPT2Config) with every null of its shape filled from `init_from`.

    Reads the source's description, not its weights, and nothing at all if no value is missing.
    Raises ValueError if there is no source to fill one, ValueError or OSError if it cannot be read.
    """
    filled = dict(settings)
    missing = [key for key in SHAPE if settings.get(key) is None]
    if not missing:
        return filled
    if init_from is None:
        raise ValueError(
            f"model.{missing[0]} has no value: set it, or set model.init_from to weights that have "
            f"one, such as model.init_from=gpt2"
        )
    shape = read_pretrained(init_from).shape
    return filled | {key: shape[key] for key in missing}


def initialize(model: GPT2, init_from: str) -> None:
    """Replace the drawn weights by those of `init_from`. Before sharding and before an optimizer is
    made, whose state may begin at the weights. Raises ValueError where the two disagree."""
    load_pretrained(model, read_pretrained(init_from))


def read_pretrained(source: str | Path) -> Pretrained:
    """The pretrained weights that a path or a hub name stands for."""
    return read_nanogpt(source) if _is_file(source) else read_huggingface(source)


def from_pretrained(source: str | Path, **settings: Any) -> GPT2:
    """A model from any source; see `from_huggingface` and `from_nanogpt`."""
    read = from_nanogpt if _is_file(source) else from_huggingface
    return read(source, **settings)


def _is_file(source: str | Path) -> bool:
    path = Path(source).expanduser()
    return path.is_file() or path.suffix == ".pt"
