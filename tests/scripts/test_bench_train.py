"""The benchmark of the training step measures the training step."""

from __future__ import annotations

import csv
import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from runtime import device
from runtime.device import Device, matmul_flops
from scripts import bench_train
from scripts.bench_train import COLUMNS, first_step, run
from scripts.training import PARTS, Stopwatch, Training, configuration, random_corpus

TOY = ("model.n_layer=1", "model.n_head=2", "model.n_embd=32", "model.context=32")


def test_every_case_has_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--micro-batches", "1", "2", "--device", "cpu"]
    options += ["--steps", "2", "--repeat", "3", "--warm-up", "1", "--out", str(tmp_path)]
    rows = run([*options, *TOY])
    assert [row["micro_batch"] for row in rows] == [1, 2]
    for row in rows:
        assert row["global_batch"] == 2 * row["micro_batch"]
        assert row["tokens_per_s"] * row["step_ms"] == pytest.approx(1e3 * 64 * row["micro_batch"])
        parts = sum(row[f"{part}_ms"] for part in PARTS)
        # medians of parts do not add up to the median of sums, nor is all of a turn a part
        assert 0.5 * row["step_ms"] < parts < 1.5 * row["step_ms"]
        assert row["backward_ms"] > 0 and row["communication_ms"] == 0
        assert row["peak"] == "measured" and len(row["turns_ms"]) == 3
    with (tmp_path / "bench_train.csv").open() as file:
        written = list(csv.DictReader(file))
    assert list(written[0]) == list(COLUMNS) and len(written) == 2
    assert "environment" in json.loads((tmp_path / "bench_train.json").read_text())
    assert "tokens_per_s" in capsys.readouterr().out


def test_a_case_that_fails_says_so_and_the_others_go_on() -> None:
    rows = run(["--device", "cpu", "--repeat", "1", "--steps", "1", "--warm-up", "1",
                "--precisions", "fp16", "fp32", *TOY])  # fmt: skip
    assert "fp16 needs a GPU" in rows[0]["error"] and "tokens_per_s" in rows[1]


@pytest.mark.slow
def test_more_shapes_than_torch_compiles_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default the ninth would silently run without the compiler."""
    inductor, seen = torch.compile, Counter[str]()
    whole = partial(inductor, backend="eager")  # dynamo keeps the count, not what comes after it
    monkeypatch.setattr(torch, "compile", lambda module, **options: whole(module, dynamic=False))
    reset = torch.compiler.reset
    monkeypatch.setattr(torch.compiler, "reset", lambda: seen.update(counters["frames"]) or reset())
    counters.clear()
    sizes = [str(size) for size in range(1, 10)]
    rows = run(["--micro-batches", *sizes, "--compile", "true", "--accumulation", "1",
                "--device", "cpu", "--repeat", "1", "--steps", "1", "--warm-up", "1",
                *TOY])  # fmt: skip
    assert not any("error" in row for row in rows), rows
    assert seen["total"] == seen["ok"] >= 9


def test_auto_is_the_micro_batch_that_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train, "AUTO_BATCH", 6)
    (row,) = run(["--micro-batches", "auto", "--device", "cpu", "--repeat", "1", "--steps", "1",
                  "--warm-up", "1", *TOY])  # fmt: skip
    assert row["micro_batch"] == row["global_batch"] == 6 and row["tokens_per_s"] > 0


def test_the_stopwatch_is_no_part_of_the_arithmetic(tmp_path: Path) -> None:
    """Losses of `Training` are those of its model on its batches."""
    config = configuration(tmp_path, ["train.global_batch=4", "train.device=cpu", *TOY])
    training = Training(config, random_corpus(tmp_path / "ids", config, 10_000))
    tokens = training.loader.batch(0)
    tokens = tokens % training.shape.vocab_size
    expected = training.model(tokens[:, :-1], tokens[:, 1:]).item()
    training.batches.loader.batch = lambda step: tokens  # type: ignore[method-assign]
    assert training.step().losses.item() == pytest.approx(expected, rel=1e-6)
    training.close()


def test_marks_divide_the_time() -> None:
    watch = Stopwatch(torch.device("cpu"))
    watch.marks = [("data", 0.0), ("forward", 1.0), ("backward", 3.0), (None, 7.0), ("data", 9.0)]
    watch.marks.append((None, 9.5))
    assert watch.take() == {"data": [1.0, 0.5], "forward": [2.0], "backward": [4.0]}
    assert watch.take() == {}


def test_the_rate_of_a_matrix_product_is_a_rate() -> None:
    rates = [matmul_flops(torch.device("cpu"), torch.float32, repeat=3) for _ in range(2)]
    assert 1e9 < rates[0] < 1e13 and 0.1 < rates[0] / rates[1] < 10


def test_compiled_kernels_go_where_the_configuration_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a case that was not compiled, whose optimizer imports torch's compiler, which
    names a folder of its own in the environment; but never elsewhere than where the user says."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    def folder(name: str) -> str:
        overrides = ["train.compile=true", f"train.compile_cache={tmp_path / name}"]
        Device.choose(configuration(tmp_path, ["train.device=cpu", *overrides]).train)
        return cache_dir()

    monkeypatch.setenv(device.CACHE, default_cache_dir())
    monkeypatch.setattr(device, "USERS_CACHE", None)
    assert [folder(name) for name in ("one", "two")] == [f"{tmp_path}/one", f"{tmp_path}/two"]
    monkeypatch.setenv(device.CACHE, f"{tmp_path}/users")
    monkeypatch.setattr(device, "USERS_CACHE", f"{tmp_path}/users")
    assert folder("three") == f"{tmp_path}/users"


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    """What the first start has compiled is in the folder that was named, and is used again."""
    settings = [*TOY, "train.compile=true", f"train.compile_cache={tmp_path}/compiled"]
    settings += ["logging.every=1", "train.steps=1", "train.eval_every=0", "train.device=cpu"]
    settings += ["train.checkpoint_every=0", "train.sample_tokens=0", "logging.picture=false"]
    cold = first_step(tmp_path / "cold", settings)
    kernels = set((tmp_path / "compiled").rglob("*.so"))
    assert kernels
    warm = first_step(tmp_path / "warm", settings)
    assert set((tmp_path / "compiled").rglob("*.so")) == kernels
    assert warm < cold
