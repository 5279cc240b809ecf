"""Publish a finished study: its runs without what is large or private, the tables, the pictures.

    bash scripts/study.sh runs/study
    python -m scripts.publish_study runs/study docs/results

The first argument is a folder of sweeps as scripts.sweep leaves them; the second is written to:

- runs/<sweep>/<trial>/: each run's configuration, metrics, summary and environment. Checkpoints and
  logs are left out, and of absolute paths all but the last part.
- trials.csv, sweep.csv, sweep.png, and runs.csv, settings.csv, loss.png, final.png: what
  report.sweep and report.compare make of those runs.
- README.md: the table between its two marks; the rest of the page is yours.

What is there already is replaced, but nothing is deleted: runs there that the study does not have
are an error. Runs that lie where they would be published (docs/results/runs docs/results) are left
as they are: tables and pictures are made again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from report import compare, sweep
from report.comparison import compare as compared
from report.figures import drawing
from report.runs import CONFIG, ENVIRONMENT, SUMMARY, TRAJECTORY, VAL, find_runs, read_runs
from runtime.config import flatten
from runtime.files import atomic_write_text
from runtime.metrics import FILE_NAME
from scripts.pages import END, around, begin, markdown

TEXTS = (CONFIG, FILE_NAME, SUMMARY, TRAJECTORY, ENVIRONMENT)
SWEEP, JOURNAL, BEST = "sweep.json", "trials.jsonl", "best_runs.txt"
SHOWN = {
    "sweep": {"sweep.csv": "sweep.csv", "trials.csv": "trials.csv", "sweep.png": "sweep.png"},
    "compare": {
        "settings.csv": "settings.csv",
        "runs.csv": "runs.csv",
        "final.png": "final.png",
        "loss_val_tokens.png": "loss.png",
    },
}
SCRIPT = "publish_study"
PAGE = f"""# A study of optimizers

{begin(SCRIPT)}
{END}

Final validation loss in nats per token, mean over seeds with its 95 % interval; p adjusted by
Holm's method; the last column is how many times fewer tokens reach the baseline's final loss.

![validation loss against tokens](loss.png)
![final loss of each seed](final.png)
![the sweeps](sweep.png)
"""


def main(argv: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "scripts.publish_study", description=__doc__, formatter_class=form
    )
    parser.add_argument("study", type=Path, help="the folder of its sweeps")
    parser.add_argument("out", type=Path, help="where to publish it")
    args = parser.parse_args(argv)
    try:
        before, after = read_page(args.out / "README.md")
        if args.study.resolve() != (args.out / "runs").resolve():
            copy(args.study, args.out / "runs")
        analyse(args.out)
        atomic_write_text(args.out / "README.md", f"{before}{table(args.out)}{after}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.out}")
    return 0


# ---- the runs ------------------------------------------------------------------------------------


def copy(study: Path, out: Path) -> None:
    """The sweeps of ``study`` into ``out``. ValueError for a study that has not ended, and for runs
    in ``out`` that it does not have."""
    sweeps = sorted(file.parent for file in study.glob(f"*/{JOURNAL}"))
    if not sweeps:
        raise ValueError(f"{study} has no sweep in it: expected <sweep>/{JOURNAL}")
    for each in sweeps:
        if not (each / BEST).exists() or not (each / BEST).read_text():
            raise ValueError(f"{each / BEST} names no run: continue the sweep until it has ended")
    trials = {each: list(find_runs(each)) for each in sweeps}
    for each in sweeps:
        ended = {json.loads(line)["trial"] for line in (each / JOURNAL).read_text().splitlines()}
        if going := [trial for trial in trials[each] if trial.name not in ended]:
            raise ValueError(f"{going[0]} has not ended: continue the sweep until it has")
    there = {f.relative_to(out) for f in find_runs(out)} if out.is_dir() else set()
    if other := there - {t.relative_to(study) for each in trials.values() for t in each}:
        raise ValueError(f"{out / min(other)} is not in {study}: remove it, or publish elsewhere")
    for each in sweeps:
        copy_sweep(each, trials[each], Path(os.path.relpath(out / each.name)))


def copy_sweep(folder: Path, trials: Sequence[Path], out: Path) -> None:
    known: dict[str, str] = {}
    for trial in trials:
        target = out / trial.name
        target.mkdir(parents=True, exist_ok=True)
        known |= (words := shorter(trial, target))
        for name in TEXTS:
            if (trial / name).exists():
                text = replaced((trial / name).read_text(), words)
                text = without_folders(text) if name == ENVIRONMENT else text
                atomic_write_text(target / name, text, durable=False)
    for name in (SWEEP, JOURNAL):
        text = replaced((folder / name).read_text(), known)
        atomic_write_text(out / name, text, durable=False)
    best = [out / Path(line).name for line in (folder / BEST).read_text().splitlines()]
    atomic_write_text(out / BEST, "".join(f"{run}\n" for run in best), durable=False)


def shorter(trial: Path, published: Path) -> dict[str, str]:
    """What to write in place of the paths in a run's files."""
    settings = flatten(yaml.safe_load((trial / CONFIG).read_text()))
    environment = trial / ENVIRONMENT
    command = json.loads(environment.read_text())["command"] if environment.exists() else ""
    paths = {text for text in (*strings(settings), *shlex.split(command)) if text.startswith("/")}
    return {path: Path(path).name for path in paths} | {settings["run.dir"]: str(published)}


