"""The configuration of train.py, for the command lines of this package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data import DataConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def compose_tree(overrides: list[str]) -> Any:
    """configs/train.yaml under hydra overrides."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONFIGS), version_base=None):
        return compose("train", overrides)


def data_config(tree: Any) -> DataConfig:
    """The `data` group of a configuration, its types checked."""
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(tree.data, resolve=True)
    typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), values))
    assert isinstance(typed, DataConfig)
    return typed


def compose_data(overrides: list[str]) -> DataConfig:
    """The `data` group of configs/train.yaml under hydra overrides."""
    return data_config(compose_tree(overrides))


def in_one_line(run: Callable[[], None], interrupted: str = "interrupted") -> int:
    """Run a command; a user's mistake is one line on stderr and exit status 1."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        run()
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        # hydra's messages have several lines, of which the last tell of its search path.
        line = " ".join(str(error).partition("Config search path")[0].split())
        print(f"error: {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    return 0
