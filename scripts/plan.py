"""What a training run will take: memory, time and FLOPs, for N GPUs of a kind.

    python -m scripts.plan --gpu H200 --mfu 0.45 --gpus 1 8 64 --tokens 10e9
    python -m scripts.plan --gpu H200 --rates bench/bench_train.json --optimizers adamw muon
    python -m scripts.plan --models gpt2_small gpt2_xl --gpu A100 --mfu 0.4 --gpus 1 8 64 512 1000

What one GPU does is an assumption of yours (``--mfu``, by PaLM's count over the datasheet peak), or
a measurement (``--rates``: the JSON of scripts/bench_train.py, whose compiled rows are preferred);
no rate is built in. The rest is arithmetic:

    compute        FLOPs of the step's share of the global batch / (MFU x peak)
    update         with --rates what the optimizer took there, divided among the GPUs as its state
                   is; with --mfu it counts for nothing
    communication  ddp: gradients in a ring all-reduce, 2 (N-1)/N of their bytes in float32;
                   fsdp and hsdp: parameters gathered for forward and backward and gradients
                   scattered, 3 (N-1)/N of them. Within a machine of --machine GPUs at --link-gbs
                   each; between machines each GPU has its share of the network, --network-gbs, and
                   a message goes around the slower ring of the two
    exchange       what the divided update sends (docs/distributed.md): ddp the updated parameters,
                   (N-1)/N of their bytes; fsdp gradients of matrices to their owners and updates
                   back, 2 (N-1)/N of the part of a GPU; hsdp both
    overlap        of the communication, what lasts longer than the share --overlap of the step's
                   compute is waited for, of the exchange all; latency --latency-us per message and
                   machine passed
    memory         scripts/plan_parallel.py's count of weights, gradients, optimizer state and, with
                   ddp, buffers of the exchange; and activations of one micro-batch, stored for the
                   backward pass: 34 bytes per token, layer and n_embd in 16 bits (arXiv 2205.05198,
                   section 4.1, without the squares of attention, which flash attention does not
                   keep), and 6 bytes per logit (model.loss_chunks divides the logits)

The global batch grows to a sequence per GPU where it is smaller.

A lower bound where it errs: evaluations, checkpoints, stragglers and restarts are not in it.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from model import GPT2
from optim import Optimizer, create_optimizer, list_optimizers
from optim.rules import rules
from runtime.describe import aligned
from runtime.device import PEAKS
from runtime.files import atomic_path
from scripts.plan_parallel import exchange_bytes, settings, shapes, state_bytes

STRATEGIES = ("ddp", "fsdp", "hsdp")


@dataclass(frozen=True)
class Cluster:
    """GPUs and what connects them; rates are of one GPU, in one direction, bytes/s and FLOP/s."""

    gpus: int
    flops: float  # reached in forward and backward pass, by PaLM's count
    machine: int  # GPUs of one machine
    link: float  # within a machine
    network: float  # between machines
    latency: float  # seconds per message and machine passed
    overlap: float  # share of the step beside which messages travel for nothing
    update: float = 0.0  # seconds of the whole optimizer's update on one


@dataclass(frozen=True)
class Plan:
    model: str
    optimizer: str
    strategy: str
    gpus: int
    global_batch: int
    micro_batch: int
    memory_gb: float  # per GPU
    step_s: float
    update_s: float  # per step, of the optimizer
    communication_s: float  # per step, hidden or not
    waiting_s: float  # of it, what is not hidden
    tokens_per_s: float
    efficiency: float  # of N times one GPU
    hours: float
    gpu_hours: float
    exaflops: float  # of the whole run, 1e18 operations


@cache
def model_of(name: str) -> GPT2:
    """Shapes without data."""
    return shapes(name)


@cache
def optimizer_of(name: str, optimizer: str) -> Optimizer:
    return create_optimizer(
        named_parameters=model_of(name).named_parameters(), **settings(optimizer)
    )


def memory_bytes(
    name: str, optimizer: str, strategy: str, gpus: int, machine: int, micro: int, chunks: int = 1
) -> float:
    """Per GPU: what is held, divided as the strategy divides it, and one micro-batch's
    activations."""
    model, shared = model_of(name), {"ddp": 1, "fsdp": gpus, "hsdp": min(gpus, machine)}[strategy]
    config, weights = model.config, 4.0 * sum(p.numel() for p in model.parameters())
    made = optimizer_of(name, optimizer)
    held = 2 * weights / shared + state_bytes(made) / gpus
    if strategy == "ddp" and gpus > 1:
        held += exchange_bytes(made)
    tokens = micro * config.context
    layers = 34 * tokens * config.n_layer * config.n_embd
    return held + layers + 6 * tokens * config.padded_vocab_size / chunks


def communication_seconds(bytes_: float, strategy: str, cluster: Cluster) -> float:
    """Of the gradients' reduction, and FSDP's gathering, in one step. HSDP gathers within a
    machine and reduces what a GPU holds between machines."""
    n, inside = cluster.gpus, min(cluster.gpus, cluster.machine)
    machines = -(-n // cluster.machine)
    latency = cluster.latency * (machines - 1)
    if strategy == "hsdp":
        within = 3 * (inside - 1) / inside * bytes_ / cluster.link
        between = 2 * (machines - 1) / machines * bytes_ / inside / cluster.network
        return within + between + latency
    slowest = cluster.link if machines == 1 else min(cluster.link, cluster.network)
    return {"ddp": 2, "fsdp": 3}[strategy] * (n - 1) / n * bytes_ / slowest + latency


@cache
def matrix_bytes(name: str, optimizer: str) -> int:
    """Of the parameters that a rule takes as matrices, in float32."""
    table = optimizer_of(name, optimizer).table()
    matrices = [row for row in table if rules()[row["rule"]].granularity == "matrix"]
    return sum(4 * math.prod(row["shape"]) for row in matrices)


def exchange_seconds(bytes_: float, matrices: float, strategy: str, cluster: Cluster) -> float:
    """Of the updates' exchange between the processes that share the optimizer's work."""
    n, inside = cluster.gpus, min(cluster.gpus, cluster.machine)
    machines = -(-n // cluster.machine)
    latency = cluster.latency * (machines - 1)
    slowest = cluster.link if machines == 1 else min(cluster.link, cluster.network)
    if strategy == "ddp":
        return (n - 1) / n * bytes_ / slowest + latency
    if strategy == "fsdp":
        return 2 * (n - 1) / n * matrices / n / slowest + (latency if matrices else 0.0)
    within = 2 * (inside - 1) / inside * matrices / inside / cluster.link
    between = (machines - 1) / machines * bytes_ / inside / cluster.network
    return within + between + latency


def plan(
    name: str,
    optimizer: str,
    strategy: str,
    cluster: Cluster,
    tokens: float,
    global_batch: int,
    micro_batch: int,
    chunks: int = 1,
) -> Plan:
    model, global_batch = model_of(name), max(global_batch, cluster.gpus)
    context, weights = model.config.context, 4.0 * sum(p.numel() for p in model.parameters())
    share = -(-global_batch // cluster.gpus)  # the GPU with the most sequences sets the pace
    micro, per_token = min(micro_batch, share), model.flops_per_token(context).palm
    compute = share * context * per_token / cluster.flops
    sent = communication_seconds(weights, strategy, cluster)
    matrices = matrix_bytes(name, optimizer)
    exchanged = exchange_seconds(weights, matrices, strategy, cluster)
    waiting = max(0.0, sent - cluster.overlap * compute) + exchanged
    update = cluster.update / cluster.gpus
    step, batch = compute + update + waiting, global_batch * context
    seconds = tokens / batch * step
    held = memory_bytes(name, optimizer, strategy, cluster.gpus, cluster.machine, micro, chunks)
    alone = global_batch * context * per_token / cluster.flops + cluster.update
    return Plan(
        *(name, optimizer, strategy, cluster.gpus, global_batch, micro, held / 1e9),
        *(step, update, sent + exchanged, waiting),
        tokens_per_s=batch / step,
        efficiency=alone / (step * cluster.gpus),
        hours=seconds / 3600,
        gpu_hours=seconds / 3600 * cluster.gpus,
        exaflops=tokens * per_token / 1e18,
    )


def measured(file: Path, model: str, optimizer: str) -> tuple[float, float]:
    """FLOP/s by PaLM's count beside the optimizer, and seconds of a whole update of it: of the
    fastest row for the two, compiled if there is one that is. ValueError where there is none."""
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    rows = [r for r in rows if (r["model"], r["optimizer"]) == (model, optimizer)]
    rows = [r for r in rows if "tokens_per_s" in r]
    rows = [r for r in rows if r["compile"] == "true"] or rows
    if not rows:
        raise ValueError(f"{file} has no rate of {model} with {optimizer}: give --mfu, or measure")
    each = model_of(model).flops_per_token(model_of(model).config.context).palm
    row = max(rows, key=lambda r: r["tokens_per_s"] / r["processes"])
    rest = 1 - row["optimizer_ms"] / row["step_ms"]  # of the step
    flops = row["tokens_per_s"] / row["processes"] * each / rest
    return flops, 1e-3 * row["optimizer_ms"] * row["processes"]


def rows_of(args: argparse.Namespace) -> list[Plan]:
    peak = PEAKS[args.gpu]
    found = []
    for name in args.models:
        for optimizer in args.optimizers:
            rate, update = args.mfu and args.mfu * peak, 0.0
            if args.rates is not None:
                rate, update = measured(args.rates, name, optimizer)
            for gpus in args.gpus:
                cluster = Cluster(
                    gpus,
                    rate,
                    args.machine,
                    args.link_gbs * 1e9,
                    args.network_gbs * 1e9,
                    args.latency_us * 1e-6,
                    args.overlap,
                    update,
                )
                found.append(
                    plan(
                        *(name, optimizer, args.strategy, cluster, args.tokens),
                        args.global_batch,
                        *(args.micro_batch, args.loss_chunks),
                    )
                )
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sizes = ["gpt2_small", "gpt2_medium", "gpt2_large", "gpt2_xl"]
    parser.add_argument("--models", nargs="+", default=sizes)
    parser.add_argument("--optimizers", nargs="+", default=["adamw"], choices=list_optimizers())
    parser.add_argument("--strategy", default="ddp", choices=STRATEGIES)
    parser.add_argument("--gpu", required=True, choices=PEAKS, help="for its datasheet's peak")
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 8, 64, 480, 1000])
    parser.add_argument("--mfu", type=float, help="share of the peak that one GPU reaches")
    parser.add_argument("--rates", type=Path, help="bench_train.json, in place of --mfu")
    parser.add_argument("--tokens", type=float, default=10e9)
    parser.add_argument("--global-batch", type=int, default=480, help="sequences")
    parser.add_argument("--micro-batch", type=int, default=16, help="sequences")
    parser.add_argument("--loss-chunks", type=int, default=1)
    parser.add_argument("--machine", type=int, default=8, help="GPUs of one machine")
    parser.add_argument("--link-gbs", type=float, default=350.0, help="GB/s per GPU inside")
    parser.add_argument("--network-gbs", type=float, default=45.0, help="GB/s per GPU between")
    parser.add_argument("--latency-us", type=float, default=20.0)
    parser.add_argument("--overlap", type=float, default=0.3, help="share of compute")
    parser.add_argument("--out", type=Path, help="also as CSV")
    args = parser.parse_args(arguments)
    if (args.mfu is None) == (args.rates is None):
        parser.error("give either --mfu, an assumption, or --rates, a measurement")
    return args


def main(arguments: Sequence[str] | None = None) -> list[Plan]:
    args = parse(arguments)
    try:
        found = rows_of(args)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    columns = [*asdict(found[0])]
    text = [[_text(value) for value in asdict(row).values()] for row in found]
    basis = f"MFU {args.mfu} assumed" if args.rates is None else f"rates of {args.rates}"
    print(f"{args.gpu}, {basis}; links {args.link_gbs:g} and {args.network_gbs:g} GB/s assumed")
    print(aligned([columns, *text]))
    if args.out is not None:
        with atomic_path(args.out) as path, path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(asdict(row) for row in found)
    return found


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return str(value)


if __name__ == "__main__":
    main()
    sys.exit()
