"""What the processes of a divided optimizer keep and send, and that it outlives their number."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from in_parts import (
    NOISE,
    SHAPES,
    STEPS,
    Place,
    Training,
    alone,
    division_of,
    largest_difference,
    options_of,
    spread,
    tolerance,
    train,
)
from torch import Tensor
from workers import run

from optim import Optimizer, create_optimizer, list_optimizers

# ---- what it costs ------------------------------------------------------------------------------


def gpt2_small() -> list[tuple[str, Tensor]]:
    """Names and shapes of its parameters, without memory."""
    from model import GPT2, GPT2Config

    with torch.device("meta"):
        config = GPT2Config(n_layer=12, n_head=12, n_embd=768, context=1024, vocab_size=50257)
        return list(GPT2(config).named_parameters())


def of_rank(name: str, size: int, rank: int) -> Optimizer:
    """The optimizer of one of so many processes, none of which is there."""
    from optim.division import Division
    from optim.sharding import Table
    from optim.transport import Transport

    division = Division(Transport(Table(replicas=size, replica=rank)))
    return create_optimizer(name, gpt2_small(), division=division)


def state_bytes(optimizer: Optimizer) -> int:
    return sum(row["state_bytes"] for row in optimizer.table())


# optimizers of which a process cannot keep a quarter, and what it keeps at most, as a share
LARGEST_SHARE = {
    "mars_shampoo": 0.32,  # takes the embedding for a matrix, which is 31 % of all: one process's
}


@pytest.mark.parametrize("name", list_optimizers())
def test_state_and_work_are_divided(name: str) -> None:
    """GPT-2 small on 4 processes of DDP. Under FSDP2 the rows that a process updates are as
    many."""
    size, whole = 4, state_bytes(create_optimizer(name, gpt2_small()))
    parts = [of_rank(name, size, rank) for rank in range(size)]
    allowed = LARGEST_SHARE.get(name)
    assert max(map(state_bytes, parts)) <= (allowed or 1.1 / size) * whole
    balance = parts[0].division.balance
    assert balance <= (1.15 if name != "mars_shampoo" else 1.25), str(parts[0].division)


# ---- bytes --------------------------------------------------------------------------------------


def received(name: str, place: Place, divide: str) -> dict[str, int]:
    division = division_of(place, divide)
    Training(name, place, division, **options_of(name)).advance(range(1))
    return dict(division.transport.received)


def test_muon_sends_its_matrices_once() -> None:
    """DDP: what each process lacks of the matrices' updates, which is one all-gather of them.
    FSDP2: gradients to the owners as well, each entry once."""
    matrices = sum(
        4 * torch.Size(SHAPES[n]).numel()
        for n in SHAPES
        if n.startswith("h.") and len(SHAPES[n]) == 2
    )
    ddp = run(2, received, "muon", (2, 1), "matrix")
    assert [set(r) for r in ddp] == [{"updates"}] * 2
    assert sum(r["updates"] for r in ddp) == matrices
    fsdp = run(2, received, "muon", (1, 2), "all")
    assert [set(r) for r in fsdp] == [{"gradients", "updates", "sums"}] * 2
    assert sum(r["updates"] for r in fsdp) <= matrices
    assert sum(r["gradients"] for r in fsdp) <= matrices
    assert max(r["sums"] for r in fsdp) == 8  # the global gradient norm


def count_reductions(name: str, place: Place) -> int:
    import torch.distributed as dist

    training, calls, reduce = Training(name, place, division_of(place)), [], dist.all_reduce

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return reduce(*args, **options)

    training.set_gradients(0)
    dist.all_reduce = counted
    try:
        training.optimizer.step()
    finally:
        dist.all_reduce = reduce
    return len(calls)


@pytest.mark.parametrize(("name", "reductions"), [("adamw", 0), ("lamb", 2), ("mars_adamw", 1)])
def test_sums_of_all_tensors_travel_together(name: str, reductions: int) -> None:
    assert run(2, count_reductions, name, (1, 2)) == [reductions] * 2


def share_in_small_messages(name: str, place: Place) -> tuple[dict[str, Tensor], int, int]:
    """Weights, the number of messages, and how many travelled at a time."""
    from optim import divided

    division, travelling, seen = division_of(place), set[int](), list[int]()
    share = division.transport.share

    def counted(tensors: Any, purpose: str) -> Any:
        finish, number = share(tensors, purpose), len(seen)
        travelling.add(number)
        seen.append(len(travelling))
        return lambda: (finish(), travelling.discard(number))

    object.__setattr__(division.transport, "share", counted)
    training = Training(name, place, division)
    with patch.object(divided, "MESSAGE", 4 * 66 * 66):
        training.advance(range(STEPS))
    assert not travelling
    return training.weights(), len(seen), max(seen)


@pytest.mark.parametrize(("name", "at_once"), [("adamw", 3), ("muon", 4)])
def test_few_buffers_are_kept(name: str, at_once: int) -> None:
    """Of the rows of a group three messages travel at a time, then two until the end of the step;
    of matrices two of three waves."""
    for weights, messages, most in run(2, share_in_small_messages, name, (2, 1)):
        assert largest_difference(weights, alone(name)["weights"]) <= tolerance(name, "weights")
        assert messages >= 5 * STEPS
        assert most == at_once


# ---- checkpoints --------------------------------------------------------------------------------


def go_on(
    name: str, place: Place | None, folder: Path, steps: range
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Load the checkpoint of the step before these, if any, train, and save: weights and state."""
    import torch.distributed as dist

    from runtime.processes import Processes
    from runtime.sharded_checkpoint import SharedCheckpoints, load_into

    rank, size = dist.get_rank(), dist.get_world_size()
    processes = Processes(rank, size, 0, 60, dist.group.WORLD)
    division = None if place is None else division_of(place)
    training = Training(name, place, division, **options_of(name))
    checkpoints = SharedCheckpoints(folder, 2, processes)
    held = {f"model.{n}": p.detach() for n, p in training.params.items()}
    held |= {f"optim.{key}": x for key, x in training.optimizer.named_state().items()}
    if steps.start:
        load_into(checkpoints.path(steps.start), held, processes)
    training.advance(steps)
    checkpoints.save(steps.stop, held, {}, None)
    checkpoints.wait()
    processes.barrier()
    result = training.result()
    return result["weights"], result["state"]


