"""Training steps with given gradients on one process and as one of several: for the tests of how
optimizers divide their work. Processes form a table of replicas x shards: (N, 1) is DDP, where each
holds whole parameters, (1, N) is FSDP2, where each holds rows of every parameter, (R, S) is HSDP.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from optim import create_optimizer

# many rows and few, rows that no number of processes divides, fewer rows than processes
SHAPES = {
    "transformer.wte.weight": (257, 66),
    "transformer.wpe.weight": (32, 66),
    "h.0.c_attn.weight": (198, 66),
    "h.0.c_proj.weight": (66, 66),
    "h.0.fc.weight": (264, 66),
    "h.0.out.weight": (66, 264),
    "h.1.c_attn.weight": (198, 66),
    "h.0.ln.weight": (66,),
    "h.0.short.bias": (3,),
    "h.1.tiny.weight": (2, 66),
}
STEPS = 6
NOISE = 1e-7  # relative: what other summation orders do to a gradient
Place = tuple[int, int]


_meshes: dict[Place, Any] = {}


def mesh_of(place: Place) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    if place not in _meshes:
        _meshes[place] = init_device_mesh("cpu", place, mesh_dim_names=("replica", "shard"))
    return _meshes[place]


def division_of(place: Place, divide: str = "all") -> Any:
    from optim.division import Division
    from optim.transport import Transport

    mesh = mesh_of(place)
    return Division(Transport.over(mesh.get_group("shard"), mesh.get_group("replica")), divide)


def spread(x: Tensor, place: Place | None) -> Tensor:
    """A tensor as the wrapper of that table of processes holds it."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if place is None or place[0] > place[1] == 1:
        return x.clone()
    mesh = mesh_of(place)
    if place[0] == 1:
        return distribute_tensor(x, mesh["shard"], [Shard(0)])
    return distribute_tensor(x, mesh, [Replicate(), Shard(0)])


def whole(x: Tensor) -> Tensor:
    x = x.detach()
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).clone()


class Training:
    """Parameters and their optimizer, alone (place None) or as one of the processes of a table."""

    def __init__(
        self, name: str, place: Place | None = None, division: Any = None, **options: Any
    ) -> None:
        self.place = place
        name, _, exact = name.partition("+")
        rule_is_muons = "ns_dtype" in create_optimizer_defaults(name)
        options |= {"ns_dtype": "float32"} if rule_is_muons else {}  # bfloat16 amplifies rounding
        options |= {"mars": {"exact": True}} if exact else {}
        generator = torch.Generator().manual_seed(1)
        self.params = {
            n: nn.Parameter(spread(torch.randn(s, generator=generator) * 0.1, place))
            for n, s in SHAPES.items()
        }
        self.optimizer = create_optimizer(
            name, self.params.items(), weight_decay=0.1, division=division, **options
        )

    def set_gradients(self, step: int, noise: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(1000 + step)
        for n, p in self.params.items():
            grad = torch.randn(SHAPES[n], generator=generator) * 0.4
            grad *= 1 + noise * torch.randn(SHAPES[n], generator=generator)
            p.grad = spread(grad, self.place)

    def advance(self, steps: range, noise: float = 0.0) -> Training:
        optimizer = self.optimizer
        for step in steps:
            if optimizer.needs_next_batch_gradient:
                self.set_gradients(step + 1, noise)
                optimizer.store_next_batch_gradient()
            self.set_gradients(step, noise)
            self.grad_norm = float(optimizer.clip_grad_norm(1.0))
            optimizer.step()
            if optimizer.needs_hessian_gradient:
                self.set_gradients(step + 500, noise)
                optimizer.store_hessian_gradient()
        return self

    def weights(self) -> dict[str, Tensor]:
        return {n: whole(p) for n, p in self.params.items()}

    def result(self) -> dict[str, Any]:
        with self.optimizer.evaluation_weights():
            evaluated = self.weights()
        return {
            "weights": self.weights(),
            "evaluated": evaluated,
            "state": {key: whole(x) for key, x in self.optimizer.named_state().items()},
            "grad_norm": self.grad_norm,
        }


def create_optimizer_defaults(name: str) -> list[str]:
    """Hyper-parameters of an optimizer's rule."""
    from dataclasses import fields

    from optim.rules import modules, rules

    return [f.name for f in fields(rules()[modules()[name].DEFAULTS["rule"]])]


def options_of(name: str) -> dict[str, Any]:
    """Hyper-parameters with which six steps show all that a rule does."""
    return {
        "soap": {"precondition_frequency": 2, "spread": True},
        "shampoo": {"max_dim": 128, "precondition_frequency": 2, "spread": True},
        "sophia_g": {"hessian_interval": 2},
    }.get(name, {})


def train(name: str, place: Place, divide: str = "all", compile: bool = False) -> dict[str, Any]:
    division = division_of(place, divide)
    training = Training(name, place, division, compile=compile, **options_of(name))
    return training.advance(range(STEPS)).result()


@cache
def alone(name: str, noise: float = 0.0) -> dict[str, Any]:
    return Training(name, **options_of(name)).advance(range(STEPS), noise).result()


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def tolerance(name: str, what: str) -> float:
    """1e-5, or where a rule amplifies rounding (signs, eigenvectors) five times what one
    perturbation of the gradients by rounding does to a single process."""
    noise = largest_difference(alone(name)[what], alone(name, NOISE)[what])
    return max(1e-5, 5 * noise)


def train_all(names: list[str], place: Place, divide: str = "all") -> list[dict[str, Any]]:
    return [train(name, place, divide) for name in names]
