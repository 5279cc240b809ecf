"""Write the generated part of docs/optimizers.md: python -m scripts.document_optimizers

The prose is each module's docstring; lr and its source are the YAML's; bytes of state are counted
on a GPT-2 small without data; parity is that of the goldens under tests/goldens, run now; the cost
is read from docs/optimizer_costs.csv, which scripts/bench_optim.py wrote. A test compares the page
with what this would write.
"""

from __future__ import annotations

import csv
import json
import re
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf

from model import GPT2, GPT2Config
from optim import correction, create_optimizer, list_optimizers, mask
from optim.rules import modules, rules
from scripts.pages import markdown, renewed
from tests import test_golden_optimizers as goldens

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "optimizers.md"
COSTS = ROOT / "docs" / "optimizer_costs.csv"
GPT2_SMALL = GPT2Config(n_layer=12, n_head=12, n_embd=768, context=1024, vocab_size=50257)
# percent: coarse, so that another machine's rounding is the same
RUNGS = (1, 2, 5, 10, 25, 50, 100)


def main() -> None:
    PAGE.write_text(document(PAGE.read_text()))
    print(f"wrote {PAGE.relative_to(ROOT)}")


def document(page: str) -> str:
    """The page with its generated part renewed."""
    return renewed(page, "document_optimizers", generated())


def generated() -> str:
    settings = {name: load_settings(name) for name in list_optimizers()}
    errors = golden_errors()
    costs = read_costs()
    columns = ["optimizer", "lr", "state, bytes per parameter", "worst error / tolerance"]
    columns += ["step, eager", "step, compiled"]
    rows = [columns]
    for name in settings:
        cells = [f"[{name}](#{name})", f"{settings[name]['lr']:g}"]
        cells += [f"{state_bytes(settings[name]):.2f}", parity(errors.get(name, {}))]
        rows.append(cells + [costs.get((name, mode), "") for mode in ("eager", "compiled")])
    parts = [markdown(rows)]
    parts += [section(name, settings[name], errors.get(name, {})) for name in settings]
    for name, module in (("correction: MARS", correction), ("mask: cautious", mask)):
        parts.append(f"## {name}\n\n{prose(module.__doc__)}")
    return "\n\n".join(parts)


# ---- what is known of an optimizer --------------------------------------------------------------


def load_settings(name: str) -> dict[str, Any]:
    settings = OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/optim/{name}.yaml"))
    return cast(dict[str, Any], settings)


def sources(name: str) -> str:
    """The YAML's comments on where its values are from: its head, and that of the lr."""
    lines = (ROOT / f"configs/optim/{name}.yaml").read_text().splitlines()
    head = " ".join(line[2:] for line in lines if line.startswith("# "))
    of_lr = next(line for line in lines if line.startswith("lr:")).partition("#")[2].strip()
    return linked(f"{head} (lr: {of_lr})" if of_lr else head)


def state_bytes(settings: dict[str, Any]) -> float:
    """Of a GPT-2 small, whose tensors have shapes but no data."""
    with torch.device("meta"):
        model = GPT2(GPT2_SMALL)
    optimizer = create_optimizer(named_parameters=model.named_parameters(), **settings)
    total: int = sum(row["state_bytes"] for row in optimizer.table())
    return total / model.num_parameters()


def golden_errors() -> dict[str, dict[str, float]]:
    """Optimizer -> golden file -> its largest error as a fraction of its tolerance; and for goldens
    that are not followed, not a number."""
    torch.manual_seed(0)
    found: dict[str, dict[str, float]] = {}
    for file in goldens.golden_files(ROOT / "tests" / "goldens"):
        meta = goldens.metadata(file)
        hyper = json.loads(meta["hyperparameters"])
        name = goldens.BUILDERS[meta["optimizer"]]({**meta, **hyper})["name"]
        if file.stem in goldens.EXPECTED_DIFFERENCES:
            continue
        after, data, meta = goldens.trajectory(file)
        error, _ = goldens.worst_error(after, data, json.loads(meta["tolerance"]))
        found.setdefault(name, {})[file.stem] = error
    return found


def read_costs() -> dict[tuple[str, str], str]:
    """(optimizer, eager or compiled) -> its time as a multiple of torch's fused AdamW, for the
    smallest model that was measured."""
    if not COSTS.is_file():
        return {}
    with COSTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    smallest = min(int(row["parameters"]) for row in rows)
    return {
        (row["optimizer"], row["mode"]): f"{float(row['times_fused']):.2g}"
        for row in rows
        if int(row["parameters"]) == smallest
    }


# ---- how it is written --------------------------------------------------------------------------


def parity(errors: dict[str, float]) -> str:
    """The largest error; in bfloat16, where two correct orders of products differ by some percent
    of the displacement, beside that in float32."""
    half = [error for file, error in errors.items() if "bf16" in file]
    full = [error for file, error in errors.items() if "bf16" not in file]
    both = [rung(max(full))] if full else []
    return "; ".join(both + ([f"bf16 {rung(max(half))}"] if half else [])) or "no golden"


def rung(error: float) -> str:
    """ "< 5 %": the error's place on a coarse scale."""
    return next((f"< {r} %" for r in RUNGS if 100 * error < r), "FAILS")


def section(name: str, settings: dict[str, Any], errors: dict[str, float]) -> str:
    kind = f"granularity {rules()[settings['rule']].granularity}"
    if settings["rule"] != name:
        kind = f"a composition on the rule [{settings['rule']}](#{settings['rule']}), {kind}"
    files = ", ".join(f"{file} {rung(error)}" for file, error in errors.items())
    return (
        f"## {name}\n\n{prose(modules()[name].__doc__)}\n\n*Kind:* {kind}.\n\n"
        f"*Settings:* {sources(name)}\n\n*Goldens* (error / tolerance): {files or 'none'}."
    )


def prose(docstring: str | None) -> str:
    """A module's docstring as Markdown: its indented lines are formulas already."""
    return linked((docstring or "").strip().replace("``", "`").replace("::\n", ":\n"))


linked = partial(
    re.compile(r"(?:arXiv )?\b(\d{4}\.\d{5})\b").sub, r"[arXiv \1](https://arxiv.org/abs/\1)"
)


if __name__ == "__main__":
    main()
