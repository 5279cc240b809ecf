"""Published loss curves and tables, as facts with their source; see README.md in this folder.

A `Curve` is one run of one paper as one source shows it. Curves of one `set` come from one set of
runs. A paper may have several sets that disagree (the MARS README's table, its figures and the
paper's text are three), so curves are never joined, and never mixed across sets.
"""

from __future__ import annotations

import csv
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
SUPERSEDED = "superseded"  # in a set's name: its own authors withdrew it

# Metrics that are a loss, and how to get nats per token from their values.
LOSSES: dict[str, Callable[[float], float]] = {
    "val_loss": float,
    "val_loss_best": float,  # the lowest so far
    "train_loss": float,
    "ppl": math.log,
}

# The MARS README calls its columns 5B, 20B and 50B; they are steps 10k, 40k and 100k of 491,520
# tokens.
NOMINAL = ("mars/readme-table", "mars/superseded")
REAL_TOKENS = {5e9: 4.9152e9, 20e9: 19.6608e9, 50e9: 49.152e9}


@dataclass(frozen=True, eq=False)
class Curve:
    """Points of one published run. `tokens`, `steps`: float (n,), NaN where the source does not
    say; `values`: float (n,), in the metric's own unit."""

    curve: str  # c0446
    set: str  # mars/readme-figures
    paper: str
    model: str
    dataset: str
    optimizer: str
    variant: str
    metric: str
    confidence: str
    source: str
    noise: float | None  # of one evaluation of this run against another, in nats; None: unknown
    tokens: np.ndarray
    steps: np.ndarray
    values: np.ndarray
    digits: int  # decimals that the source gives

    @property
    def name(self) -> str:
        """What `reference=` takes, besides the curve's number; unique together with the variant."""
        return f"{self.set}/{self.model}/{self.dataset}/{self.optimizer}".lower().replace(" ", "-")

    @property
    def label(self) -> str:
        variant = f" ({self.variant})" if self.variant else ""
        return f"{self.paper}, {self.set.partition('/')[2]}: {self.optimizer}{variant}"

    @property
    def is_loss(self) -> bool:
        return self.metric in LOSSES

    @property
    def losses(self) -> np.ndarray:
        """In nats per token, (n,). KeyError for a metric that is no loss."""
        return np.array([LOSSES[self.metric](value) for value in self.values])

    @property
    def reading_error(self) -> np.ndarray:
        """In nats, (n,): of digitising a figure as `confidence` states it, or of rounding."""
        stated = re.search(r"\+-\s*([\d.]+(?:e-?\d+)?)", self.confidence)
        error = float(stated[1]) if stated else 0.5 * 10.0**-self.digits
        return error / self.values if self.metric == "ppl" else np.full(self.values.shape, error)

    @property
    def tolerance(self) -> np.ndarray:
        """In nats, (n,): how far a faithful run may lie from each point."""
        return self.reading_error + (self.noise or 0.0)


@cache
def curves(folder: Path = FOLDER) -> tuple[Curve, ...]:
    """All curves of a folder's curves.csv and points.csv."""
    points: dict[str, list[dict[str, str]]] = {}
    for row in _table(folder / "points.csv"):
        points.setdefault(row["curve"], []).append(row)
    return tuple(_curve(about, points[about["curve"]]) for about in _table(folder / "curves.csv"))


def read_curve(file: Path) -> Curve:
    """One curve of a CSV that has the columns of curves.csv and points.csv in one table; those that
    describe it may be left out, `value` and `tokens` or `step` not. Raises ValueError."""
    rows = _table(file)
    if not rows or "value" not in rows[0] or not {"tokens", "step"} & rows[0].keys():
        raise ValueError(f"{file}: expected a CSV with the columns value and tokens (or step)")
    about = {"set": file.stem, "metric": "val_loss", "curve": file.stem} | rows[0]
    if about["metric"] not in LOSSES:
        raise ValueError(f"{file}: metric {about['metric']} is no loss: {', '.join(LOSSES)}")
    try:
        return _curve(about, rows)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _curve(about: Mapping[str, str], rows: Iterable[Mapping[str, str]]) -> Curve:
    rows = list(rows)
    text = [row["value"] for row in rows]
    tokens = np.array([_number(row.get("tokens")) for row in rows])
    if about["set"] in NOMINAL:
        tokens = np.array([REAL_TOKENS.get(count, count) for count in tokens])
    keys = ("set", "paper", "model", "dataset", "optimizer", "variant", "metric", "source")
    return Curve(
        curve=about["curve"],
        confidence=about.get("confidence") or "",
        **{key: about.get(key) or "" for key in keys},
        noise=float(about["noise"]) if about.get("noise") else None,
        tokens=tokens,
        steps=np.array([_number(row.get("step")) for row in rows]),
        values=np.array([float(value) for value in text]),
        digits=max(len(value.partition(".")[2]) for value in text),
    )


