"""Real runs of train.py on a GPU, one for each of three optimizers, and their curves.

The text is what train.py has by default, the Python standard library as bytes, unless the
environment variable DATA gives overrides of data, such as
``DATA="data=text data.files=[a.txt] data.tokenizer=gpt2"``. Paths in it are absolute, or from the
root of this repository; GPT-2's tokenizer wants the network or GPT2_BPE_DIR. The vocabulary is
GPT-2's in any case. All runs have the same batches, as many as the time allows at the rate that
``speed`` has measured; they are compiled where there is time for it. Run folders, curves.csv and
pictures stay in OUT_DIR/training.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from report.tables import write_csv
from runtime.config import AUTO
from runtime.metrics import FILE_NAME, read_metrics
from scripts import bench_train
from scripts.gpu_parts import ROOT, Part, Row, toy
from scripts.gpu_plan import BATCH
from scripts.gpu_speed import step_seconds

OPTIMIZERS = ("adamw", "mars_adamw", "muon")
ROWS = 16  # sequences per update, 16,384 tokens: in seconds of training updates are what is scarce
SLOWER = 2.0  # an update that is not compiled, at most
UPDATE = 0.02  # seconds of the slowest optimizer, where it was not measured
STOP, DRAW = 5.0, 10.0  # seconds of an end on demand, and for the pictures
START = {False: 12.0, True: 40.0}  # to the first step; compiled, with graphs of the evaluation too
WORTH = 120.0  # seconds of a run from which on compiling gains more than it takes
KEPT = ("val_bits_per_byte", "bigram_bits_per_byte", "elapsed_s", "memory_gb", "stopped_by")


def train_for_real(part: Part) -> None:
    settings = settings_of(part)
    folder = part.out / "training"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier check
    chosen = OPTIMIZERS[-1:] if part.smoke else OPTIMIZERS
    for i, name in enumerate(chosen):
        limit = (part.left() - DRAW) / (len(chosen) - i)
        if limit < 2 * START[False] and not part.smoke:
            part.report(optimizer=name, skipped=f"{limit:.0f} s left")
            continue
        with part.attempt(optimizer=name) as row:
            row |= train(folder / name, [f"optim={name}", *settings], limit)
    runs = [folder / name for name in chosen if (folder / name / FILE_NAME).is_file()]
    if runs:
        write_csv(folder / "curves.csv", curves(runs))
        part.report(curves=str(folder / "curves.csv"), picture=draw(runs, folder, part.left()))


def settings_of(part: Part) -> list[str]:
    """With what `speed` has found, so that what it has compiled serves here."""
    speed = part.of("speed")
    found = [row for row in speed if (row["size"], row["setting"]) == ("small", "ours")]
    found = [row for row in found if "tokens_per_s" in row]
    micro = ROWS if found and found[0]["micro_batch"] >= ROWS else AUTO
    kernel = found[0]["attention"] if found else "auto"
    seconds = (part.left() - DRAW) / len(OPTIMIZERS)
    compile = seconds > WORTH
    if part.smoke:
        micro, rows, steps, vocabulary, validation, compile = 2, 4, 10, 500, 1024, False
    else:
        steps = steps_in(seconds - START[compile] - STOP, update_seconds(part, compile))
        rows, vocabulary, validation = ROWS, 50257, 65536
    return [
        *("model=gpt2_small", f"model.vocab_size={vocabulary}", *toy(part.smoke)),
        *(f"train.device={part.device.type}", f"train.compile={str(compile).lower()}"),
        *(f"train.global_batch={rows}", f"train.micro_batch={micro}", f"train.steps={steps}"),
        *(f"train.attention={kernel}", f"train.eval_every={max(1, steps // 5)}"),
        *(f"train.eval_tokens={validation}", "train.sample_tokens=0", "train.checkpoint_every=0"),
        *("logging.every=1", "logging.picture=false"),
        *shlex.split(os.environ.get("DATA", "")),
    ]


def steps_in(seconds: float, update: float) -> int:
    """A fifth of the time is left for evaluations."""
    return max(20, int(0.8 * seconds / update))


def update_seconds(part: Part, compile: bool) -> float:
    """Of `ROWS` sequences with the slowest of the optimizers: by what `speed` has measured, if need
    be of the step that is compiled in the other way, or else measured now, uncompiled."""
    speed = part.of("speed")
    found = step_seconds(speed, "small", compile)
    if found is None and (other := step_seconds(speed, "small", not compile)):
        found = (SLOWER * other[0], other[1]) if not compile else other
    if found is None:
        with contextlib.redirect_stdout(sys.stderr):  # its table, into the log
            (row,) = bench_train.run([
                *("--models", "gpt2_small", "--micro-batches", str(ROWS), "--accumulation", "1"),
                *("--warm-up", "1", "--steps", "2", "--repeat", "1", "--device", part.device.type),
                *toy(part.smoke),
            ])  # fmt: skip
        if "error" in row:
            raise RuntimeError(row["error"])
        part.clear()
        found = 1e-3 * row["step_ms"] * BATCH / ROWS, 1e-3 * row["optimizer_ms"]
    whole, own = found
    known = [
        1e-3 * row["ms"]
        for row in part.of("optimizers")
        if row["size"] == "small" and row.get("optimizer") in OPTIMIZERS and "ms" in row
    ]
    return (whole - own) * ROWS / BATCH + SLOWER * max(known, default=UPDATE)


def train(run: Path, settings: list[str], limit: float) -> Row:
    """train.py from text to summary; asked to stop, as by a scheduler, if time runs out."""
    command = [sys.executable, "train.py", *settings, f"run.dir={run}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        output, _ = process.communicate(timeout=max(limit - STOP, 5.0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=2 * STOP)
    finally:
        process.kill()  # has no effect where it has ended
    if process.returncode != 0:
        raise RuntimeError(f"train.py ended with exit code {process.returncode}: see the log")
    result = json.loads(output.splitlines()[-1])
    summary = json.loads((run / "summary.json").read_text())
    rates = [r["tokens_per_s"] for r in read_metrics(run / FILE_NAME) if "tokens_per_s" in r]
    return {
        **{key: result[key] for key in ("step", "tokens", "val_loss")},
        **{key: summary[key] for key in KEPT},
        "tokens_per_s": statistics.median(rates) if rates else None,
    }


def curves(runs: list[Path]) -> list[dict[str, Any]]:
    wanted = ("train/loss", "val/loss", "lr", "grad_norm")
    return [
        {"run": run.name, "step": record["step"], "tokens": record["tokens"]}
        | {key: record.get(key) for key in wanted}
        for run in runs
        for record in read_metrics(run / FILE_NAME)
    ]


def draw(runs: list[Path], folder: Path, seconds: float) -> str:
    """Pictures, by report.compare, which wants more libraries than training does; else why not."""
    command = [sys.executable, "-m", "report.compare", *map(str, runs), f"out={folder / 'report'}"]
    try:
        result = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(seconds, 1.0)
        )
    except subprocess.TimeoutExpired:
        return "no time left"
    if result.returncode:
        return f"not drawn: {result.stderr.strip().splitlines()[-1]}"
    return str(folder / "report" / "loss_val_tokens.png")
