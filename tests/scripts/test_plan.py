"""The plan's arithmetic, against sums done by hand."""

from __future__ import annotations

import csv
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.plan import (
    Cluster,
    communication_seconds,
    exchange_seconds,
    main,
    matrix_bytes,
    memory_bytes,
    plan,
)

CLUSTER = Cluster(1, 400e12, machine=8, link=350e9, network=45e9, latency=20e-6, overlap=0.3)
SMALL = ("gpt2_small", "adamw", "ddp")
WEIGHTS = 4 * (124_439_808 + 47 * 768)  # bytes; 47 spare rows of the embedding


def test_one_gpu_is_flops_over_rate() -> None:
    found = plan(*SMALL, CLUSTER, tokens=1e10, global_batch=480, micro_batch=16)
    # docs/benchmarks.md's count: 854.7 MFLOP per token
    assert found.tokens_per_s == pytest.approx(400e12 / 854.7e6, rel=1e-3)
    assert found.exaflops == pytest.approx(8.547, rel=1e-3)
    assert found.hours == pytest.approx(1e10 * 854.7e6 / 400e12 / 3600, rel=1e-3)
    assert found.efficiency == pytest.approx(1) and found.communication_s == 0


@pytest.mark.parametrize("strategy,passes", [("ddp", 2), ("fsdp", 3)])
def test_messages_go_around_the_slowest_ring(strategy: str, passes: int) -> None:
    inside = communication_seconds(WEIGHTS, strategy, replace(CLUSTER, gpus=8))
    assert inside == pytest.approx(passes * 7 / 8 * WEIGHTS / 350e9)
    across = communication_seconds(WEIGHTS, strategy, replace(CLUSTER, gpus=16))
    assert across == pytest.approx(passes * 15 / 16 * WEIGHTS / 45e9 + 20e-6)


def test_hsdp_sends_a_gpus_part_between_machines() -> None:
    given = communication_seconds(WEIGHTS, "hsdp", replace(CLUSTER, gpus=16))
    within, between = 3 * 7 / 8 * WEIGHTS / 350e9, 2 / 2 * WEIGHTS / 8 / 45e9
    assert given == pytest.approx(within + between + 20e-6)
    one = replace(CLUSTER, gpus=8)
    assert communication_seconds(WEIGHTS, "hsdp", one) == communication_seconds(
        WEIGHTS, "fsdp", one
    )


def test_what_the_update_exchanges_is_what_the_processes_count() -> None:
    """docs/distributed.md's bytes per step of GPT-2 small on 4 processes, in MB."""
    matrices = matrix_bytes("gpt2_small", "muon")
    assert matrices == 4 * 12 * 12 * 768**2 and matrix_bytes("gpt2_small", "adamw") == 0
    rates = replace(CLUSTER, gpus=4, link=1e6)  # seconds are MB
    given = (WEIGHTS, matrices)
    assert exchange_seconds(*given, "ddp", rates) == pytest.approx(254.8 + 118.5, abs=0.2)
    assert exchange_seconds(*given, "fsdp", rates) == pytest.approx(63.7 + 63.7, abs=0.2)
    assert exchange_seconds(WEIGHTS, 0, "fsdp", rates) == 0
    # on two machines of two each sends its half of the rows to the other
    two = replace(rates, machine=2, network=1e6, latency=0.0)
    between = 1 / 2 * WEIGHTS / 2 / 1e6
    assert exchange_seconds(WEIGHTS, 0, "hsdp", two) == pytest.approx(between)


def test_an_update_is_divided_and_waited_for() -> None:
    slow = replace(CLUSTER, update=0.8)
    for n in (1, 8):
        plain, found = (
            plan(*SMALL, replace(c, gpus=n), tokens=1e10, global_batch=480, micro_batch=16)
            for c in (CLUSTER, slow)
        )
        assert found.update_s == pytest.approx(0.8 / n)
        assert found.step_s == pytest.approx(plain.step_s + 0.8 / n)
    assert found.waiting_s >= 7 / 8 * WEIGHTS / CLUSTER.link  # the updated parameters' way


def test_memory_is_what_is_held_and_what_is_stored() -> None:
    held = memory_bytes("gpt2_small", "adamw", "ddp", 1, 8, micro=0)
    assert held == pytest.approx(4 * WEIGHTS, rel=1e-3)  # weights, gradients, two moments
    divided = memory_bytes("gpt2_small", "adamw", "fsdp", 8, 8, micro=0)
    assert divided == pytest.approx(held / 8, rel=1e-3)
    buffers = memory_bytes("gpt2_small", "adamw", "ddp", 8, 8, micro=0) - (2 + 2 / 8) * WEIGHTS
    assert 0 < buffers <= 1.01 * WEIGHTS  # what the replicas exchange
    one = memory_bytes("gpt2_small", "adamw", "ddp", 1, 8, micro=1) - held
    assert one == 1024 * (34 * 12 * 768 + 6 * 50304)
    halves = memory_bytes("gpt2_small", "adamw", "ddp", 1, 8, micro=1, chunks=2) - held
    assert one - halves == 1024 * 3 * 50304


def test_more_gpus_take_less_time_and_more_of_it_in_all() -> None:
    every = [
        plan(*SMALL, replace(CLUSTER, gpus=n), tokens=1e10, global_batch=480, micro_batch=16)
        for n in (1, 8, 16, 60, 480, 1000)
    ]
    hours, spent = [p.hours for p in every], [p.gpu_hours for p in every]
    assert hours == sorted(hours, reverse=True)
    assert [p.global_batch for p in every] == [480] * 5 + [1000]
    assert all(b >= a * (1 - 1e-9) for a, b in itertools.pairwise(spent))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = tmp_path / "bench_train.json"
    row = {"model": "gpt2_small", "optimizer": "adamw", "compile": "true", "processes": 2}
    row |= {"step_ms": 400, "optimizer_ms": 40}
    rates.write_text(json.dumps({"rows": [row | {"tokens_per_s": 1e6}]}))
    base = ["--gpu", "H200", "--models", "gpt2_small", "--gpus", "1", "8"]
    found = main([*base, "--rates", str(rates), "--out", str(tmp_path / "plan.csv")])
    batch = 480 * 1024  # tokens; 2 processes made 1e6 a second, in nine tenths of the time
    assert found[0].step_s == pytest.approx(batch / 5e5 * 0.9 + 2 * 0.040)
    assert found[0].update_s == pytest.approx(0.080)
    assert len(list(csv.DictReader((tmp_path / "plan.csv").open()))) == 2
    assert "assumed" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no rate of gpt2_small with muon"):
        main([*base, "--rates", str(rates), "--optimizers", "muon"])
    assert main([*base[:4], "--mfu", "0.4"])[-1].gpus == 1000  # the default numbers of GPUs
    with pytest.raises(SystemExit):
        main(base)  # a rate must be said
