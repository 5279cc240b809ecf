"""What an optimizer of several processes sends, keeps and takes, on random gradients.

    python -m scripts.bench_sharding                        all, GPT-2 nano, 4 processes
    python -m scripts.bench_sharding muon adamw --model gpt2_small --processes 2
    python -m scripts.bench_sharding --count --model gpt2_small        megabytes alone, in seconds

Each row is one optimizer, with the settings of configs/optim, under DDP (with everything divided,
and with the matrices alone) or FSDP2: megabytes that one process receives per step, by what they
are, its state as a share of the whole, and the time of a step as a multiple of that of the same
processes with nothing divided. Gradients are as the wrappers leave them; what reducing them costs
is not the optimizer's. Processes are those of this machine, connected by gloo: bytes are those of
any machines, times are not. With ``--count`` there are no processes and no data: the optimizer of
each rank makes a step on shapes, and what it would receive is counted.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from tqdm import tqdm

from model import GPT2, GPT2Config
from optim import Optimizer, create_optimizer, list_optimizers
from optim.division import Division
from optim.sharding import rows
from optim.transport import Transport
from runtime.describe import aligned
from scripts.plan_parallel import settings

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


def make(
    name: str, layout: str, shapes: dict[str, tuple[int, ...]], device: str = "cpu"
) -> tuple[Optimizer, Division]:
    """The optimizer of this process, with gradients that stay."""
    fsdp = layout == "fsdp"
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator, params = torch.Generator().manual_seed(0), {}
    for n, shape in shapes.items():
        if device == "meta":
            whole, grad = (torch.empty(shape, device="meta") for _ in range(2))
        else:
            whole, grad = (torch.randn(shape, generator=generator) * 0.02 for _ in range(2))
        params[n] = nn.Parameter(cut(whole, mesh) if fsdp else whole)
        params[n].grad = cut(grad, mesh) if fsdp else grad
    group = mesh.get_group()
    transport = Transport.over(shards=group) if fsdp else Transport.over(replicas=group)
    divide = {"ddp, matrices": "matrix", "nothing": "none"}.get(layout, "all")
    division = Division(transport, divide)
    given = settings(name) | {"lr": 1e-5}  # random gradients lead nowhere
    return create_optimizer(named_parameters=params.items(), division=division, **given), division


def cut(x: Tensor, mesh: DeviceMesh) -> DTensor:
    """Its rows on this process, as `fully_shard` cuts them."""
    if not x.is_meta:
        return distribute_tensor(x, mesh, [Shard(0)])
    start, stop = rows(len(x), mesh.size(), mesh.get_local_rank())
    return DTensor.from_local(
        x[start:stop], mesh, [Shard(0)], run_check=False, shape=x.shape, stride=x.stride()
    )


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


def count(names: list[str], model: str, size: int) -> str:
    """Megabytes that the process receives which receives most, by kind."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # messages go nowhere

    shapes, most = shapes_of(model), dict[tuple[str, str], dict[str, float]]()
    for rank in tqdm(range(size), unit=" ranks", disable=None):
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
        for name, layout in itertools.product(names, LAYOUTS):
            optimizer, division = make(name, layout, shapes, "meta")
            optimizer.step()
            found = most.setdefault((name, layout), {})
            for purpose, n in division.transport.received.items():
                found[purpose] = max(n / 1e6, found.get(purpose, 0.0))
        dist.destroy_process_group()
    lines = [["optimizer", "layout", *(f"{p} MB" for p in PURPOSES)]]
    for (name, layout), found in most.items():
        lines.append([name, layout, *(f"{found.get(p, 0.0):.2f}" for p in PURPOSES)])
    return aligned(lines)


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
    parser.add_argument("--count", action="store_true", help="megabytes only, without processes")
    arguments = parser.parse_args()
    if arguments.count:
        names = arguments.optimizers or list_optimizers()
        print(count(names, arguments.model, arguments.processes))
        return
    with tempfile.TemporaryDirectory() as folder:
        size = arguments.processes
        mp.spawn(work, (size, f"{folder}/store", arguments), nprocs=size)


if __name__ == "__main__":
    main()
