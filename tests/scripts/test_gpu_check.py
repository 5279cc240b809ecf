"""The GPU check itself, tried at toy size on whatever this machine has."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.config import Config
from scripts import gpu_check, gpu_parts
from scripts.gpu_invariants import build, compiling_nothing, parameters_of, take_step

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    """Every part runs and reports, in a Python that has torch, numpy, tiktoken and Hydra only."""
    blocker = tmp_path / "without"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(WITHOUT)
    result = subprocess.run(
        ["bash", "scripts/gpu_check.sh", str(tmp_path / "out"), "--smoke"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(blocker), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
    )
    log = (tmp_path / "out" / "gpu_check.log").read_text()
    assert result.returncode == 0, f"{result.stdout}\n{log}"
    check = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    rows = {name: part["rows"] for name, part in check["parts"].items()}
    assert list(rows) == list(gpu_check.PARTS)
    assert rows["card"][0]["torch"] == torch.__version__
    assert rows["card"][0]["bf16_matmul_tflops"] > 0
    assert all("seconds" in row for row in rows["claims"])
    timed = [row for row in rows["optimizers"] if "skipped" not in row]  # a busy machine skips some
    assert {row["optimizer"] for row in timed} >= {"adamw", "lion", "mars_adamw"}
    assert all(row["times_fused"] > 0 for row in timed)
    (training,) = rows["training"]
    assert training["step"] == 20 and training["val_loss"] < 6
    settings = {(row["size"], row["setting"]) for row in rows["speed"]}
    assert settings == {(s, t) for s in gpu_parts.SIZES for t in gpu_parts.SETTINGS}
    assert all(row["tokens_per_s"] > 0 and row["of_matmul"] > 0 for row in rows["speed"])


WITHOUT = """
import sys
from importlib.machinery import PathFinder

NAMES = "tqdm safetensors matplotlib transformers datasets wandb pytest hypothesis psutil".split()

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in NAMES:
            return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


def test_halves_the_micro_batch_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """And keeps what fits for the settings that follow, so that rows of a size can be compared."""
    tried: list[tuple[int, int]] = []

    def speed(part: gpu_parts.Part, config: Config, plain: bool) -> dict[str, Any]:
        micro = config.train.micro_batch
        assert micro is not None
        tried.append((config.train.global_batch, micro))
        if micro > 16:
            raise torch.OutOfMemoryError("full")
        return {"micro_batch": micro, "first_step_s": 1.0}

    monkeypatch.setattr(gpu_parts, "speed", speed)
    rows = io.StringIO()
    part = gpu_parts.Part(torch.device("cpu"), time.monotonic() + 1000, True, rows)
    gpu_parts.measure_speed(part)
    reported = [json.loads(line) for line in rows.getvalue().splitlines()]
    assert len(reported) == 9 and {row["micro_batch"] for row in reported} == {16}
    assert tried[:3] == [(128, 64), (128, 32), (128, 16)] and len(tried) == 12


@pytest.mark.slow
def test_what_is_compiled_again_is_seen() -> None:
    """Optimizers come to inductor by another way than torch.compile: both are noticed."""
    optimizer = build("nadamw", torch.device("cpu"), compile=True)
    take_step(optimizer, 0)
    with compiling_nothing():
        take_step(optimizer, 1)
    for p in parameters_of(optimizer):
        p.grad = p.grad.mT.contiguous().mT if p.ndim == 2 else p.grad
    with pytest.raises(AssertionError, match="2 graphs were compiled"), compiling_nothing():
        optimizer.step()
    double = torch.compile(lambda x: 2 * x, dynamic=False)
    with pytest.raises(AssertionError, match="1 graphs were compiled"), compiling_nothing():
        double(torch.ones(3))


def test_a_failure_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    rows = io.StringIO()
    part = gpu_parts.Part(torch.device("cpu"), time.monotonic() + 1, True, rows)
    with part.attempt(claim="false") as row:
        row["seconds"] = 1.0
        raise AssertionError("it does not hold")
    assert json.loads(rows.getvalue()) == {
        "claim": "false",
        "seconds": 1.0,
        "error": "AssertionError: it does not hold",
    }
    assert "it does not hold" in capsys.readouterr().out
    assert not gpu_check.ended_well({"failed": None, "rows": [json.loads(rows.getvalue())]})
