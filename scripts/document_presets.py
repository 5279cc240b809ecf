"""Write the tables of docs/experiments.md: python -m scripts.document_presets

One row per preset, from its composed configuration, so that the page cannot say what the files do
not. A test compares the page with what this would write.
"""

from __future__ import annotations

import re
from functools import cache

import torch

from model import MODELS
from runtime.config import Config, model_config
from scripts.compose import CONFIGS, ROOT, compose_config
from scripts.pages import markdown, renewed

PAGE = ROOT / "docs" / "experiments.md"
GPT2_VOCAB = 50257
SIZES = ("small", "medium", "large")


def main() -> None:
    PAGE.write_text(document(PAGE.read_text()))
    print(f"wrote {PAGE.relative_to(ROOT)}")


def presets() -> list[str]:
    """Names for ``+experiment=``; files that begin with _ are parts of others."""
    folder = CONFIGS / "experiment"
    files = [file for file in folder.rglob("*.yaml") if not file.name.startswith("_")]
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in files)


@cache
def config_of(preset: str) -> Config:
    """The preset's configuration; to be read only, as it is kept."""
    return compose_config([f"+experiment={preset}"])


def document(page: str) -> str:
    """The page with its generated part renewed."""
    return renewed(page, "document_presets", f"{papers()}\n\n{clean()}")


def papers() -> str:
    columns = ["`+experiment=`", "parameters", "data", "optimizer", "lr", "weight decay"]
    rows = [[*columns, "tokens per step", "steps", "tokens"]]
    for name in presets():
        if not name.startswith("clean/"):
            rows.append([f"`{name}`", *cells(name)])
    return "### The papers' runs\n\n" + markdown(rows)


def cells(name: str) -> list[str]:
    config = config_of(name)
    tokens = config.train.global_batch * config.model["context"]
    mark = " (not stated)" if unstated(name) else ""
    title = config.optim["name"] + (" exact" if config.optim["mars"]["exact"] else "")
    return [
        f"{parameters(config):,}",
        (config.data.name or config.data.source).rpartition("/")[2],
        f"`{title}`",
        f"{config.optim['lr']:g}{mark}",
        f"{config.optim['weight_decay']:g}",
        f"{tokens:,}",
        f"{config.train.steps:,}",
        f"{config.train.steps * tokens / 1e9:.2f} B",
    ]


def clean() -> str:
    """lr and weight decay of the matrices by optimizer and size, and the source of the first."""
    found: dict[str, dict[str, Config]] = {}
    for name in presets():
        if name.startswith("clean/"):
            size, _, optimizer = name.removeprefix("clean/").partition("_")
            found.setdefault(optimizer, {})[size] = config_of(name)
    rows = [
        ["`clean/<size>_...`", *(f"lr, {s}" for s in SIZES), "weight decay", "source of the lr"]
    ]
    for optimizer, sizes in found.items():
        decay = {f"{c.optim['weight_decay']:g}" for c in sizes.values()}
        lrs = [f"{sizes[size].optim['lr']:g}" for size in SIZES]
        rows.append([f"`{optimizer}`", *lrs, "/".join(sorted(decay)), sources(optimizer)])
    budget = ", ".join(
        f"{size} {c.train.steps * c.train.global_batch * c.model['context'] / 1e9:.2f} B"
        for size, c in ((size, found["adamw"][size]) for size in SIZES)
    )
    return f"### The clean comparison\n\nTokens: {budget}.\n\n" + markdown(rows)


def sources(optimizer: str) -> str:
    """Of the lr of small and, where another, of medium and large: the comments in the files."""
    said = []
    for size in SIZES:
        text = (CONFIGS / "experiment" / "clean" / f"{size}_{optimizer}.yaml").read_text()
        found = re.search(r"^  lr: .*# (.*)$", text, re.MULTILINE)
        assert found is not None, f"clean/{size}_{optimizer} gives its lr without a source"
        said.append(found.group(1))
    return "; ".join(dict.fromkeys(said))


def unstated(name: str) -> bool:
    return "NOT STATED" in (CONFIGS / "experiment" / f"{name}.yaml").read_text()


def parameters(config: Config) -> int:
    """Of a model whose tensors have shapes but no data."""
    with torch.device("meta"):
        model = MODELS[config.model["name"]].network(model_config(config, GPT2_VOCAB))
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    main()
