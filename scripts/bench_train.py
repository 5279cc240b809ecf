"""What a training step costs, and of what it is made.

    python -m scripts.bench_train                                      GPT-2 nano, AdamW
    python -m scripts.bench_train --models gpt2_small gpt2_medium --optimizers adamw muon \\
        --micro-batches 32 64 --compile false true --out bench
    python -m scripts.bench_train --models gpt2_small --start          and how long a start takes
    torchrun --nproc_per_node=8 -m scripts.bench_train parallel=ddp    and what messages cost

`--micro-batches auto` is the largest that fits, of a global batch of 480 sequences per process.
Every combination of the options is a case; overrides of configs/ hold for all of them. The cases of
a model size take turns, so that other load on the machine falls on all, and each figure is the
median over its turns (``--apart`` measures one case after the other, where they do not fit into
memory together). Tokens are random ids.

*mfu* is by PaLM's count over the datasheet's dense peak in 16 bits, *of_matmul* by the causal count
over the rate of a matrix product in the case's precision, measured between the turns. Of a device
without an entry in runtime/device.py, or in float32, *mfu* too is over the measured rate, and
*peak* says so. *communication* is what the backward pass that reduces the gradients takes longer
than those that do not: zero for one process, unknown without accumulation.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import io
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from data.corpus import Corpus
from data.progress import Progress, progress
from model.gpt2 import Flops
from runtime.config import AUTO
from runtime.describe import aligned
from runtime.device import DTYPES, Device, matmul_flops
from runtime.environment import environment
from runtime.files import atomic_path, write_json
from runtime.processes import Processes, join
from scripts.training import PARTS, Training, configuration, random_corpus

ROOT = Path(__file__).resolve().parents[1]
AUTO_BATCH = 480  # sequences per process, of which train.micro_batch=auto takes a divisor
KEY = ("model", "optimizer", "precision", "micro_batch", "compile")
COLUMNS = (
    *KEY,
    *("tokens_per_s", "mfu", "peak", "of_matmul", "matmul_tflops", "memory_gb", "step_ms"),
    *(f"{part}_ms" for part in PARTS),
    *("build_s", "first_step_s", "start_cold_s", "start_warm_s", "error"),
)
Row = dict[str, Any]


class Case:
    """One combination, built and past its first steps."""

    def __init__(
        self, row: Row, overrides: Sequence[str], corpus: Corpus, context: Context
    ) -> None:
        self.row, self.folder = row, tempfile.TemporaryDirectory()
        config = configuration(Path(self.folder.name), [*case_overrides(row, context), *overrides])
        before, start = allocated(), time.perf_counter()
        self.training = Training(config, corpus, context.processes)
        row["build_s"] = time.perf_counter() - start
        row["micro_batch"] = config.train.micro_batch
        try:
            row["first_step_s"] = self.training.seconds(1)
            self.training.seconds(context.warm_up)
        except BaseException:  # out of memory, most often, which the cases that follow need
            self.close()
            raise
        self.own, self.peak = allocated() - before, 0
        self.steps, self.turns, self.rates = context.steps, list[float](), list[float]()
        self.parts: list[dict[str, float]] = []

    def turn(self) -> None:
        device, start = self.training.device, allocated()
        if device.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.training.spent = dict.fromkeys(PARTS, 0.0)
        self.turns.append(self.training.seconds(self.steps) / self.steps)
        self.parts.append({k: v / self.steps for k, v in self.training.spent.items()})
        if device.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - start + self.own)
        self.rates.append(matmul_flops(device.device, DTYPES[device.precision]))

    def result(self) -> Row:
        step, rate = statistics.median(self.turns), statistics.median(self.rates)
        training = self.training
        device, tokens = training.device, training.record.tokens_per_step
        flops = training.model.flops_per_token(training.shape.context)
        self.row |= {
            **shares(device, flops, tokens / step, rate, training.processes.size),
            "memory_gb": self.peak / 1e9 if self.peak else device.memory_gb(),
            "step_ms": 1e3 * step,
            "turns_ms": [1e3 * turn for turn in self.turns],
            "precision": device.precision,
            "attention": training.config.train.attention,
            "symmetric": training.config.train.symmetric,
            "context": training.shape.context,
            "global_batch": training.config.train.global_batch,
            "processes": training.processes.size,
        }
        for part in PARTS:
            self.row[f"{part}_ms"] = 1e3 * statistics.median(p[part] for p in self.parts)
        return self.row

    def close(self) -> None:
        self.training.close()
        self.folder.cleanup()


class Context(argparse.Namespace):
    """What holds for all cases: the command line, and the process's place among others."""

    models: list[str]
    optimizers: list[str]
    precisions: list[str]
    micro_batches: list[int | str]
    compile: list[str]
    accumulation: int
    steps: int
    warm_up: int
    repeat: int
    apart: bool
    start: bool
    device: str
    out: Path | None
    overrides: list[str]
    processes: Processes


