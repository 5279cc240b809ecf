"""What the parts of scripts/gpu_check.py are given and share, and the two short ones."""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from runtime.device import DTYPES, Device, matmul_flops
from scripts.gpu_claims import claims, needed
from scripts.gpu_invariants import configuration

ROOT = Path(__file__).resolve().parents[1]

Row = dict[str, Any]


@dataclass
class Part:
    """What a part is given: its device, its deadline, and where its rows go."""

    device: torch.device
    deadline: float  # of time.monotonic()
    smoke: bool  # toy sizes, nothing compiled
    rows: IO[str]
    out: Path  # for what is larger than a row
    earlier: Path  # the rows of other parts, as <part>.jsonl
    own: list[Row] = field(default_factory=list)  # what was reported so far

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def report(self, **row: Any) -> None:
        """Print a row and keep it, also if the process dies after it."""
        print("   " + "  ".join(f"{k} {short(v)}" for k, v in row.items() if v != ""), flush=True)
        self.own.append(row)
        self.rows.write(json.dumps(row) + "\n")
        self.rows.flush()

    @contextmanager
    def attempt(self, **row: Any) -> Iterator[Row]:
        """Report ``row`` with what the body adds to it, or with its error."""
        try:
            yield row
        except Exception as error:  # every failure is a finding here
            row["error"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
        self.report(**row)

    def of(self, part: str) -> list[Row]:
        """Rows of a part that ended before this one began; none if it did not."""
        return read_rows(self.earlier / f"{part}.jsonl")

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        """Wall time of one call, from an idle device to an idle device."""
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def median(self, work: Callable[[], object], repeat: int) -> float:
        return statistics.median(self.seconds(work) for _ in range(repeat))

    def clear(self) -> None:
        torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def read_rows(file: Path) -> list[Row]:
    """Whole lines only: the last one of a process that was killed may be half a line."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(True) if line.endswith("\n")]


COPIES = 10  # between two waits, each some 10 microseconds


def copy_rate(part: Part) -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    elements = 2**16 if part.smoke else 2**28
    source = torch.zeros(elements, device=part.device, dtype=torch.float32)
    target = torch.empty_like(source)

    def copies() -> None:
        for _ in range(COPIES):
            target.copy_(source)

    copies()
    return 8 * elements * COPIES / part.median(copies, 5)


def card(part: Part) -> None:
    """What it is first: a first call of CUDA has taken longer than this part may."""
    gpu = part.device.type == "cuda"
    device = Device.choose(configuration(f"train.device={part.device.type}").train)
    part.report(
        device=device.name,
        precision=device.precision,
        datasheet_tflops=None if device.peak_flops is None else device.peak_flops / 1e12,
        memory_gb=torch.cuda.get_device_properties(0).total_memory / 1e9 if gpu else None,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        python=sys.version.split()[0],
    )
    rate = matmul_flops(part.device, DTYPES[device.precision], 30)
    part.report(matmul_tflops=rate / 1e12, copy_tb_per_s=copy_rate(part) / 1e12)


def hold_claims(part: Part) -> None:
    for name, claim in claims(["adamw"] if part.smoke else None).items():
        if part.left() < needed(claim) and not part.smoke:
            part.report(claim=name, skipped=f"{needed(claim):.0f} s needed, {part.left():.0f} left")
            continue
        with part.attempt(claim=name) as row:
            start = time.monotonic()
            row |= claim(part.device) or {}
            row["seconds"] = time.monotonic() - start


TOY = ("n_layer=1", "n_head=2", "n_embd=32", "context=16")


def toy(smoke: bool) -> list[str]:
    """Overrides that make any model small enough to try a script with."""
    return [f"model.{value}" for value in TOY] if smoke else []


def short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return " ".join(str(value).split())[:80]