def strings(settings: Mapping[str, Any]) -> Iterator[str]:
    for value in settings.values():
        yield from (v for v in (value if isinstance(value, list) else [value]) if type(v) is str)


def replaced(text: str, words: Mapping[str, str]) -> str:
    for word in sorted(words, key=len, reverse=True):  # a folder after what lies in it
        text = text.replace(word, words[word])
    return text


def without_folders(environment: str) -> str:
    """Variables that are folders of the machine, such as caches, become empty."""
    table = json.loads(environment)
    variables = table.get("variables", {})
    table["variables"] = {k: "" if v.startswith("/") else v for k, v in variables.items()}
    return json.dumps(table, indent=2) + "\n"


# ---- tables and pictures -------------------------------------------------------------------------


def analyse(out: Path) -> None:
    """CSV files and pictures of ``out``/runs, as the two reports make them."""
    folder = Path(os.path.relpath(out / "runs"))
    runs, skipped = sweep.with_journal(*read_runs([folder]), [folder])
    best = [
        line for file in sorted(folder.glob(f"*/{BEST}")) for line in file.read_text().splitlines()
    ]
    found = compared(read_runs(map(Path, best))[0], references=False)
    if found.metric != VAL:
        raise ValueError(f"{folder}: the runs have no validation loss (train.eval_every)")
    with tempfile.TemporaryDirectory() as name, drawing():
        reports = Path(name)
        sweep.write(sweep.analyse(runs), VAL, skipped, reports / "sweep", "")
        compare.write(found, reports / "compare", "")
        for report, files in SHOWN.items():
            for made, shown in files.items():
                shutil.copyfile(reports / report / made, out / shown)


def read_page(file: Path) -> tuple[str, str]:
    """What stands before and after the table of a page, of a new one if there is none."""
    try:
        return around(file.read_text() if file.exists() else PAGE, SCRIPT)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def table(out: Path) -> str:
    """One row per setting, best first: what settings.csv says, and how many runs its sweep took."""
    settings, runs, trials = (
        list(csv.DictReader((out / f"{name}.csv").read_text().splitlines()))
        for name in ("settings", "runs", "trials")
    )
    took = Counter(Path(trial["run"]).parent for trial in trials)
    sweeps = {run["setting"]: Path(run["run"]).parent for run in runs}
    base = settings[0]["baseline"]
    rows = [["setting", "lr", "runs", "final validation loss", f"difference to {base}"]]
    rows[0] += ["p (Holm)", f"tokens to {base}'s loss"]
    for row in settings:
        itself = row["setting"] == base
        rows.append(
            [
                row["setting"],
                f"{float(row['lr']):g}",
                str(took[sweeps[row["setting"]]]),
                estimate(row, "final", ".3f"),
                "baseline" if itself else estimate(row, "difference", "+.3f"),
                f"{float(row['p_holm']):.2g}" if row["p_holm"] else "",
                "1" if itself else estimate(row, "token_speedup", ".2f") or "not reached",
            ]
        )
    return markdown(rows)


def estimate(row: Mapping[str, str], name: str, form: str) -> str:
    """A mean and its interval, as far as they are known."""
    value, low, high = (row[f"{name}{part}"] for part in ("", "_low", "_high"))
    if not value:
        return ""
    interval = f" [{float(low):{form}}, {float(high):{form}}]" if low and high else ""
    return f"{float(value):{form}}{interval}"


if __name__ == "__main__":
    sys.exit(main())
