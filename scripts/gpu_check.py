"""Everything that only a GPU can show, in one command of at most 8 minutes.

    bash scripts/gpu_check.sh [OUT_DIR]      one GPU; tables, and all of it in OUT_DIR
    bash scripts/gpu_check.sh --only speed   one part alone, which then has all the time
    bash scripts/gpu_check.sh --minutes 30   more time, from which the last part gains most
    bash scripts/gpu_check.sh --smoke        any machine: does the script itself work?

Five parts, most important first, each a process with a time budget of its own, so that a crash, a
hang or a full memory costs the rest nothing:

    card         name, versions, memory; the matrix-product and copy rates that the rest is held to
    speed        scripts/gpu_speed.py: tokens/s, MFU, memory, compile time by model size, and plain,
                 which is the same network as nanoGPT trains it; a start of train.py, cold and warm
    optimizers   scripts/gpu_optimizers.py: one update of each optimizer; symmetric products
    claims       scripts/gpu_claims.py, what the tests marked gpu hold
    training     scripts/gpu_training.py: real runs of train.py with three optimizers, their curves

Time that a part leaves goes to those after it. Rows that were not reached say so: compiling
everything takes longer than 8 minutes, so what a target wants comes first in each part
(scripts/gpu_plan.py); what each technique gained wants `--only speed`.

OUT_DIR gets gpu_check.json (every figure, and each target with its verdict), benchmarks.md (the
same as tables), gpu_check.log, and training/ with runs, curves.csv and pictures. JSON and tables
are written after each part; parts/ has each row as soon as it is measured. The exit code is 0 if
every part ended well and nothing failed; a target that is missed is a verdict, not a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from runtime.device import best_device
from runtime.files import atomic_write_text, write_json
from scripts.gpu_optimizers import time_optimizers
from scripts.gpu_parts import Part, Row, card, hold_claims, read_rows
from scripts.gpu_speed import measure_speed
from scripts.gpu_targets import document, text_table, used, verdicts
from scripts.gpu_training import train_for_real

LOG = "gpu_check.log"
MINUTES = 7.8  # for all parts together
GRACE = 10.0  # seconds between a part's own deadline and its end by force

PARTS: dict[str, tuple[Callable[[Part], None], float]] = {  # and share of the time
    "card": (card, 0.08),
    "speed": (measure_speed, 0.50),
    "optimizers": (time_optimizers, 0.12),
    "claims": (hold_claims, 0.10),
    "training": (train_for_real, 0.20),
}


def run_part(name: str, seconds: float, smoke: bool, out: Path) -> Row:
    """Run a part in a process of its own; what it reported, and how it ended."""
    print(f"\n== {name} (at most {seconds:.0f} s)", flush=True)
    file, start = out / "parts" / f"{name}.jsonl", time.monotonic()
    # without a GPU, which does not survive a fork, all but the first save seconds of imports
    fork = smoke and name != "card" and not torch.cuda.is_available()
    context: Any = multiprocessing.get_context("fork" if fork else "spawn")
    process = context.Process(target=work, args=(name, seconds, smoke, file, out))
    process.start()
    ended: str | None = None
    try:
        process.join(seconds + GRACE)
        if process.exitcode is None:
            ended = "stopped: it did not end in time"
        elif process.exitcode != 0:
            ended = f"exit code {process.exitcode}"
    finally:
        if process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the compiler's workers
            process.kill()
            process.join()
    if ended is not None:
        print(f"   {ended}; the log says more", flush=True)
    took = round(time.monotonic() - start, 1)
    return {"seconds": took, "failed": ended, "rows": read_rows(file)}


def work(name: str, seconds: float, smoke: bool, file: Path, out: Path) -> None:
    """The body of a part's process, the first of a group. What it says on stderr is in the log."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork has its parent's
    with (out / LOG).open("a") as stream:
        stream.write(f"\n== {name}\n")
        stream.flush()
        os.dup2(stream.fileno(), sys.stderr.fileno())
    deadline = time.monotonic() + seconds
    if smoke:
        torch.set_num_threads(1)  # a fork has not read OMP_NUM_THREADS
    if smoke and name in ("speed", "claims"):
        torch.compiler.set_stance("force_eager")  # compiling is slow, importing the compiler too
    gc.collect()
    gc.freeze()  # torch itself: half a second each of the fifty times that a part collects garbage
    with file.open("w") as rows:
        device = torch.device(best_device())
        PARTS[name][0](Part(device, deadline, smoke, rows, out, file.parent))


def tables(result: Row) -> str:
    """What a person reads at the end: a table per part, and the verdicts."""
    parts = result["parts"]
    found = [text_table(used(name, part["rows"]), part["rows"]) for name, part in parts.items()]
    return "\n\n".join([*found, text_table(list(result["verdicts"][0]), result["verdicts"])])


def ended_well(part: Row) -> bool:
    return part["failed"] is None and not any("error" in row for row in part["rows"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder for all that is found")
    parser.add_argument("--only", choices=PARTS, help="this part, after the card")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--smoke", action="store_true", help="toy sizes on whatever there is")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.smoke:
        print("error: torch sees no CUDA device; --smoke tries the script without", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the part at work ends too
    shutil.rmtree(args.out / "parts", ignore_errors=True)  # of an earlier check
    (args.out / "parts").mkdir(parents=True)
    chosen = list(PARTS) if args.only is None else list(dict.fromkeys(["card", args.only]))
    result = check(chosen, 60 * args.minutes, args.smoke, args.out)
    print(f"\n{tables(result)}\n")
    print(f"{result['seconds']:.0f} s; everything is in {args.out}")
    return 0 if all(map(ended_well, result["parts"].values())) else 1


def check(chosen: list[str], whole: float, smoke: bool, out: Path) -> Row:
    """Run the parts within ``whole`` seconds; all that was found, as it is in gpu_check.json."""
    begin, parts = time.monotonic(), dict[str, Row]()
    result: Row = {"date_utc": datetime.now(UTC).isoformat(timespec="seconds"), "smoke": smoke}
    (out / LOG).write_text("")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        # for the parts: prepared data, and compiled kernels, so that every check starts cold
        os.environ |= {
            "GPT2_BENCH_CACHE": scratch,
            "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
        }
        if smoke:
            os.environ["OMP_NUM_THREADS"] = "1"  # threads that wait for busy cores take for ever
        for i, name in enumerate(chosen):
            left = whole - GRACE - (time.monotonic() - begin)
            own = PARTS[name][1] / sum(PARTS[other][1] for other in chosen[i:])
            parts[name] = run_part(name, own * left, smoke, out)
            result |= {"seconds": round(time.monotonic() - begin, 1), "parts": parts}
            rows = {name: part["rows"] for name, part in parts.items()}
            result["verdicts"] = verdicts(rows)
            write_json(out / "gpu_check.json", result)
            atomic_write_text(out / "benchmarks.md", document(result))
    return result


if __name__ == "__main__":
    sys.exit(main())
