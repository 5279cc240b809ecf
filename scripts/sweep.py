"""A sweep whose trials are commands of their own: on several GPUs each, or side by side.

A grid, one trial after another; beyond its edges as far as needed, finer around the best, then more
seeds there:

    python -m scripts.sweep runs/lr +sweep=lr_adamw
    python -m scripts.sweep runs/lr +sweep=lr_adamw --extend optim.lr --refine 1 --then seed=2,3

Eight GPUs, two per trial, four at a time; a search by Optuna; trials through Slurm:

    python -m scripts.sweep runs/lr +sweep=lr_muon --gpus all --nproc 2
    python -m scripts.sweep runs/hp 'optim.lr=tag(log,interval(1e-4,1e-2))' --search 40 --jobs 2
    python -m scripts.sweep runs/lr +sweep=lr_muon --jobs 4 \\
        --command "srun -N1 --gpus=8 torchrun --standalone --nproc_per_node=8 train.py"

Each trial is an ordinary run, in a folder named by its values. trials.jsonl has a line for each
that has ended: finished, diverged, failed, pruned; none of these stops the others. The same command
again continues a sweep that was stopped or killed: what has ended is not run again, what had begun
goes on from its checkpoint. Ctrl-C and SIGTERM stop the trials after their present step.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from tqdm import tqdm

from runtime.cli import MISTAKES, one_line
from runtime.files import atomic_write_text, write_json
from runtime.run import LOCK, SUMMARY
from runtime.stop import StopRequest
from scripts.compose import ROOT, compose_config, compose_tree
from scripts.sweep_plan import Grid, Journal, Trial, listed, split_overrides

DIVERGED = re.compile(r"is (nan|inf|-inf) at step")
TRIES = 3  # starts of a trial that something kills (memory, a node)
POLL = 0.2  # seconds
REFINE = (
    "N times, once KEY's best value lies inside the grid: the values halfway (geometric means) "
    "between it and its neighbours; 1 makes a factor of 2 one of 1.41, 2 of 1.19"
)


class Plan(Protocol):
    def next(self) -> Trial | None: ...
    def total(self) -> int: ...
    def best(self) -> list[Trial]: ...
    def hopeless(self, trial: Trial, folder: Path) -> bool: ...
    def ended(self, trial: Trial) -> None: ...


@dataclass
class Running:
    """A trial under way. ``process`` is None while a run that outlived an earlier sweep goes on."""

    trial: Trial
    folder: Path
    slot: dict[str, str]  # what the environment of its process has of its own
    process: subprocess.Popen[bytes] | None = None
    tries: int = 0
    said: int = 0  # where the output of its last start begins in its log
    pruned: bool = False


class Sweep:
    def __init__(
        self, folder: Path, command: Sequence[str], plan: Plan, journal: Journal, slots: list[Any]
    ) -> None:
        self.folder, self.command, self.plan, self.journal = folder, command, plan, journal
        self.slots: list[dict[str, str]] = list(slots)  # those that are free
        self.running: list[Running] = []
        (folder / "logs").mkdir(exist_ok=True)

    def run(self) -> bool:
        """Until nothing is left to do (True) or a signal asks to stop (False)."""
        stopping = False
        with StopRequest() as stop, tqdm(desc="trials", unit="trial", disable=None) as bar:
            while True:
                if stop.requested is not None and not stopping:
                    stopping = True
                    bar.write(f"{stop.requested}: stopping the trials after their present step")
                    for running in self.running:
                        self._stop(running)
                while not stopping and self.slots and (trial := self.plan.next()) is not None:
                    running = Running(trial, self.folder / trial.name, self.slots.pop(0))
                    self.running.append(running)
                    self._start(running)
                bar.total, bar.n = self.plan.total(), len(self.journal.ended)
                bar.refresh()
                if not self.running:
                    return not stopping
                time.sleep(POLL)
                for running in list(self.running):
                    if self._is_over(running, stopping):
                        self.running.remove(running)
                        self.slots.append(running.slot)
                        self.plan.ended(running.trial)
                        bar.write(self._told(running.trial))

    def _start(self, running: Running) -> None:
        if held(running.folder) or self._summary(running)["finished"]:
            return  # it outlived the sweep that began it
        running.tries += 1
        command = [*self.command, *running.trial.overrides, f"run.dir={quoted(running.folder)}"]
        with (self.folder / "logs" / f"{running.trial.name}.log").open("ab") as log:
            running.said = log.tell()
            # A session of its own: Ctrl-C reaches the sweep alone, which passes it on once.
            running.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **running.slot},
                start_new_session=True,
            )

    def _stop(self, running: Running) -> None:
        if running.process is not None and running.process.poll() is None:
            running.process.send_signal(signal.SIGTERM)

    def _is_over(self, running: Running, stopping: bool) -> bool:
        """Whether this sweep is done with the trial; if it has ended, the journal says so."""
        if running.process is None:
            if not held(running.folder) and not self._finished(running) and not stopping:
                self._start(running)
            return stopping or running.trial.name in self.journal.ended
        code = running.process.poll()
        if code is None:
            if not running.pruned and not stopping:
                running.pruned = self.plan.hopeless(running.trial, running.folder)
                if running.pruned:
                    self._stop(running)
            return False
        if self._finished(running):
            return True
        if running.pruned:
            self.journal.add(running.trial, status="pruned")
            return True
        if stopping or code == 0:  # asked to stop, by this sweep or alone: to be continued
            return True
        said = self._said(running)
        if code < 0 and running.tries < TRIES:  # killed: by a lack of memory, perhaps
            self._start(running)
            return False
        if "is in use by another process" in said:  # begun by a sweep that was killed just before
            running.process = None
            return False
        status = "diverged" if DIVERGED.search(said) else "failed"
        error = f"killed by signal {-code}" if code < 0 else last_error(said)
        self.journal.add(running.trial, status=status, exit_code=code, error=error)
        return True

    def _summary(self, running: Running) -> dict[str, Any]:
        file = running.folder / SUMMARY
        return json.loads(file.read_text()) if file.exists() else {"finished": False}

    def _finished(self, running: Running) -> bool:
        summary = self._summary(running)
        if summary["finished"]:
            figures = {k: summary[k] for k in ("val_loss", "step", "tokens", "elapsed_s")}
            self.journal.add(running.trial, status="finished", **figures)
        return bool(summary["finished"])

    def _said(self, running: Running) -> str:
        """What its last start printed, the end of it."""
        text = (self.folder / "logs" / f"{running.trial.name}.log").read_bytes()[running.said :]
        return text[-20_000:].decode(errors="replace")

    def _told(self, trial: Trial) -> str:
        record = self.journal.ended.get(trial.name)
        if record is None:
            return f"{trial.name}: stopped; the same sweep continues it"
        what = record.get("error") or f"validation loss {record.get('val_loss')}"
        return f"{trial.name}: {record['status']}, {what}"


def held(folder: Path) -> bool:
    """Whether a living process holds the run in ``folder``."""
    if not (folder / LOCK).exists():
        return False
    with (folder / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def last_error(said: str) -> str:
    """The program's own last line of complaint, else the last line there is."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:") or "Error" in line]
    return [*lines, *errors][-1][:500] if lines else "it printed nothing"


