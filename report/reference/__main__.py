"""Show the published curves, or put them beside your own runs in Weights & Biases.

    python -m report.reference list [CURVE ...]
    python -m report.reference wandb [CURVE ...] project=gpt2-bench mode=offline dir=wandb

CURVE is a curve's number, set or name, with * and ? as wildcards, such as mars/readme-table or
'mars*/gpt2-small/*'. `list` shows all curves without one, `wandb` writes all losses of language
models that have tokens. Each becomes one run of the project, in the group of its set, tagged
"reference", with step, tokens and val/loss as a run of ours has them: choose `tokens` as the x axis
of a panel to see both. The id of such a run is that of its curve, so that a curve already there is
not written twice.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from report.options import run_command
from report.reference import Curve, curves, find

ACTIONS = ("list", "wandb")
MODES = ("offline", "online")
SERIES = {"train_loss": "train/loss"}  # metric -> name of the series; every other loss is val/loss


@dataclass(frozen=True)
class Options:
    project: str = "gpt2-bench"
    mode: str = "offline"
    dir: str = "."  # below it wandb makes its folder wandb/


def table(chosen: Sequence[Curve]) -> str:
    """A line a curve, sets apart."""
    lines: list[str] = []
    for name in dict.fromkeys(curve.set for curve in chosen):
        members = [curve for curve in chosen if curve.set == name]
        lines += ["", f"{name}  ({members[0].source})"]
        for c in members:
            about = f"{c.model} {c.dataset} {c.optimizer}"
            variant = f"; {c.variant}" if c.variant else ""
            lines.append(f"  {c.curve}  {about:<44} {_values(c)}  [{c.confidence}]{variant}")
    return "\n".join(lines[1:])


def _values(curve: Curve) -> str:
    count = len(curve.values)
    points = f"{count} points, last " if count > 1 else ""
    tokens = curve.tokens[-1]
    at = f" at {tokens / 1e9:.4g}B tokens" if np.isfinite(tokens) else ""
    return f"{curve.metric} {points}{curve.values[-1]:g}{at}"


def records(curve: Curve) -> Iterator[dict[str, float]]:
    """The curve's points as the lines of a metrics.jsonl. Without a step, its share of the tokens
    of 491,520 a step stands in (the batch of MARS), so that wandb's own axis works too."""
    for tokens, step, loss in zip(curve.tokens, curve.steps, curve.losses, strict=True):
        if np.isfinite(tokens):
            number = step if np.isfinite(step) else round(tokens / 491_520)
            series = SERIES.get(curve.metric, "val/loss")
            yield {"step": int(number), "tokens": int(tokens), series: float(loss)}


def write_wandb(chosen: Iterable[Curve], project: str, mode: str, folder: Path) -> list[Path]:
    """One wandb run per curve, offline or online; returns their folders. Online it raises
    what wandb raises without a key or a server."""
    os.environ["WANDB_SILENT"] = "true"
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    folders = []
    for curve in tqdm(list(chosen), "curves", disable=None):
        run: Any = wandb.init(
            project=project,
            mode=mode,  # type: ignore[arg-type]
            dir=folder,
            id=f"reference-{curve.curve}",
            name=f"{curve.name} {curve.curve}",
            group=f"reference {curve.set}",
            tags=["reference", curve.model, curve.optimizer[:64]],
            notes=f"{curve.label}. {curve.confidence}. {curve.source}",
            config={name: getattr(curve, name) for name in _ABOUT},
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(console="off", silent=True),
        )
        if not run.resumed:  # a curve that is there already has its points
            run.define_metric("*", step_metric="step")
            for record in records(curve):
                run.log(record)
        folders.append(Path(run.dir).parent)
        run.finish()
    return folders


_ABOUT = (
    *("curve", "set", "paper", "model", "dataset", "optimizer", "variant", "metric", "confidence"),
    *("source", "noise"),
)


def main(words: list[str], options: Options) -> None:
    action, *names = words or [""]
    if action not in ACTIONS:
        raise ValueError(f"expected one of {', '.join(ACTIONS)}, got {action or 'nothing'}")
    if options.mode not in MODES:
        raise ValueError(f"mode={options.mode}: expected one of {', '.join(MODES)}")
    chosen = find(names) if names else list(curves())
    if action == "list":
        print(table(chosen))
        return
    writable = [c for c in chosen if c.is_loss and np.isfinite(c.tokens).any()]
    if not writable:
        raise ValueError(f"none of {len(chosen)} curves is a loss against tokens")
    folder = Path(options.dir)
    folder.mkdir(parents=True, exist_ok=True)
    written = write_wandb(writable, options.project, options.mode, folder)
    print(f"{len(written)} curves in the wandb project {options.project} ({options.mode})")
    if options.mode == "offline":
        print(f"upload with: wandb sync {folder / 'wandb'}/offline-run-*-reference-*")


if __name__ == "__main__":
    sys.exit(run_command(Options, main, __doc__, sys.argv[1:]))
