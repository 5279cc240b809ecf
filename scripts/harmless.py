"""The loss curve with a setting beside the one without it, against two yardsticks.

    python -m scripts.harmless                                    the settings that change rounding
    python -m scripts.harmless model.loss_chunks=8 "train.compile=true train.micro_batch=4"
    python -m scripts.harmless ... --base model.context=128 --steps 500 --out folder

Each word is one setting, of one override or several. Every seed is trained without it (with
``--base``), with it, and again without it but with every first weight multiplied by 1 + 1e-7 n, n
normal: one rounding, from which training drifts apart as far as it does (docs/converging.md). Seeds
share weights and batches across settings, so that what is left is the setting's.

    first    mean distance of the training loss from the plain run's in the first ten steps, nats
    largest  largest running mean over ten steps of that distance
    times    largest, as a multiple of the rounded run's; the largest of the seeds in all three
    val      validation loss at the end, with minus without: mean and largest of the seeds
    spread   standard deviation of the plain runs' validation loss between seeds
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.corpus import open_corpus
from data.progress import progress
from eval.loss import Validation
from report.tables import write_csv
from runtime.describe import aligned
from runtime.kernels import kernels
from scripts.training import Training, configuration

SETTINGS = (
    "train.cpu_linear=onednn",
    "model.loss_chunks=8",
    "train.micro_batch=4",
    "train.compile=true",
    "train.compile=true train.micro_batch=4",
    "train.precision=bf16",
)
BASE = ("train.device=cpu", "train.precision=fp32", "train.cpu_linear=torch")
PLAIN, ROUNDED = "(plain)", "(one rounding)"
WINDOW = 10  # steps


class Curve(NamedTuple):
    losses: np.ndarray  # (steps,)
    val_loss: float


def train(overrides: Sequence[str], seed: int, steps: int, perturbed: bool = False) -> Curve:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        own = [f"seed={seed}", f"train.steps={steps}", f"schedule.warmup_steps={steps // 10}"]
        config = configuration(Path(folder), [*BASE, *own, *overrides])
        corpus = open_corpus(config.data)
        training = Training(config, corpus)
        if perturbed:
            perturb(training.model, seed)
        with kernels(config.train):
            losses = [training.step().losses.mean().item() for _ in range(steps)]
        rows = len(training.loader.batch(0))
        validation = Validation(corpus.val, training.shape.context, config.train.eval_tokens, rows)
        val_loss = validation.loss(training.model, training.device)
        training.close()
    torch.compiler.reset()
    return Curve(np.array(losses), val_loss)


@torch.no_grad()
def perturb(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.mul_(1 + 1e-7 * torch.randn(p.shape, generator=generator, dtype=torch.float64))


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Running means over `WINDOW` steps of how far two curves are from each other."""
    return np.convolve(np.abs(a - b), np.full(WINDOW, 1 / WINDOW), mode="valid")


def rows_of(curves: dict[str, list[Curve]]) -> list[dict[str, str]]:
    """A row per setting; the curves are those of the seeds, in order."""
    plain = curves[PLAIN]
    spread = statistics.stdev(c.val_loss for c in plain) if len(plain) > 1 else float("nan")
    apart = {
        name: [distances(c.losses, p.losses) for c, p in zip(found, plain, strict=True)]
        for name, found in curves.items()
    }
    yardstick = max(d.max() for d in apart[ROUNDED])
    rows = []
    for name, found in curves.items():
        if name == PLAIN:
            continue
        largest = max(d.max() for d in apart[name])
        val = [c.val_loss - p.val_loss for c, p in zip(found, plain, strict=True)]
        rows.append(
            {
                "setting": name,
                "first": f"{max(d[0] for d in apart[name]):.1e}",
                "largest": f"{largest:.1e}",
                "times": f"{largest / yardstick:.2f}",
                "val mean": f"{statistics.fmean(val):+.4f}",
                "val largest": f"{max(val, key=abs):+.4f}",
                "spread": f"{spread:.4f}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.harmless",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", default=SETTINGS)
    parser.add_argument("--base", nargs="+", default=[], help="overrides of all runs")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--out", type=Path, help="folder for the table and the curves as CSV")
    args = parser.parse_args()
    names = [PLAIN, ROUNDED, *args.settings]
    curves: dict[str, list[Curve]] = {name: [] for name in names}
    with progress("runs", len(names) * len(args.seeds), unit=" runs") as bar:
        for i, seed in enumerate(args.seeds, 1):
            for name in names:
                own = name.split() if name in args.settings else []
                curve = train([*args.base, *own], seed, args.steps, name == ROUNDED)
                curves[name].append(curve)
                bar.written(1)
            rows = rows_of(curves)
            print(f"{args.steps} steps, seeds {args.seeds[:i]}, torch {torch.__version__}")
            print(aligned([list(rows[0]), *(list(row.values()) for row in rows)]), flush=True)
            if args.out is not None:
                save(rows, curves, args.seeds, args.out)


def save(
    rows: list[dict[str, str]], curves: dict[str, list[Curve]], seeds: list[int], out: Path
) -> None:
    """harmless.csv and curves.csv, of the seeds that are done."""
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "harmless.csv", rows)
    points = [
        {"setting": name, "seed": seed, "step": step, "loss": loss}
        for name, found in curves.items()
        for seed, curve in zip(seeds, found, strict=False)
        for step, loss in enumerate(curve.losses.tolist(), 1)
    ]
    write_csv(out / "curves.csv", points)


if __name__ == "__main__":
    main()
