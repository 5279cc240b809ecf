"""An optimizer makes on several processes, which divide its work, the steps it makes on one.

Gradients are given, so that only the optimizer is tested, one of each kind; tests/runtime has the
wrappers, tests/test_same_curve.py every optimizer.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from in_parts import (
    STEPS,
    Place,
    Training,
    alone,
    division_of,
    largest_difference,
    mesh_of,
    options_of,
    tolerance,
    train,
    train_all,
)
from torch import nn
from workers import run

from optim import create_optimizer

# element, tensor, tensor with sums over all parameters, matrix, matrix with MARS's sums, averages
SOME = ["adamw", "came", "prodigy", "soap", "mars_m+exact", "schedule_free_adamw"]


def check(name: str, place: Place) -> None:
    right, ranks = alone(name), run(place[0] * place[1], train, name, place)
    for what in ("weights", "evaluated"):
        for rank in ranks:
            assert largest_difference(rank[what], right[what]) <= tolerance(name, what), what
            assert largest_difference(rank[what], ranks[0][what]) == 0, "the processes differ"
    for rank in ranks:
        assert rank["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-6)
    # together they keep the state of one process, and what several keep is the same
    assert {key for rank in ranks for key in rank["state"]} == right["state"].keys()
    for rank in ranks:
        for key, tensor in rank["state"].items():
            assert tensor.shape == right["state"][key].shape, key
            first = next(r["state"][key] for r in ranks if key in r["state"])
            assert torch.equal(tensor, first), key


# ---- every optimizer, every table ---------------------------------------------------------------


@pytest.mark.parametrize("place", [(2, 1), (1, 2)], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("name", SOME)
def test_two_processes_do_what_one_does(name: str, place: Place) -> None:
    check(name, place)


@pytest.mark.slow
@pytest.mark.parametrize("place", [(4, 1), (1, 4), (2, 2)], ids=["ddp", "fsdp", "hsdp"])
def test_four_processes_do_what_one_does(place: Place) -> None:
    for name in SOME:
        check(name, place)


def test_one_process_is_bit_identical() -> None:
    """Under FSDP2, whose DTensors then have all rows here, and under DDP."""
    from optim.division import Division
    from optim.transport import Transport

    (fsdp,) = run(1, train_all, SOME, (1, 1))
    for name, sharded in zip(SOME, fsdp, strict=True):
        plain = Training(name, None, Division(Transport.over()), **options_of(name))
        for result in (sharded, plain.advance(range(STEPS)).result()):
            for what in ("weights", "evaluated", "state"):
                assert largest_difference(result[what], alone(name)[what]) == 0, (name, what)


@pytest.mark.parametrize("divide", ["matrix", "none"])
def test_replicas_may_do_the_same_work(divide: str) -> None:
    """With nothing divided each DDP process is a single one, bit for bit; matrices that are divided
    alone leave the state of the others whole."""
    names = ["adamw", "muon", "mars_m+exact"]
    for results in run(2, train_all, names, (2, 1), divide):
        for name, result in zip(names, results, strict=True):
            assert largest_difference(result["weights"], alone(name)["weights"]) == 0
            missing = alone(name)["state"].keys() - result["state"].keys()
            assert bool(missing) == (divide == "matrix" and name != "adamw")


@pytest.mark.slow
@pytest.mark.parametrize("divide", ["matrix", "none"])
def test_replicas_of_shards_may_do_the_same_work(divide: str) -> None:
    for results in run(4, train_all, SOME, (2, 2), divide):
        for name, result in zip(SOME, results, strict=True):
            error = largest_difference(result["weights"], alone(name)["weights"])
            assert error <= tolerance(name, "weights"), name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "place"), [("lion", (2, 1)), ("muon", (1, 2))])
def test_compiled_does_what_eager_does(name: str, place: Place) -> None:
    for rank in run(2, train, name, place, "all", True, timeout=300):
        error = largest_difference(rank["weights"], alone(name)["weights"])
        assert error <= tolerance(name, "weights")


# ---- what is refused ----------------------------------------------------------------------------


def refusals() -> list[str]:
    from torch.distributed.tensor import Shard, distribute_tensor

    messages, mesh, division = [], mesh_of((1, 2))["shard"], division_of((1, 2))
    by_columns = nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(1)]))
    by_rows = nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)]))
    for param, chosen in (
        (by_rows, None),
        (by_columns, division),
        (nn.Parameter(torch.ones(4, 6)), division),
        (nn.Parameter(torch.ones(())), division),
    ):
        try:
            create_optimizer("adamw", [("a.weight", param)], division=chosen)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_other_layouts_are_refused() -> None:
    for unannounced, columns, plain, scalar in run(2, refusals):
        assert "a.weight is a DTensor" in unannounced
        assert "division=Division" in unannounced
        assert "this process holds (4, 3), expected (2, 6)" in columns
        assert "this process holds (4, 6), expected (2, 6)" in plain
        assert "no dimension to divide" in scalar


@pytest.mark.parametrize("name", ["_fsdp_wrapped_module.h.weight", "h._flat_param"])
def test_flattened_parameters_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"FSDP1 flattened parameter.*fully_shard"):
        create_optimizer("muon", [(name, nn.Parameter(torch.ones(12)))])


def test_a_division_is_checked() -> None:
    from optim.division import Division
    from optim.transport import Transport

    with pytest.raises(ValueError, match=r"'half'.*expected one of all, matrix, none"):
        Division(Transport.over(), "half")


def test_one_process_imports_nothing_for_many() -> None:
    program = """
import sys, torch
from optim import create_optimizer
p = torch.nn.Parameter(torch.ones(4, 4)); p.grad = torch.ones(4, 4)
create_optimizer("mars_m", [("a.weight", p)]).step()
ours = ("greenlet", "optim.divi", "optim.transport")
print([m for m in sys.modules if m.startswith(ours)])
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]", done.stdout
