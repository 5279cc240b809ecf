"""The figures of a record: those of the device, of all devices together, of the right card."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime.device import peak_of
from runtime.record import Later, Record

CARDS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA B200": 2.25e15,
    "NVIDIA GB200": 2.5e15,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A40": 150e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "Tesla V100-SXM2-16GB": 125e12,
    "Tesla T4": 65e12,
    **dict.fromkeys(
        (
            *(
                "NVIDIA H100 NVL",
                "NVIDIA H200 NVL",
                "NVIDIA H20",
                "NVIDIA RTX A4000",
                "NVIDIA A10G",
            ),
            *("Tesla V100-PCIE-16GB", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA L20"),
            *("NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA T400"),
            *("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "x86_64 CPU"),
        )
    ),
}


@pytest.mark.parametrize(("name", "peak"), CARDS.items())
def test_a_card_has_its_own_peak_or_none(name: str, peak: float | None) -> None:
    assert peak_of(name) == peak


def test_later_numbers_are_those_of_item() -> None:
    values = {"loss": torch.rand(7).mean(), "norm": torch.rand(()), "huge": torch.tensor(3e38)}
    assert Later(values).read() == {name: value.item() for name, value in values.items()}
    assert Later({}).read() == {}


@pytest.mark.parametrize("processes", [1, 8])
def test_mfu_is_a_share_of_what_all_devices_could_do(processes: int) -> None:
    record: Any = SimpleNamespace(
        _mark=0,
        _marked=time.monotonic() - 1,
        _peak=1e14,
        context=1,
        tokens_per_step=1000,
        processes=SimpleNamespace(size=processes),
        device=SimpleNamespace(memory_gb=lambda: 0.0),
        model=SimpleNamespace(flops_per_token=lambda context: SimpleNamespace(palm=10**9)),
    )
    rates = Record._rates(record, 10)
    assert rates["mfu"] * processes == pytest.approx(rates["tokens_per_s"] / 1e5, abs=1e-3)
    assert rates["tokens_per_s"] > 5e3
