"""The configuration that train.py would have, for scripts that only look at it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from runtime.config import Config, load

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"


def compose_tree(overrides: Sequence[str]) -> DictConfig:
    """The composed tree, with Hydra's own part under ``hydra``. Raises Hydra's errors."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        tree = compose("train", list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(tree)  # run.name asks for ${hydra:runtime.choices}
    return tree


def compose_config(overrides: Sequence[str]) -> Config:
    """The typed, checked configuration. Raises Hydra's errors and ConfigError."""
    tree = compose_tree(overrides)
    with open_dict(tree):
        del tree["hydra"]
    return load(tree)
