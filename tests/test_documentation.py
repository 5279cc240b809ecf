"""Pages that repeat the code are as new as the code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from system import losses

from scripts.document_optimizers import PAGE, document

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "docs" / "adding_an_optimizer.md"


def test_the_optimizer_page_is_what_the_code_says() -> None:
    page = PAGE.read_text()
    assert document(page) == page, "stale: run python -m scripts.document_optimizers"


def files_of(page: str) -> dict[str, str]:
    """Path -> contents of the code blocks that begin with a comment ``# path``."""
    blocks = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", page, re.DOTALL)
    return dict(blocks)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """This tree with the files of docs/adding_an_optimizer.md added, by following it."""
    wanted = ("configs", "data", "eval", "model", "optim", "report", "runtime", "train.py")
    for name in wanted:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    files = files_of(RECIPE.read_text())
    assert [Path(path).parent.name for path in files] == ["rules", "optim"]
    for path, text in files.items():
        assert not (tmp_path / path).exists(), f"{path} is in the library: take another example"
        (tmp_path / path).write_text(text)
    return tmp_path


def test_the_recipe_for_an_optimizer_works(copy: Path, corpus: tuple[str, ...]) -> None:
    """Two files, and it trains, lowers the loss and is checked like any other."""
    name = Path(next(iter(files_of(RECIPE.read_text())))).stem
    overrides = ["model.n_layer=1", "model.n_head=2", "model.n_embd=32", "model.context=32"]
    overrides += ["train.steps=30", "train.eval_every=30", "train.eval_tokens=640"]
    overrides += ["train.sample_tokens=0", "train.device=cpu", "train.threads=1"]
    overrides += ["train.checkpoint_every=0", "logging.every=1", "logging.picture=false"]
    command = [sys.executable, "train.py", f"optim={name}", *overrides, *corpus]
    command += [f"paths.runs={copy}/runs", "run.dir=runs/it"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    run = losses(copy / "runs/it")
    assert run[-1] < run[0] - 0.5
    assert name in (copy / "runs/it/parameters.txt").read_text()
