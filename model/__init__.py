"""The networks of the bench. They need torch alone and can be used in any training loop."""

from typing import Any, NamedTuple

from model.gpt2 import GPT2, Cache, Flops, GPT2Config, Packing


class Family(NamedTuple):
    """An architecture: what its YAML says (a dataclass), and the network built from it."""

    config: type[Any]
    network: type[Any]


MODELS = {"gpt2": Family(GPT2Config, GPT2)}  # `name` in configs/model/*.yaml

__all__ = ["GPT2", "MODELS", "Cache", "Family", "Flops", "GPT2Config", "Packing"]