JOURNEYS = {
    "1-fsdp4-ddp2-1": [None, (1, 4), (2, 1), None],
    "1-ddp4-fsdp2-1": [None, (4, 1), (1, 2), None],
    "1-hsdp4-fsdp2-1": [None, (2, 2), (1, 2), None],
}


def travel(name: str, journey: list[Place | None], folder: Path) -> list[Any]:
    for i, place in enumerate(journey):
        size = place[0] * place[1] if place else 1
        results = run(size, go_on, name, place, folder, range(2 * i, 2 * i + 2))
    return results


@pytest.mark.parametrize(
    ("name", "journey"),
    [
        ("mars_m+exact", "1-fsdp4-ddp2-1"),
        pytest.param("prodigy", "1-ddp4-fsdp2-1", marks=pytest.mark.slow),
        pytest.param("soap", "1-hsdp4-fsdp2-1", marks=pytest.mark.slow),
        pytest.param("adafactor", "1-hsdp4-fsdp2-1", marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_with_other_processes(name: str, journey: str, tmp_path: Path) -> None:
    ((weights, _),) = travel(name, JOURNEYS[journey], tmp_path)
    steps = range(2 * len(JOURNEYS[journey]))
    right, noisy = (
        Training(name, **options_of(name)).advance(steps, noise).weights() for noise in (0.0, NOISE)
    )
    allowed = max(1e-5, 5 * largest_difference(right, noisy))
    assert largest_difference(weights, right) <= allowed


@pytest.mark.parametrize("place", [(2, 1), (1, 2)], ids=["ddp", "fsdp"])
def test_the_same_layout_goes_on_bit_identically(place: Place, tmp_path: Path) -> None:
    stopped = travel("soap", [place] * 3, tmp_path)
    for (weights, state), right in zip(stopped, run(2, train, "soap", place), strict=True):
        assert largest_difference(weights, right["weights"]) == 0
        assert largest_difference(state, right["state"]) == 0


def load_from_one(name: str, place: Place) -> float:
    """Difference after six steps, of which one process without torch.distributed made three."""
    before = Training(name, **options_of(name)).advance(range(3))
    training = Training(name, place, division_of(place), **options_of(name))
    for p, trained in zip(training.params.values(), before.weights().values(), strict=True):
        p.data.copy_(spread(trained, place))
    training.optimizer.load_named_state(before.optimizer.named_state())
    training.advance(range(3, STEPS))
    return largest_difference(training.weights(), alone(name)["weights"])


@pytest.mark.parametrize("place", [(2, 1), (1, 2)], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["adamw", "came", "muon"])
def test_whole_states_load_anywhere(name: str, place: Place) -> None:
    assert max(run(2, load_from_one, name, place)) <= tolerance(name, "weights")
