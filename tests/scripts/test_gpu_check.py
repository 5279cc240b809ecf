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
from scripts.gpu_invariants import (
    assert_same_weights,
    build,
    compiling_nothing,
    decomposes,
    parameters_of,
    take_step,
)
from scripts.gpu_parts import Part, read_rows
from scripts.gpu_plan import (
    BUILD,
    STEPS,
    TARGETS,
    TECHNIQUES,
    TOY_ORDER,
    Plan,
    Setting,
)
from scripts.gpu_targets import gains, verdicts

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
    assert rows["card"][1]["matmul_tflops"] > 0
    speed = {tuple(row[key] for key in TOY_ORDER[0].own): row for row in rows["speed"]}
    assert list(speed) == [tuple(setting.own.values()) for setting in TOY_ORDER]
    for (_, kind, *_), row in speed.items():
        figures = FIGURES[kind]
        assert all(row[figure] > 0 for figure in figures), row
    products = [row for row in rows["optimizers"] if "product" in row]
    assert [row["size"] for row in products] == ["large"] * 3 + ["small"] * 3
    for row in products:
        assert row["whole_ms"] > 0 and row["blocks_256"] > 0, row
        assert "kernel" in row or row["without"].startswith("kernel: ")
    updates = {(r["size"], r["optimizer"]): r for r in rows["optimizers"] if "optimizer" in r}
    assert list(updates) == [(size, name) for size, name, _ in gpu_optimizers.ORDER]
    assert all(row["times_fused"] > 0 and 0 < row["of_step"] < 1 for row in updates.values())
    assert updates["small", "adamw"]["times_floor"] > 0
    assert updates["small", "soap"]["worst_ms"] > updates["small", "soap"]["ms"]
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
    "mars pair": ("tokens_per_s", "times_plain", "plain_ms", "first_step_s"),
    "start": ("start_cold_s", "start_warm_s"),
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
    rows, setting = part(tmp_path), TARGETS[1]
    first = gpu_speed.ours(rows, setting, None)
    second = gpu_speed.ours(rows, setting, first["micro_batch"])
    assert tried == ["32", "auto", "16"] and second["micro_batch"] == 16


def test_verdicts_are_of_what_was_measured() -> None:
    rows = {"speed": [TARGETS[1].own | {"tokens_per_s": 6.1e5, "of_matmul": 0.5}], "claims": []}
    by_layer = TECHNIQUES[1].own | {"tokens_per_s": 5.9e5, "of_matmul": 0.7}
    rows["speed"] = [TECHNIQUES[0].own | {"tokens_per_s": 9e5}, by_layer, *rows["speed"]]
    found = {v["what"]: (v["measured"], v["verdict"]) for v in verdicts(rows)}
    assert found["GPT-2 small, tokens/s"] == (6.1e5, "pass")
    assert found["small, of the matrix-product rate"] == (0.5, "fail")
    assert found["GPT-2 large, tokens/s"] == (None, "not measured")
    assert found["claims that do not hold"] == (None, "not measured")
    rows["claims"] = [{"claim": "one"}, {"claim": "two", "skipped": "no time left"}]
    assert verdicts(rows)[-2]["verdict"] == "pass"
    whole, by_layer = gains(rows)
    assert whole == {"what": "compiled as a whole", "times_tokens_per_s": pytest.approx(6.1 / 9)}
    assert by_layer["what"] == "compiled layer by layer"


def test_rows_of_a_part_that_was_killed_are_kept(tmp_path: Path) -> None:
    """Each is on the disk when it is reported; half a line at the end is left out."""
    rows = part(tmp_path)
    rows.report(claim="one", seconds=1.0)
    rows.rows.write('{"claim": "tw')
    rows.rows.flush()
    assert read_rows(tmp_path / "part.jsonl") == [{"claim": "one", "seconds": 1.0}]


RATES = {"small": 600e3, "medium": 235e3, "large": 112e3, "xl": 60e3}  # tokens/s, as is asked for


