"""Who owns what, and that what is sent arrives: on 1, 2 and 4 processes, with awkward shapes."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from workers import run

from optim.lockstep import in_parts, lockstep, total
from optim.sharding import Table, matrix_work, plan, rows
from optim.transport import Exchange, Transport

SHAPES = [(257, 66), (198, 66), (66, 66), (264, 66), (66, 264), (66, 66), (3, 7), (3,), (66,)]
# processes as replicas x shards
TABLES = [(1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (2, 2)]


# ---- plans ---------------------------------------------------------------------------------------


@given(n=st.integers(0, 300), parts=st.integers(1, 9))
def test_rows_are_cut_as_torch_cuts_them(n: int, parts: int) -> None:
    chunks = list(torch.arange(n).chunk(parts)) if n else []
    chunks += [torch.arange(0)] * (parts - len(chunks))
    for part, chunk in enumerate(chunks):
        assert list(range(*rows(n, parts, part))) == chunk.tolist()


@given(n=st.integers(0, 300), replicas=st.integers(1, 5), shards=st.integers(1, 5))
def test_every_row_is_updated_by_one_process(n: int, replicas: int, shards: int) -> None:
    updated = [
        row
        for replica, shard in product(range(replicas), range(shards))
        for row in range(*Table(replicas, shards, replica, shard).updated(n))
    ]
    assert sorted(updated) == list(range(n))


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 9), st.integers(1, 4))
def test_plans_are_complete_and_balanced(work: list[int], size: int, waves: int) -> None:
    made = plan(work, size, waves)
    owned = [i for rank in range(size) for wave in range(waves) for i in made.owned(rank, wave)]
    assert sorted(owned) == list(range(len(work)))
    assert made == plan(work, size, waves)
    # no process has more than the mean and one matrix (Graham, 1969)
    assert max(made.loads) <= sum(work) / size + max(work, default=0) * (1 - 1 / size) + 1e-9


@pytest.mark.parametrize(
    ("layers", "width", "size"), [(12, 768, 8), (24, 1024, 8), (36, 1280, 16), (6, 384, 4)]
)
def test_gpt2_is_balanced_to_a_few_percent(layers: int, width: int, size: int) -> None:
    block = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    made = plan([matrix_work(shape) for shape in block * layers], size)
    assert made.balance <= 1.05, str(made)


def test_a_plan_is_one_readable_line() -> None:
    assert str(plan([4, 3, 3, 2], 2)) == (
        "4 matrices on 2 processes, share of the work 50.0%, 50.0% (largest over mean 1.00)"
    )


# ---- transport -----------------------------------------------------------------------------------


def groups(replicas: int, shards: int) -> Transport:
    """This process's transport in a table of processes; groups are made once per table."""
    from torch.distributed.device_mesh import init_device_mesh

    if (replicas, shards) not in _made:
        mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replica", "shard"))
        _made[replicas, shards] = mesh
    mesh = _made[replicas, shards]
    return Transport.over(mesh.get_group("shard"), mesh.get_group("replica"))


_made: dict[tuple[int, int], object] = {}


def whole_matrices() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def send_there_and_back(replicas: int, shards: int, waves: int) -> dict[str, int]:
    transport = groups(replicas, shards)
    table, whole = transport.table, whole_matrices()
    held = [x[slice(*table.held(len(x)))].clone() for x in whole]
    made = plan([matrix_work(x.shape) for x in whole], table.size, waves)
    exchange = Exchange(transport, [x.shape for x in whole], made, torch.empty(0))
    arriving = [exchange.there(held, wave) for wave in range(waves)]
    seen: set[int] = set()
    for wave, arrive in enumerate(arriving):
        owned = arrive()
        assert sorted(owned) == made.owned(table.rank, wave)
        for i, x in owned.items():
            assert torch.equal(x, whole[i]), f"matrix {i}"
        back = exchange.back({i: -2 * x for i, x in owned.items()}, wave)()
        for i, update in back.items():
            assert torch.equal(update, -2 * held[i]), f"update {i}"
        seen |= back.keys()
    assert seen == set(range(len(SHAPES)))
    return dict(transport.received)