def case_overrides(row: Row, context: Context) -> list[str]:
    own = AUTO_BATCH if row["micro_batch"] == AUTO else row["micro_batch"] * context.accumulation
    batch = row.get("global_batch", own * context.processes.size)
    return [
        *(f"model={row['model']}", f"optim={row['optimizer']}", "model.vocab_size=50257"),
        *(f"train.precision={row['precision']}", f"train.micro_batch={row['micro_batch']}"),
        *(f"train.compile={row['compile']}", f"train.global_batch={batch}"),
        f"train.device={context.device}",
    ]


def shares(device: Device, flops: Flops, tokens_per_s: float, rate: float, gpus: int = 1) -> Row:
    """Tokens per second as shares of what ``gpus`` of a kind could do; ``rate``: FLOP/s of a matrix
    product on one."""
    # the datasheet's peaks are of 16 bits
    datasheet = device.peak_flops if device.precision != "fp32" else None
    per_gpu = tokens_per_s / gpus
    return {
        "tokens_per_s": tokens_per_s,
        "mfu": flops.palm * per_gpu / (datasheet or rate),
        "peak": "datasheet" if datasheet else "measured",
        "of_matmul": flops.causal * per_gpu / rate,
        "matmul_tflops": rate / 1e12,
    }


def micro_batch(text: str) -> int | str:
    return text if text == AUTO else int(text)


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def cases(context: Context) -> list[Row]:
    options = (context.models, context.optimizers, context.precisions)
    every = itertools.product(*options, context.micro_batches, context.compile)
    return [dict(zip(KEY, values, strict=True)) for values in every]


def measure(rows: list[Row], context: Context, corpus: Corpus, bar: Progress) -> None:
    """Fill in the rows, which take turns. A case that fails says why, and the others go on."""
    import torch._dynamo.config as dynamo  # seconds

    built: list[Case] = []
    # beyond eight shapes of a model torch would run the next in eager mode, and say so in its log
    limits = {"recompile_limit": 8 * len(rows), "fail_on_recompile_limit_hit": True}
    with dynamo.patch(limits):
        for row in rows:
            with noted(row):
                built.append(Case(row, context.overrides, corpus, context))
            if "error" in row:
                release()
            bar.written(1)
        take_turns(built, context, bar)
    built.clear()
    torch.compiler.reset()
    release()


