"""Run directories made up on the spot: the files of a run, without a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

SETTINGS: dict[str, Any] = {
    "seed": 1,
    "model": {"name": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "context": 1024},
    "optim": {"name": "adamw", "lr": 6e-4, "weight_decay": 0.1, "betas": [0.9, 0.95]},
    "data": {"source": "huggingface", "name": "Skylion007/openwebtext", "tokenizer": "gpt2"},
    "schedule": {"decay_shape": "cosine", "final": 0.1},
    "train": {"steps": 100, "global_batch": 480, "micro_batch": 12, "eval_tokens": 1000},
}
TOKENS = 480 * 1024  # of a step


def settings(**changes: Any) -> dict[str, Any]:
    """`SETTINGS` with changes such as optim__lr=1e-3."""
    tree = json.loads(json.dumps(SETTINGS))
    for name, value in changes.items():
        *groups, key = name.split("__")
        branch = tree
        for each in groups:
            branch = branch.setdefault(each, {})
        branch[key] = value
    return tree


def write_run(
    folder: Path,
    val: Mapping[int, float] | None = None,
    train: Sequence[float] = (),
    finished: bool = True,
    second: float = 0.5,
    summary: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """`val`: step -> validation loss; `train`: loss of steps 1, 2, ...; `second`: of a step."""
    tree = settings(**changes)
    val = dict(val or {})
    lines = []
    for step in sorted({*val, *range(1, len(train) + 1)}):
        line: dict[str, Any] = {"step": step, "tokens": step * TOKENS, "time_s": step * second}
        if 1 <= step <= len(train):
            line |= {"train/loss": train[step - 1], "lr": 1e-3, "tokens_per_s": TOKENS / second}
            line |= {"grad_norm": 1.0, "memory_gb": 2.5}
        if step in val:
            line["val/loss"] = val[step]
        lines.append(json.dumps(line))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11.7"}))
    (folder / "log.txt").write_text("run x\nmodel 10 parameters; 1,000 FLOPs per token (PaLM's)\n")
    header, row = "parameter  shape  state_bytes", "wte        4x4    {}"
    (folder / "parameters.txt").write_text("\n".join([header, row.format(64), row.format(36), ""]))
    if finished:
        last = max([*val, len(train)])
        done = {"finished": True, "step": last, "device": "cpu", "precision": "fp32"}
        (folder / "summary.json").write_text(json.dumps(done | dict(summary or {})))
    return folder


def falling(final: float, steps: int = 100, every: int = 10) -> dict[int, float]:
    """A validation curve that ends at `final`: final + 5 / (1 + 9 s / steps) - 0.5."""
    return {step: final - 0.5 + 5.0 / (1 + 9 * step / steps) for step in range(0, steps + 1, every)}


def sweep(
    folder: Path,
    lrs: Sequence[float],
    seeds: Sequence[int],
    optimum: float,
    curvature: float,
    noise: float,
    steps: int = 20,
    points: int = 0,
    **changes: Any,
) -> Path:
    """Trials whose final loss is a parabola in ln lr, with an offset for each seed and noise."""
    rng = np.random.default_rng(0)
    offsets = {seed: 0.05 * rng.standard_normal() for seed in seeds}
    for number, (lr, seed) in enumerate((lr, seed) for lr in lrs for seed in seeds):
        final = 3.0 + curvature * np.log(lr / optimum) ** 2 + offsets[seed]
        final += noise * rng.standard_normal()
        train = (3.0 + 4.0 / np.arange(1, points + 1) + 0.05 * rng.standard_normal(points)).tolist()
        write_run(
            folder / str(number), falling(final, steps=points or steps, every=max(points // 20, 2)),
            train, optim__lr=lr, seed=seed, **changes,
        )  # fmt: skip
    return folder