@pytest.mark.parametrize("waves", [1, 3])
@pytest.mark.parametrize(("replicas", "shards"), TABLES)
def test_gradients_reach_owners_and_updates_come_back(
    replicas: int, shards: int, waves: int
) -> None:
    received = run(replicas * shards, send_there_and_back, replicas, shards, waves)
    size, all_bytes = replicas * shards, 4 * sum(x.numel() for x in whole_matrices())
    # an entry travels once to its owner's replica-mates, and once back to each that holds it
    there = sum(r.get("gradients", 0) for r in received)
    back = sum(r.get("updates", 0) for r in received)
    assert there <= all_bytes
    assert back <= (replicas - 1) * all_bytes + all_bytes
    if size > 1 and shards == 1:  # DDP: each of N - 1 processes gets what it does not own, no more
        assert there == 0
        assert back == (size - 1) * all_bytes


def share_with_replicas(replicas: int, shards: int, even: bool) -> None:
    """Rows as many for each replica, which travel in one all-gather, or not."""
    transport = groups(replicas, shards)
    table = transport.table
    whole = [torch.arange(24.0).view(8, 3) * i for i in (1, 2)] if even else whole_matrices()
    truth = [x[slice(*table.held(len(x)))] for x in whole]
    mine = [torch.full_like(x, torch.nan) for x in truth]
    cuts = [[rows(len(x), replicas, replica) for x in truth] for replica in range(replicas)]
    for x, right, cut in zip(mine, truth, cuts[table.replica], strict=True):
        x[slice(*cut)] = right[slice(*cut)]
    parts = [[x[slice(*c)] for x, c in zip(mine, cut, strict=True)] for cut in cuts]
    transport.share(parts, "parameters")()
    assert all(torch.equal(x, right) for x, right in zip(mine, truth, strict=True))
    own = parts[table.replica]
    others = sum(x.numel() for x in truth) - sum(x.numel() for x in own)
    assert transport.received["parameters"] == (4 * others if replicas > 1 else 0)


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize(("replicas", "shards"), TABLES)
def test_replicas_share_rows(replicas: int, shards: int, even: bool) -> None:
    run(replicas * shards, share_with_replicas, replicas, shards, even)


# ---- sums ----------------------------------------------------------------------------------------


def normalized(x: Tensor) -> Tensor:
    """A rule of granularity "tensor": two sums one after the other for matrices, one for others."""
    (squares,) = total(x.double().square().sum())
    x = x / squares.sqrt().to(x.dtype)
    if x.ndim < 2:
        return x
    columns, count = total(x.sum(0), x.new_full((), len(x)))
    return x - columns / count


def normalize_in_parts(replicas: int, shards: int) -> tuple[float, int]:
    transport = groups(replicas, shards)
    cuts = [slice(*transport.table.updated(len(x))) for x in whole_matrices()]
    whole = whole_matrices()
    calls = 0

    def reduce(parts: list[Tensor]) -> list[Tensor]:
        nonlocal calls
        calls += 1
        return transport.add_up(parts, replicas=True)

    tasks = [lambda x=x[cut]: normalized(x) for x, cut in zip(whole, cuts, strict=True)]
    results = lockstep(tasks, reduce)
    assert not in_parts()
    errors = [
        (result - normalized(x)[cut]).abs().max().item()
        for result, x, cut in zip(results, whole, cuts, strict=True)
        if len(result)
    ]
    return max(errors, default=0.0), calls


@pytest.mark.parametrize(("replicas", "shards"), TABLES)
def test_sums_of_all_tensors_travel_together(replicas: int, shards: int) -> None:
    for error, calls in run(replicas * shards, normalize_in_parts, replicas, shards):
        assert error <= 1e-7
        assert calls == 2  # for nine tensors that ask once or twice each


def test_an_error_in_one_update_is_the_error() -> None:
    def bad() -> None:
        total(torch.ones(1))
        raise ZeroDivisionError("here")

    with pytest.raises(ZeroDivisionError, match="here"):
        lockstep([bad, lambda: normalized(torch.ones(2, 2))], lambda parts: parts)
    assert not in_parts()
