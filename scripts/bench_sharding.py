"""What an optimizer of several processes sends, keeps and takes, on random gradients.

    python -m scripts.bench_sharding                        all, GPT-2 nano, 4 processes
    python -m scripts.bench_sharding muon adamw --model gpt2_small --processes 2

Each row is one optimizer under DDP (with everything divided, and with the matrices alone) or FSDP2:
megabytes that one process receives per step, by what they are, its state as a share of the whole,
and the time of a step as a multiple of that of the same processes with nothing divided. Gradients
are as the wrappers leave them; what reducing them costs is not the optimizer's. Processes are those
of this machine, connected by gloo: bytes are those of any machines, times are not.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from model import GPT2, GPT2Config
from optim import Optimizer, create_optimizer, list_optimizers
from optim.division import Division
from optim.transport import Transport
from runtime.describe import aligned

ROOT = Path(__file__).resolve().parents[1]
GPT2_VOCABULARY = 50257
STEPS = 3
LAYOUTS = ("ddp", "ddp, matrices", "fsdp")
PURPOSES = ("gradients", "updates", "parameters", "sums")


def shapes_of(model: str) -> dict[str, tuple[int, ...]]:
    config: Any = OmegaConf.load(ROOT / "configs/model" / f"{model}.yaml")
    given = {key: config[key] for key in ("n_layer", "n_head", "n_embd", "context")}
    with torch.device("meta"):
        whole = GPT2(GPT2Config(**given, vocab_size=GPT2_VOCABULARY))
    return {name: tuple(p.shape) for name, p in whole.named_parameters()}


def make(name: str, layout: str, shapes: dict[str, tuple[int, ...]]) -> tuple[Optimizer, Division]:
    """The optimizer of this process, with gradients that stay."""
    fsdp = layout == "fsdp"
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator, params = torch.Generator().manual_seed(0), {}
    for n, shape in shapes.items():
        whole, grad = (torch.randn(shape, generator=generator) * 0.02 for _ in range(2))
        params[n] = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]) if fsdp else whole)
        params[n].grad = distribute_tensor(grad, mesh, [Shard(0)]) if fsdp else grad
    group = mesh.get_group()
    transport = Transport.over(shards=group) if fsdp else Transport.over(replicas=group)
    divide = {"ddp, matrices": "matrix", "nothing": "none"}.get(layout, "all")
    division = Division(transport, divide)
    return create_optimizer(name, params.items(), lr=1e-5, division=division), division


def measure(name: str, layout: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    optimizer, division = make(name, layout, shapes)
    optimizer.step()
    division.transport.received.clear()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(STEPS):
        optimizer.step()
    dist.barrier()
    state = sum(row["state_bytes"] for row in optimizer.table())
    received = {key: n / STEPS / 1e6 for key, n in division.transport.received.items()}
    return {"s": (time.perf_counter() - start) / STEPS, "state": state, **received}


def work(rank: int, size: int, store: str, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    shapes = shapes_of(arguments.model)
    lines = [["optimizer", "layout", *(f"{p} MB" for p in PURPOSES), "state", "time"]]
    for name in arguments.optimizers or list_optimizers():
        base = measure(name, "nothing", shapes)
        for layout in LAYOUTS:
            own = measure(name, layout, shapes)
            every: list[Any] = [None] * size
            dist.all_gather_object(every, own)
            megabytes = [max(x.get(p, 0.0) for x in every) for p in PURPOSES]
            share = max(x["state"] for x in every) / base["state"]
            figures = [*(f"{m:.2f}" for m in megabytes), f"{share:.3f}"]
            lines.append([name, layout, *figures, f"{own['s'] / base['s']:.2f}"])
    if rank == 0:
        print(aligned(lines))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("optimizers", nargs="*", metavar="OPTIMIZER")
    parser.add_argument("--model", default="gpt2_nano", help="a file of configs/model")
    parser.add_argument("--processes", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = arguments.processes
        mp.spawn(work, (size, f"{folder}/store", arguments), nprocs=size)


if __name__ == "__main__":
    main()
