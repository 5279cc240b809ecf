"""The README tells the truth: its commands and overrides are accepted, its files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from optim import list_optimizers
from runtime.config import load

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"python train\.py((?: [^\n|`]*)?)", README)
OVERRIDES = re.findall(r"`([\w.]+=[^`\s]+)`", README)


def accepted(overrides: list[str]) -> None:
    """Compose and check, with every value of a sweep."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    sweeps = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [o.input_line or ""]
        for o in parsed
    ]
    for i in range(max(map(len, sweeps), default=1)):
        chosen = [values[min(i, len(values) - 1)] for values in sweeps]
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            load(compose("train", overrides=[*chosen, "run.name=readme"]))


# (weights from the hub need a network: test_pretrained_start.py begins with a folder)
CHECKED = [c for c in COMMANDS if not any(part in c for part in ("...", "--", "init_from="))]


@pytest.mark.parametrize("command", CHECKED)
def test_command_is_accepted(command: str) -> None:
    words = shlex.split(command.split("#")[0])
    accepted([word for word in words if word != "-m"])


@pytest.mark.parametrize("override", [o for o in OVERRIDES if "<" not in o and o[0].islower()])
def test_override_is_accepted(override: str) -> None:
    accepted([override])


def test_names_that_the_readme_lists_are_all_there_are() -> None:
    for group in ("model", "data", "schedule"):
        row = next(line for line in README.splitlines() if line.startswith(f"| `{group}` |"))
        said = set(re.findall(r"`(\w+)`", row)) - {group}
        assert said == {file.stem for file in (ROOT / "configs" / group).glob("*.yaml")}
    table = re.findall(r"^\| `(\w+)` \| [^|]* \| [^|]* \|$", README, re.MULTILINE)
    assert set(list_optimizers()) <= set(table)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