def release() -> None:
    """What is no longer in use: the objects of a case refer to each other in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def take_turns(built: list[Case], context: Context, bar: Progress) -> None:
    for _ in range(context.repeat):
        for case in built:
            if "error" not in case.row:
                with noted(case.row):
                    case.turn()
            bar.written(1)
    for case in built:
        if "error" not in case.row:
            case.result()
        case.close()


@contextlib.contextmanager
def noted(row: Row) -> Iterator[None]:
    """Without what the trainer prints; a failure becomes the row's."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except Exception as error:  # every failure is a finding here
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def starts(row: Row, context: Context) -> Row:
    """Seconds from the start of ``python train.py`` to the end of its first update: without
    anything compiled, and again with what the first start has compiled. Data is prepared before."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = [
            *(o for o in case_overrides(row, context) if not o.startswith("model.vocab_size")),
            *(f"train.compile_cache={folder / 'compiled'}", "logging.every=1", "train.steps=1"),
            *("train.eval_every=0", "train.checkpoint_every=0", "train.sample_tokens=0"),
            *("logging.picture=false", *context.overrides),
        ]
        first_step(folder / "prepare", [*settings, "train.compile=false"])
        cold, warm = (first_step(folder / run, settings) for run in ("cold", "warm"))
    return {"start_cold_s": cold, "start_warm_s": warm}


def first_step(run: Path, settings: list[str]) -> float:
    command = [sys.executable, str(ROOT / "train.py"), *settings, f"run.dir={run}"]
    environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    start, metrics = time.perf_counter(), run / "metrics.jsonl"
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        seen: float | None = None
        while process.poll() is None:
            if metrics.is_file() and metrics.stat().st_size:
                seen = time.perf_counter() - start
                break
            time.sleep(0.01)
        _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"train.py: {errors.strip()[-300:]}")
    return time.perf_counter() - start if seen is None else seen


def text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def table(rows: list[Row]) -> str:
    """The columns that some row has."""
    shown = [column for column in COLUMNS if any(column in row for row in rows)]
    return aligned([shown, *([text(row.get(column, "-")) for column in shown] for row in rows)])


def save(rows: list[Row], folder: Path) -> None:
    """bench_train.csv, and bench_train.json with every turn, device and versions."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "bench_train.json", {"rows": rows, "environment": environment()})
    with (
        atomic_path(folder / "bench_train.csv") as path,
        path.open("w", newline="") as file,
    ):
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def parse(arguments: Sequence[str] | None) -> Context:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench_train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=["gpt2_nano"], help="of configs/model")
    parser.add_argument("--optimizers", nargs="+", default=["adamw"], help="of configs/optim")
    parser.add_argument("--precisions", nargs="+", default=["auto"])
    parser.add_argument(
        "--micro-batches", nargs="+", type=micro_batch, default=[8], help="sequences"
    )
    parser.add_argument("--compile", nargs="+", default=["false"], choices=["false", "true"])
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches per step")
    parser.add_argument("--steps", type=int, default=5, help="per turn")
    parser.add_argument("--warm-up", type=int, default=3, help="steps after the first")
    parser.add_argument("--repeat", type=int, default=5, help="turns of each case")
    parser.add_argument("--apart", action="store_true", help="one case after the other")
    parser.add_argument("--start", action="store_true", help="time python train.py, cold and warm")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="folder for a CSV and a JSON")
    parser.add_argument("overrides", nargs="*", help="of configs/, for all cases")
    return parser.parse_args(arguments, namespace=Context())


def run(arguments: Sequence[str] | None = None) -> list[Row]:
    """Everything that the command line asks for; the rows."""
    context = parse(arguments)
    context.processes = join(600.0)
    rows = cases(context)
    names = {"model": context.models, "optim": context.optimizers}
    for kind, given in names.items():
        for name in given:
            if not (ROOT / "configs" / kind / f"{name}.yaml").is_file():
                raise SystemExit(f"error: configs/{kind} has no {name}.yaml")
    groups = [[row for row in rows if row["model"] == model] for model in context.models]
    if context.apart:
        groups = [[row] for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            config = configuration(Path(folder), context.overrides)
            corpus = random_corpus(Path(folder) / "tokens", config)
        total = len(rows) * (1 + context.repeat)
        with progress("cases", total, unit=" turns", show=context.processes.first) as bar:
            for group in groups:
                measure(group, context, corpus, bar)
    for row in rows:
        if context.start and context.processes.size == 1 and "error" not in row:
            with noted(row):
                row |= starts(row, context)
    if context.processes.first:
        device = Device.choose(config.train, context.processes)
        print(f"{device.name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")
        print(table(rows))
        if context.out is not None:
            save(rows, context.out)
    context.processes.leave()
    return rows


if __name__ == "__main__":
    sys.exit(any("error" in row for row in run()))
