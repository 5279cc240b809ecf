"""A stand-in for train.py in the tests of sweeps: the contract of a run in milliseconds.

It takes key=value, holds run.dir/.run.lock while it lives, makes a step every few milliseconds,
keeps its step on the disk, stops after the present step on SIGTERM, and ends with summary.json. Its
loss is a parabola in log2(lr) around lr=0.01, plus the seed / 1000. lr=0.5 diverges, lr=0.25 fails.
The file LEDGER gets a line when it finishes.
"""

import fcntl
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

given = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
folder = Path(given["run.dir"].strip("'"))
lr, seed = float(given.get("optim.lr", 0.01)), int(given.get("seed", 0))
steps = int(given.get("train.steps", 5))
folder.mkdir(parents=True, exist_ok=True)
lock = (folder / ".run.lock").open("w")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(f"error: {folder} is in use by another process: wait for it")
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
if lr == 0.25:
    sys.exit("error: there is no such optimizer")

file = folder / "step"
step = int(file.read_text()) if file.exists() else 0
final = math.log2(lr / 0.01) ** 2 + seed / 1000
while step < steps and not stop:
    time.sleep(0.01)
    step += 1
    if lr == 0.5 and step == 2:
        sys.exit(f"error: the loss is nan at step {step}: lower optim.lr")
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"step": step, "val/loss": final + 1 / step}) + "\n")
    temporary = folder / "step.tmp"
    temporary.write_text(str(step))
    os.replace(temporary, file)
finished = step == steps
if finished:
    with open(os.environ["LEDGER"], "a") as ledger:
        ledger.write(folder.name + "\n")
summary = {"finished": finished, "step": step, "tokens": step, "elapsed_s": 0.0}
temporary = folder / "summary.tmp"
temporary.write_text(json.dumps({**summary, "val_loss": final}))
os.replace(temporary, folder / "summary.json")