def find(words: Iterable[str]) -> list[Curve]:
    """Curves whose number, set or name is one of `words`, which may hold * and ?. ValueError, with
    the nearest name, for a word that finds nothing."""
    found: dict[str, Curve] = {}
    for word in words:
        hits = [c for c in curves() if any(fnmatch(n, word) for n in (c.curve, c.set, c.name))]
        if not hits:
            names = sorted({n for c in curves() for n in (c.set, c.name)})
            near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "python -m report.reference list"
            raise ValueError(f"no reference curve is called {word}: {hint}")
        found |= {c.curve: c for c in hits}
    return list(found.values())


def matching(settings: Mapping[str, Any]) -> list[Curve]:
    """Loss curves of the same model, data and optimizer as a run's settings, of every set that
    was not withdrawn."""
    model, data, optimizer = (
        model_name(settings),
        data_name(settings),
        OPTIMIZERS.get(_kind(settings)),
    )
    if None in (model, data) or optimizer is None:
        return []
    return [
        curve
        for curve in curves()
        if curve.is_loss
        and SUPERSEDED not in curve.set
        and np.isfinite(curve.tokens).any()
        and (curve.model, curve.dataset) == (model, data)
        and optimizer(curve, settings)
    ]


# ---- what a run's settings are called in the papers --------------------------------------------

# (model.name, layers, width) -> the papers' name
MODELS = {
    ("gpt2", 12, 768): "gpt2-small",
    ("gpt2", 24, 1024): "gpt2-medium",
    ("gpt2", 36, 1280): "gpt2-large",
    ("gpt2", 48, 1600): "gpt2-xl",
    ("llama", 8, 512): "llama-60m",
    ("llama", 12, 768): "llama-130m",
    ("llama", 24, 1024): "llama-350m",
    ("llama", 24, 2048): "llama-1.3b",
    ("llama", 32, 4096): "llama-7b",
}

# A part of data.name (or of the paths of ready shards) -> the papers' name; the first that fits.
DATASETS = {
    "openwebtext": "openwebtext",
    "fineweb-edu": "fineweb-edu-100B",
    "fineweb_edu": "fineweb-edu-100B",
    "fineweb": "fineweb-10B",
    "c4": "c4",
}


def model_name(settings: Mapping[str, Any]) -> str | None:
    keys = ("model.name", "model.n_layer", "model.n_embd")
    return MODELS.get(tuple(settings.get(key) for key in keys))  # type: ignore[arg-type]


def data_name(settings: Mapping[str, Any]) -> str | None:
    text = " ".join(str(settings.get(f"data.{key}")) for key in ("name", "files", "dir")).lower()
    return next((name for part, name in DATASETS.items() if part in text), None)


def _kind(settings: Mapping[str, Any]) -> str:
    """The optimizer's name, unless the correction is not the one that belongs to it."""
    name = str(settings["optim.name"])
    own = "mars" if name.startswith("mars_") else "none"
    return name if settings.get("optim.correction", own) == own else ""


def _named(*names: str) -> Callable[[Curve, Mapping[str, Any]], bool]:
    return lambda curve, settings: curve.optimizer in names and "Moonlight" not in curve.variant


def _mars(name: str) -> Callable[[Curve, Mapping[str, Any]], bool]:
    def fits(curve: Curve, settings: Mapping[str, Any]) -> bool:
        exact = bool(settings.get("optim.mars.exact"))
        gamma = re.search(r"gamma=([\d.]+)", curve.variant)
        same = gamma is None or float(gamma[1]) == settings.get("optim.mars.gamma")
        return curve.optimizer == name and curve.variant.startswith("exact") == exact and same

    return fits


# Our optimizer -> whether a curve (and these settings of ours) is of the same one.
OPTIMIZERS: dict[str, Callable[[Curve, Mapping[str, Any]], bool]] = {
    "adafactor": _named("Adafactor"),
    "adamw": _named("AdamW", "Adam"),
    "came": _named("CAME"),
    "lion": _named("Lion"),
    "mars_adamw": _mars("MARS-AdamW"),
    "mars_lion": _mars("MARS-Lion"),
    "mars_m": _mars("MARS-M"),
    "moonlight": lambda curve, _: (curve.optimizer, curve.variant) == ("Muon", "Moonlight variant"),
    "muon": _named("Muon"),
    "shampoo": _named("DistributedShampoo", "Shampoo (Distributed)"),
    "sinkgd": _named("SinkGD"),
    "soap": _named("SOAP"),
    "swan": _named("SWAN"),
}


def _table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _number(text: str | None) -> float:
    return float(text) if text else math.nan