def test_all_that_a_target_wants_is_reached_at_two_seconds_of_compilation_a_layer() -> None:
    """With what an H200 should do otherwise, in the time that the check gives to the part."""
    shares = {name: share for name, (_, share) in gpu_check.PARTS.items()}
    left = 60 * gpu_check.MINUTES - gpu_check.GRACE - 15  # the card, and importing torch twice
    left = left * shares["speed"] / (sum(shares.values()) - shares["card"]) - 8
    reached, plan = planned(left, per_layer=2.0)
    assert not [setting for setting in TARGETS if setting not in reached] and plan.pace < 1


def planned(left: float, per_layer: float) -> tuple[dict[Setting, float], Plan]:
    """The rows of gpu_speed's plan that are reached, and what each takes."""
    reached, plan = {}, Plan()
    for setting in gpu_speed.ORDER:
        if left < plan.needed(setting):
            continue
        update = setting.sequences * 1024 / RATES[setting.size]
        update *= {"plain": 1.3, "mars pair": 1.2, "start": 0.0}.get(setting.kind, 1.0)
        update *= 1.6 if setting.compile == "no" else 1.0
        compiling = per_layer * setting.layers
        build = BUILD[setting.size] if setting.build_s is None else setting.build_s
        reached[setting] = build + compiling + STEPS * update
        left -= reached[setting]
        if setting.kind in gpu_speed.LEARNT and not setting.extra:
            plan.learn(setting, update, update + compiling)
    return reached, plan


def part(folder: Path, smoke: bool = False) -> Part:
    rows = (folder / "part.jsonl").open("w")
    return Part(torch.device("cpu"), time.monotonic() + 1000, smoke, rows, folder, folder)


def solved_otherwise(matrix: torch.Tensor) -> torch.return_types.linalg_eigh:
    """As another device may: eigenvectors of other rounding and other signs."""
    values, vectors = EIGH(matrix.double())
    generator = torch.Generator().manual_seed(0)
    signs = 1 - 2 * torch.randint(2, (len(matrix[0]),), generator=generator)
    return torch.return_types.linalg_eigh((values.to(matrix.dtype), (vectors * signs).float()))


EIGH = torch.linalg.eigh


@pytest.mark.parametrize("name", ["soap", "shampoo"])
def test_claims_hold_whichever_the_solver_of_eigenvectors(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compared is defined by the gradients: no basis of a space of zeros."""
    weights = []
    for solver in (EIGH, solved_otherwise):
        monkeypatch.setattr(torch.linalg, "eigh", solver)
        optimizer, found = build(name, torch.device("cpu")), []
        for step in range(5):
            found.append(decomposes(optimizer, step))
            take_step(optimizer, step)
        assert found.count(True) == 2
        weights.append(optimizer)
    assert_same_weights(*weights)


@pytest.mark.parametrize("name", ["soap", "shampoo"])
def test_a_timed_period_has_one_decomposition(name: str) -> None:
    """The last but one of it, after a step that may compile."""
    optimizer = build(name, torch.device("cpu"))
    gpu_optimizers.begin(optimizer, period=3)
    steps = int(next(iter(optimizer.state.values()))["step"])
    assert [decomposes(optimizer, steps + i) for i in range(4)] == [False, False, True, False]
    take_step(optimizer, 0)
    assert all(p.isfinite().all() for p in parameters_of(optimizer))


def test_real_runs_are_as_long_as_any_rate_tells(tmp_path: Path) -> None:
    """Where the step that is not compiled was not reached, by the compiled one."""
    given, row = part(tmp_path), TARGETS[1].own | {"context": 1024, "optimizer_ms": 1.0}
    speed = [row | {"compile": "whole", "tokens_per_s": 500e3}]
    (tmp_path / "speed.jsonl").write_text(json.dumps(speed[0]) + "\n")
    compiled, plain = (gpu_training.update_seconds(given, compile) for compile in (True, False))
    own = (480 * 1024 / 500e3 - 1e-3) * 16 / 480
    update = gpu_training.SLOWER * gpu_training.UPDATE
    assert compiled == pytest.approx(own + update) and plain == pytest.approx(
        2 * own + update, 0.01
    )
    assert gpu_training.steps_in(10.0, plain) > 50


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
