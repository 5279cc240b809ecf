"""What several processes send, keep and compute, counted without any.

    python -m scripts.plan_parallel                               write docs/distributed.md's tables
    python -m scripts.plan_parallel --shares gpt2_large           the largest share of a process
    python -m scripts.plan_parallel --shares gpt2_small --defaults soap shampoo

What each optimizer sends follows from the granularity of its rules. Memory is counted on models
that have shapes but no data: weights and gradients in float32, the optimizer's state, and the
buffers in which replicas exchange what they have updated. A test
compares the page with what this would write. Shares are those of the process that keeps, or
computes, most; settings are those of configs/optim, or with ``--defaults`` the optimizers' own.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf

from model import GPT2, GPT2Config
from optim import Optimizer, create, create_optimizer, list_optimizers
from optim.correction import CORRECTIONS, NoCorrection
from optim.divided import AHEAD, in_messages
from optim.division import WAVES, Division
from optim.rules import build_rule, rules
from optim.sharding import Table
from optim.transport import Transport
from scripts.pages import markdown, renewed

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "distributed.md"
MODELS = ("gpt2_small", "gpt2_medium", "gpt2_large", "gpt2_xl")
GPUS = 8
SIZES = (2, 4, 8)  # numbers of processes
SUMS = "sums of whole tensors, in one all-reduce for all tensors at a time"
DDP = {
    "element": "updated rows to all",
    "tensor": f"{SUMS}; updated rows to all",
    "matrix": "updates of matrices from their owners to all",
}
FSDP = {
    "element": "nothing",
    "tensor": SUMS,
    "matrix": "gradients of matrices to their owners and updates back, rows only",
}
HSDP = {
    "element": "updated rows to the other replicas",
    "tensor": f"{SUMS}; updated rows to the other replicas",
    "matrix": "as FSDP2 within the replica that owns a matrix, then rows to the other replicas",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("optimizers", nargs="*", metavar="OPTIMIZER", help="of --shares (all)")
    parser.add_argument("--shares", metavar="MODEL", help="a file of configs/model")
    parser.add_argument("--defaults", action="store_true", help="the optimizers' own settings")
    arguments = parser.parse_args()
    if arguments.shares:
        names = arguments.optimizers or list_optimizers()
        given = {name: {"name": name} if arguments.defaults else settings(name) for name in names}
        print(shares(shapes(arguments.shares), given))
    else:
        PAGE.write_text(document(PAGE.read_text()))
        print(f"wrote {PAGE.relative_to(ROOT)}")


def document(page: str) -> str:
    """The page with its generated part renewed."""
    return renewed(page, "plan_parallel", generated())


def generated() -> str:
    every = {name: settings(name) for name in list_optimizers()}
    kinds: dict[str, list[str]] = {}
    for name, given in every.items():
        kinds.setdefault(granularities(given), []).append(name)
    return "\n\n".join([messages(kinds), memory(every)])


def settings(name: str) -> dict[str, Any]:
    tree = OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/optim/{name}.yaml"))
    return cast(dict[str, Any], tree)


def granularities(given: Mapping[str, Any]) -> str:
    """Of an optimizer's rules, as "matrix, element"; MARS makes an element rule's a tensor one."""
    found = set()
    for group in create.resolve(**given).values():
        kind = build_rule(group["rule"], group["hyper"]).granularity
        sums = group["mask"] != "none" or CORRECTIONS[group["correction"]] is not NoCorrection
        found.add("tensor" if kind == "element" and sums else kind)
    return ", ".join(kind for kind in ("matrix", "tensor", "element") if kind in found)


def messages(kinds: Mapping[str, Sequence[str]]) -> str:
    rows: list[Sequence[str]] = [("optimizers", "rules", "DDP", "FSDP2", "HSDP")]
    for kind, names in sorted(kinds.items()):
        parts = kind.split(", ")
        cells = (". ".join(f"{p}: {table[p]}" for p in parts) for table in (DDP, FSDP, HSDP))
        rows.append((", ".join(names), kind, *cells))
    return markdown(rows)


def memory(every: Mapping[str, dict[str, Any]]) -> str:
    """GB per GPU, on one and on GPUS: whole, DDP with the state divided, FSDP2."""
    models = {name: shapes(name) for name in MODELS}
    rows: list[Sequence[str]] = [("optimizer", *(name.removeprefix("gpt2_") for name in MODELS))]
    for name, given in every.items():
        cells = []
        for model in models.values():
            optimizer = create_optimizer(named_parameters=model.named_parameters(), **given)
            state = state_bytes(optimizer) / 1e9
            own = 8 * model.num_parameters() / 1e9  # weights and gradients
            ddp = own + state / GPUS + exchange_bytes(optimizer) / 1e9
            parts = (own + state, ddp, (own + state) / GPUS)
            cells.append(" / ".join(f"{gb:.1f}" for gb in parts))
        rows.append((name, *cells))
    return markdown(rows)


def exchange_bytes(optimizer: Optimizer) -> int:
    """Under DDP with everything divided: what is on its way at a time, rows of each group and waves
    of one group's matrices."""
    rows, matrices = 0, 0
    for group in optimizer.param_groups:
        if rules()[group["rule"]].granularity == "matrix":
            matrices = max(matrices, sum(p.nbytes for p in group["params"]) * AHEAD // WAVES)
        else:
            sizes = [sum(p.nbytes for p in some) for some in in_messages(group["params"])]
            rows += max(sum(sizes[i : i + AHEAD + 1]) for i in range(len(sizes)))
    return rows + matrices


def shares(model: GPT2, every: Mapping[str, dict[str, Any]]) -> str:
    """State kept and matrix work done by the process that has most, in units of 1/N."""
    named = list(model.named_parameters())
    rows: list[Sequence[str]] = [("optimizer", "state MB", *(f"N = {n}" for n in SIZES))]
    for name, given in every.items():
        whole = state_bytes(create_optimizer(named_parameters=named, **given))
        cells = []
        for n in SIZES:
            divisions = [Division(Transport(Table(replicas=n, replica=r))) for r in range(n)]
            most = max(
                state_bytes(create_optimizer(named_parameters=named, division=each, **given))
                for each in divisions
            )
            cells.append(f"{most * n / whole:.2f} / {divisions[0].balance:.2f}")
        rows.append((name, f"{whole / 1e6:.1f}", *cells))
    return markdown(rows)


def state_bytes(optimizer: Optimizer) -> int:
    return sum(row["state_bytes"] for row in optimizer.table())


def shapes(name: str) -> GPT2:
    given = cast(
        dict[str, Any], OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/model/{name}.yaml"))
    )
    fields = {key: value for key, value in given.items() if key in GPT2Config.__annotations__}
    fields["vocab_size"] = fields.get("vocab_size") or 50257
    with torch.device("meta"):
        return GPT2(GPT2Config(**fields))


if __name__ == "__main__":
    main()
