"""One thread per process: two busy processes with torch's default thread count are 20 times slower
than alone (OpenMP threads spin while they wait), and one thread gives repeatable sums."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from system import TINY, Command

torch.set_num_threads(1)

GOLDENS = Path(__file__).parent / "goldens"
SHARED = Path(__file__).resolve().parents[2] / "shared"  # reference material beside a checkout


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--goldens",
        type=Path,
        default=GOLDENS,
        help="folder of golden trajectories (default: the copies under tests/goldens)",
    )
    parser.addoption("--kills", type=int, default=2, help="of a run of two processes, per layout")


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the reference material (../shared) is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Overrides that name a small text, prepared by the first run that wants it."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text(Path(argparse.__file__).read_text())
    files = f"data.files=[{folder}/text.txt]"
    return ("data=text", files, "data.tokenizer=bytes", f"data.dir={folder}/prepared")


@pytest.fixture
def tiny(corpus: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Overrides of a run that takes a second, in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    return (*TINY, *corpus, f"paths.runs={tmp_path}/runs")
