"""The GPU check itself, tried at toy size on whatever this machine has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import bench_train, gpu_check, gpu_optimizers, gpu_speed, gpu_training
from scripts.gpu_claims import claims
from scripts.gpu_invariants import build, compiling_nothing, parameters_of, take_step
from scripts.gpu_parts import Part, read_rows
from scripts.gpu_targets import verdicts

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
        timeout=480,  # its own limit
    )
    log = (tmp_path / "out" / "gpu_check.log").read_text()
    assert result.returncode == 0, f"{result.stdout}\n{log}"
    check = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    rows = {name: part["rows"] for name, part in check["parts"].items()}
    assert list(rows) == list(gpu_check.PARTS)
    assert rows["card"][0]["torch"] == torch.__version__
    assert rows["card"][0]["matmul_tflops"] > 0
    speed = {(r["size"], r["setting"], r["optimizer"], r["compile"]): r for r in rows["speed"]}
    assert list(speed) == [(s.size, s.kind, s.optimizer, s.compile) for s in gpu_speed.ORDER]
    for (_, kind, _, _), row in speed.items():
        figures = FIGURES[kind]
        assert all(row[figure] > 0 for figure in figures), row
    products = [row for row in rows["optimizers"] if "product" in row]
    assert [row["size"] for row in products] == ["small"] * 3 + ["large"] * 3
    for row in products:
        assert row["whole_ms"] > 0 and row["blocks_256"] > 0, row
        assert "kernel" in row or row["without"].startswith("kernel: ")
    updates = {(r["size"], r["optimizer"]): r for r in rows["optimizers"] if "optimizer" in r}
    assert tuple(updates) == gpu_optimizers.ORDER
    assert all(row["times_fused"] > 0 and 0 < row["of_step"] < 1 for row in updates.values())
    assert updates["small", "adamw"]["times_floor"] > 0
    assert {row["claim"] for row in rows["claims"]} == set(claims(["adamw"]))
    assert all("seconds" in row for row in rows["claims"])
    *runs, drawn = rows["training"]
    assert [row["optimizer"] for row in runs] == ["muon"]
    assert all(row["step"] == 10 and row["val_loss"] < 6.3 for row in runs)
    assert "No module named" in drawn["picture"]
    unknown = [row["what"] for row in check["verdicts"] if row["verdict"] == "not measured"]
    assert unknown == [  # of so much no toy is made, and the kernel wants a GPU
        "large at a micro-batch of 32 or more, GB",
        "large, x x^T by our kernel, times whole",
    ]
    document = (tmp_path / "out" / "benchmarks.md").read_text()
    assert all(f"### {name}" in document for name in rows) and "no measurement" in document
    pictures = gpu_training.draw([tmp_path / "out" / "training" / "muon"], tmp_path, 60)
    assert Path(pictures).is_file(), pictures
    points = (tmp_path / "out" / "training" / "curves.csv").read_text()
    assert "muon,10,640," in points


FIGURES = {
    "ours": ("tokens_per_s", "of_matmul", "memory_gb", "first_step_s", "optimizer_ms"),
    "plain": ("tokens_per_s", "of_matmul", "memory_gb", "first_step_s"),
    "plain mars": ("tokens_per_s", "of_matmul", "memory_gb", "first_step_s"),
    "start": ("start_s",),
    "wrappers": ("ddp", "fsdp"),
}
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


def test_what_does_not_fit_is_tried_with_the_micro_batch_that_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And what fits is kept for the rows that follow, so that rows of a size can be compared."""
    tried: list[str] = []

    def run(arguments: list[str]) -> list[dict[str, Any]]:
        micro = arguments[arguments.index("--micro-batches") + 1]
        tried.append(micro)
        if micro == "auto":
            micro = "16"
        elif int(micro) > 16:
            return [{"error": "OutOfMemoryError: full"}]
        return [{"micro_batch": int(micro), "global_batch": 480, "step_ms": 1, "first_step_s": 1}]

    monkeypatch.setattr(bench_train, "run", run)
    rows, setting = part(tmp_path), gpu_speed.ORDER[0]
    first = gpu_speed.ours(rows, setting, None)
    second = gpu_speed.ours(rows, setting, first["micro_batch"])
    assert tried == ["32", "auto", "16"] and second["micro_batch"] == 16


def test_verdicts_are_of_what_was_measured() -> None:
    row = {"size": "small", "setting": "ours", "optimizer": "adamw", "compile": True}
    rows = {"speed": [row | {"tokens_per_s": 6.1e5, "of_matmul": 0.5}], "claims": []}
    found = {v["what"]: (v["measured"], v["verdict"]) for v in verdicts(rows)}
    assert found["GPT-2 small, tokens/s"] == (6.1e5, "pass")
    assert found["small, of the matrix-product rate"] == (0.5, "fail")
    assert found["GPT-2 large, tokens/s"] == (None, "not measured")
    assert found["claims that do not hold"] == (None, "not measured")
    rows["claims"] = [{"claim": "one"}, {"claim": "two", "skipped": "no time left"}]
    assert verdicts(rows)[-2]["verdict"] == "pass"


def test_rows_of_a_part_that_was_killed_are_kept(tmp_path: Path) -> None:
    """Each is on the disk when it is reported; half a line at the end is left out."""
    rows = part(tmp_path)
    rows.report(claim="one", seconds=1.0)
    rows.rows.write('{"claim": "tw')
    rows.rows.flush()
    assert read_rows(tmp_path / "part.jsonl") == [{"claim": "one", "seconds": 1.0}]


def part(folder: Path, smoke: bool = False) -> Part:
    rows = (folder / "part.jsonl").open("w")
    return Part(torch.device("cpu"), time.monotonic() + 1000, smoke, rows, folder, folder)


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


def test_a_failure_is_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (rows := part(tmp_path)).attempt(claim="false") as row:
        row["seconds"] = 1.0
        raise AssertionError("it does not hold")
    (found,) = read_rows(tmp_path / "part.jsonl")
    assert found == {"claim": "false", "seconds": 1.0, "error": "AssertionError: it does not hold"}
    assert found == rows.own[0] and "it does not hold" in capsys.readouterr().out
    assert not gpu_check.ended_well({"failed": None, "rows": [found]})