def quoted(path: Path) -> str:
    """A path as a Hydra value."""
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"


def slots(jobs: int | None, gpus: str | None, processes: int) -> list[dict[str, str]]:
    """One environment per trial that runs at a time: its GPUs, and its share of the CPU's threads.

    Threads of two processes that fight for a core make both many times slower.
    """
    cores = len(os.sched_getaffinity(0))
    if gpus == "all":
        import torch

        gpus = ",".join(map(str, range(torch.cuda.device_count())))
    devices = gpus.split(",") if gpus else []
    if gpus is not None and len(devices) < processes:
        raise ValueError(f"--gpus={gpus} are fewer than the --nproc={processes} that a trial needs")
    count = jobs or max(1, len(devices) // processes)
    if devices and count * processes > len(devices):
        raise ValueError(
            f"--jobs={count} trials of --nproc={processes} need {count * processes} GPUs, "
            f"--gpus has {len(devices)}"
        )
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // (count * processes))))
    shared = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
    share = len(devices) // count
    return [
        {**shared, "CUDA_VISIBLE_DEVICES": ",".join(devices[i * share : (i + 1) * share])}
        if devices
        else dict(shared)
        for i in range(count)
    ]


def command(args: argparse.Namespace) -> list[str]:
    if args.command:
        return shlex.split(args.command)
    if args.nproc == 1:
        return [sys.executable, str(ROOT / "train.py")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc_per_node={args.nproc}", str(ROOT / "train.py")]


def lock(folder: Path) -> IO[str]:
    """One sweep per folder at a time."""
    file = (folder / ".sweep.lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder} is in use by another sweep: wait for it") from None
    return file


def check_same(folder: Path, fixed: Sequence[str]) -> None:
    """Trials of one folder share their other settings; values may be added."""
    file = folder / "sweep.json"
    if file.exists() and (before := json.loads(file.read_text())["overrides"]) != list(fixed):
        raise ValueError(
            f"{folder} holds a sweep with other settings, {' '.join(before) or 'none'}; now "
            f"{' '.join(fixed) or 'none'}: choose another folder"
        )
    write_json(file, {"overrides": list(fixed)})


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("scripts.sweep", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("folder", type=Path, help="where the trials live")
    add("overrides", nargs="*", help="as for train.py; with several values: swept over")
    add("--search", type=int, metavar="N", help="N trials by Optuna, the hopeless ones stopped")
    add("--extend", metavar="KEY", help="go beyond the grid while KEY's best value is at its edge")
    add("--limit", type=int, default=6, help="values that --extend adds at most (6)")
    add("--refine", type=int, default=0, metavar="N", help=REFINE)
    add("--then", action="append", default=[], help="at the best value: seed=2,3")
    add("--jobs", type=int, help="trials at a time (1, or what the GPUs allow)")
    add("--gpus", help="0,1,2,3 or all: divided among the trials")
    add("--nproc", type=int, default=1, help="processes (GPUs) of a trial, started by torchrun")
    add("--command", help="what starts a trial, in place of train.py; the overrides follow it")
    add("--retry-failed", action="store_true", help="run trials that failed once more")
    add("--dry-run", action="store_true", help="print the commands of the grid")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        return sweep(args)
    except MISTAKES as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1


def sweep(args: argparse.Namespace) -> int:
    fixed, swept = split_overrides(args.overrides)
    params = compose_tree(fixed).hydra.sweeper.params or {}
    swept = {**split_overrides([f"{k}={v}" for k, v in params.items()])[1], **swept}
    if not swept:
        raise ValueError("nothing to sweep over: give a key several values, optim.lr=1e-3,3e-3")
    args.folder.mkdir(parents=True, exist_ok=True)
    with lock(args.folder):
        journal = Journal(args.folder / "trials.jsonl")
        if args.search:
            if args.extend or args.refine or args.then:
                raise ValueError("--extend, --refine and --then need a grid, --search has none")
            plan: Plan = search(args.folder, swept, args.search, journal)
        else:
            plan = planned = grid(args, listed(swept), journal)
            for candidate in planned.wanted():  # every mistake is found before the first trial
                compose_config([*fixed, *candidate.overrides])
                if args.dry_run:
                    print(shlex.join([*command(args), *fixed, *candidate.overrides]))
        if args.dry_run:
            return 0
        check_same(args.folder, fixed)
        if args.retry_failed:
            journal.forget(["failed"])
        places = slots(args.jobs, args.gpus, args.nproc)
        whole = Sweep(args.folder, [*command(args), *fixed], plan, journal, places).run()
    print(json.dumps(result(args.folder, journal, plan.best())), flush=True)
    return 0 if whole else 130


def search(*arguments: Any) -> Plan:
    try:
        from scripts.sweep_search import Search
    except ModuleNotFoundError as error:
        raise ValueError(f"--search: {error}; pip install -r requirements-sweep.txt") from None
    return Search(*arguments)


def grid(args: argparse.Namespace, values: dict[str, list[str]], journal: Journal) -> Grid:
    """The plan of a grid. ValueError for options that do not fit together."""
    then = listed(split_overrides(args.then)[1])
    then |= {k: [v] for k, _, v in (o.partition("=") for o in split_overrides(args.then)[0])}
    if args.extend and args.extend not in values:
        raise ValueError(f"--extend={args.extend} is not swept over: {', '.join(values)} are")
    if then and not args.extend:
        raise ValueError("--then needs --extend KEY: the key whose best value it takes")
    if args.refine and not args.extend:
        raise ValueError("--refine needs --extend KEY: the key whose grid it refines")
    if args.refine < 0:
        raise ValueError(f"--refine={args.refine}: expected how many times to refine, 0 or more")
    try:
        list(map(float, values[args.extend] if args.extend else ()))
    except ValueError as error:
        raise ValueError(f"--extend={args.extend}: {error}; expected numbers") from None
    return Grid(values, journal, args.extend, args.limit, then, args.refine)


def result(folder: Path, journal: Journal, best: Sequence[Trial]) -> dict[str, Any]:
    """The last line that is printed. The folders of the best trials, a line each, are also in
    best_runs.txt: python -m report.compare $(cat DIR/best_runs.txt) out=..."""
    counts = Counter(record["status"] for record in journal.ended.values())
    runs = [str(folder / trial.name) for trial in best]
    atomic_write_text(folder / "best_runs.txt", "".join(f"{run}\n" for run in runs))
    return {"sweep_dir": str(folder), "trials": dict(counts), "best_runs": runs}


if __name__ == "__main__":
    sys.exit(main())
