"""Everything that only a GPU can show, in one command of at most 8 minutes.

    bash scripts/gpu_check.sh [OUT_DIR]      one GPU; a table, and OUT_DIR/gpu_check.json
    bash scripts/gpu_check.sh --only speed   one part alone, which then has all the time
    bash scripts/gpu_check.sh --smoke        any machine: does the script itself work?

Five parts, each a process with a time budget of its own, so that a crash, a hang or a full memory
costs the rest nothing; the JSON is written after each of them. The exit code is 0 if every part
ended well and nothing failed.

    card         name, versions, memory; the matrix-product and copy rates that the rest is held to
    claims       scripts/gpu_invariants.py, what the tests marked gpu run
    optimizers   one update of each optimizer, as a multiple of torch's fused AdamW beside it
    training     a short real run of train.py
    speed        tokens/s, MFU and memory per model size: ours eager, ours compiled, and plain,
                 which is the same network as nanoGPT trains it

The last part takes whatever time is left. Rows that were not reached say so: compiling everything
takes longer than 8 minutes, so what is asked for most often comes first.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import torch

from runtime.describe import aligned
from runtime.device import best_device
from runtime.files import write_json
from scripts.gpu_parts import (
    ROOT,
    Part,
    Row,
    card,
    hold_claims,
    measure_speed,
    short,
    time_optimizers,
    train_briefly,
)

WHOLE = 475.0  # seconds for all parts together
GRACE = 10.0  # seconds between a part's own deadline and its end by force

PARTS: dict[str, tuple[Callable[[Part], None], float]] = {  # and seconds
    "card": (card, 20.0),
    "claims": (hold_claims, 70.0),
    "optimizers": (time_optimizers, 80.0),
    "training": (train_briefly, 75.0),
    "speed": (measure_speed, 225.0),
}


def run_part(name: str, seconds: float, smoke: bool, log: IO[str], scratch: Path) -> Row:
    """Run a part in a process of its own; what it reported, and how it ended."""
    print(f"\n== {name} (at most {seconds:.0f} s)", flush=True)
    file, start = scratch / f"{name}.jsonl", time.monotonic()
    command = [sys.executable, "-m", "scripts.gpu_check", str(file)]
    command += ["--part", name, "--seconds", str(seconds), *(["--smoke"] if smoke else [])]
    # compiled kernels in the scratch folder: every check starts cold, and its times say so
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")}
    if smoke:
        environment["OMP_NUM_THREADS"] = "1"  # threads that wait for busy cores take for ever
    log.write(f"\n== {name}\n")
    log.flush()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=log, start_new_session=True
    )
    ended: str | None = None
    try:
        if process.wait(timeout=seconds + GRACE) != 0:
            ended = f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        ended = "stopped: it did not end in time"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the compiler's workers
            process.wait()
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if ended is not None:
        print(f"   {ended}; the log says more", flush=True)
    return {"seconds": round(time.monotonic() - start, 1), "failed": ended, "rows": rows}


def work(name: str, seconds: float, smoke: bool, file: Path) -> None:
    """The body of a part's process."""
    if smoke and name != "claims":
        torch.compiler.set_stance("force_eager")  # compiling is slow: one claim does, as a sample
    with file.open("w") as rows:
        deadline = time.monotonic() + seconds
        PARTS[name][0](Part(torch.device(best_device()), deadline, smoke, rows))


def add_mfu(parts: dict[str, Row]) -> None:
    """Rates of `speed` as shares of what the card can do, which is `card`'s to say."""
    if "card" not in parts or not parts["card"]["rows"]:
        return
    rates = parts["card"]["rows"][0]
    for row in parts.get("speed", {"rows": []})["rows"]:
        if "palm_tflops" in row:
            row["of_matmul"] = row["causal_tflops"] / rates["bf16_matmul_tflops"]
            if rates["datasheet_tflops"] is not None:
                row["mfu"] = row["palm_tflops"] / rates["datasheet_tflops"]


COLUMNS = {
    "card": "device bf16_matmul_tflops datasheet_tflops copy_tb_per_s memory_gb torch cuda",
    "claims": "claim seconds error",
    "optimizers": "size mode optimizer ms times_fused mean_ms first_s waits compiles_again error",
    "training": "model step tokens_per_s memory_gb val_bits_per_byte bigram_bits_per_byte error",
    "speed": "size setting micro_batch tokens_per_s mfu of_matmul memory_gb first_step_s error",
}


def tables(parts: dict[str, Row]) -> str:
    """What a person reads at the end: a table per part."""
    return "\n\n".join(_table(COLUMNS[name].split(), parts[name]["rows"]) for name in parts)


def _table(columns: list[str], rows: list[Row]) -> str:
    lines = [[short(row.get(c, row.get("skipped", "-"))) for c in columns] for row in rows]
    return aligned([columns, *lines])


def ended_well(part: Row) -> bool:
    return part["failed"] is None and not any("error" in row for row in part["rows"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder for gpu_check.json and gpu_check.log")
    parser.add_argument("--only", choices=PARTS, help="this part, after the card")
    parser.add_argument("--smoke", action="store_true", help="toy sizes on whatever there is")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in its own process
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part is not None:
        work(arguments.part, arguments.seconds, arguments.smoke, arguments.out)
        return 0
    if not torch.cuda.is_available() and not arguments.smoke:
        print("error: torch sees no CUDA device; --smoke tries the script without", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the part at work ends too
    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen = (
        list(PARTS) if arguments.only is None else list(dict.fromkeys(["card", arguments.only]))
    )
    begin, parts = time.monotonic(), dict[str, Row]()
    result = {"date_utc": datetime.now(UTC).isoformat(timespec="seconds"), "smoke": arguments.smoke}
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,
        (arguments.out / "gpu_check.log").open("w") as log,
    ):
        for name in chosen:
            left = WHOLE - GRACE - (time.monotonic() - begin)
            seconds = left if name == chosen[-1] else min(PARTS[name][1], left)
            parts[name] = run_part(name, seconds, arguments.smoke, log, Path(scratch))
            add_mfu(parts)
            result |= {"seconds": round(time.monotonic() - begin, 1), "parts": parts}
            write_json(arguments.out / "gpu_check.json", result)
    print(f"\n{tables(parts)}\n")
    print(f"{time.monotonic() - begin:.0f} s; everything is in {arguments.out}/gpu_check.json")
    return 0 if all(map(ended_well, parts.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
