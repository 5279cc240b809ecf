"""The tokens of step s depend on (seed, s) alone, and an epoch is a permutation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import SAMPLING, Order, create_order, permute, validation_offsets


def make(sampling: str, n_blocks: int = 97, global_batch: int = 8, seed: int = 1) -> Order:
    return create_order(
        sampling, tokens=n_blocks * 16 + 5, context=16, global_batch=global_batch, seed=seed
    )


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return permute(np.arange(n), n, seed, np.full(n, epoch))


AWKWARD = [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 97, 127, 128, 129, 1000, 1009, 4097]


@pytest.mark.parametrize("n", AWKWARD)
def test_permute_is_a_permutation(n: int) -> None:
    for seed, epoch in itertools.product([0, 1, -1, 2**64 - 1], [0, 1, 10**9]):
        assert sorted(permutation(n, seed, epoch)) == list(range(n))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 2000), st.integers(), st.integers(0, 2**62))
def test_permute_is_a_permutation_of_any_size(n: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(n, seed, epoch)) == list(range(n))


@pytest.mark.parametrize("n", [1, 2, 7, 97])
@pytest.mark.parametrize("global_batch", [1, 3, 8, 200])
def test_every_block_once_per_epoch(n: int, global_batch: int) -> None:
    """Also where a batch straddles epochs, or is longer than one."""
    order = make("shuffled", n, global_batch)
    epochs = 3
    steps = math.ceil(epochs * n / global_batch)
    stream = np.concatenate([order.offsets(step) for step in range(steps)])
    for epoch in stream[: epochs * n].reshape(epochs, n):
        assert sorted(epoch) == [16 * block for block in range(n)]


def test_epochs_and_seeds_differ() -> None:
    orders = {
        (seed, epoch): tuple(permutation(97, seed, epoch))
        for seed, epoch in itertools.product(range(20), range(20))
    }
    assert len(set(orders.values())) == len(orders)
    # Unrelated permutations of n agree in one place on average; 400 of them, in about 400 places.
    first = np.array(orders.pop((0, 0)))
    agreements = sum(int((first == other).sum()) for other in orders.values())
    assert abs(agreements - len(orders)) < 5 * math.sqrt(len(orders))


def assert_uniform(counts: np.ndarray, freedom: int | None = None) -> None:
    """Chi-square within five standard deviations of its mean."""
    expected = counts.sum() / counts.size
    freedom = freedom or counts.size - 1
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_all_orders_are_equally_likely(n: int) -> None:
    """All n! permutations, over 200,000 epochs; few blocks are the hard case for the network."""
    epochs = np.arange(200_000)
    columns = [permute(np.full(epochs.size, p), n, 7, epochs) for p in range(n)]
    code = sum(column * n**p for p, column in enumerate(columns))
    counts = np.unique(code, return_counts=True)[1]
    assert counts.size == math.factorial(n)
    assert_uniform(counts)


@pytest.mark.parametrize("n", [16, 21, 100])
def test_every_block_is_equally_likely_at_every_step(n: int) -> None:
    count = 1000
    table = np.zeros((n, n))
    for seed in range(count):
        table[np.arange(n), permutation(n, seed, 3)] += 1
    # Rows and columns both add up to `count`, which leaves (n-1)^2 degrees of freedom and,
    # for permutations, a variance of the cells greater by n / (n-1).
    mean = count / n
    assert_uniform(mean + (table - mean) * math.sqrt((n - 1) / n), freedom=(n - 1) ** 2)


def test_neighbors_do_not_stay_together() -> None:
    """Where block p+1 lands says nothing about where block p landed."""
    out = permutation(10_007, 0, 0)
    correlation = np.corrcoef(out[:-1], out[1:])[0, 1]
    assert abs(correlation) < 5 / math.sqrt(10_007)
    steps = np.diff(out) % 10_007
    assert len(np.unique(steps)) > 0.6 * 10_007  # 1 - 1/e of all differences, by chance


def test_this_very_order_forever() -> None:
    """Runs of years ago are to be repeated: these numbers change only with a new order's name."""
    assert permutation(10, 1337, 0).tolist() == [8, 3, 6, 7, 1, 5, 4, 9, 2, 0]
    assert permutation(10, 1337, 1).tolist() == [3, 1, 5, 4, 6, 7, 9, 2, 8, 0]
    crops = create_order("random_crops", tokens=10**6, context=16, global_batch=4, seed=1337)
    assert crops.offsets(7).tolist() == [829570, 279794, 701146, 855499]


@pytest.mark.parametrize("sampling", SAMPLING)
def test_a_step_does_not_depend_on_the_steps_before(sampling: str) -> None:
    in_order = [make(sampling).offsets(step) for step in range(30)]
    order = make(sampling)
    for step in np.random.default_rng(0).permutation(30).tolist():
        np.testing.assert_array_equal(order.offsets(step), in_order[step])


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize(("world", "micro_batch"), [(1, 8), (1, 2), (2, 4), (4, 1), (8, 1)])
def test_any_division_of_the_work_sees_the_same_batch(
    sampling: str, world: int, micro_batch: int
) -> None:
    """Each process computes on its own and takes its rows, micro-batch by micro-batch."""
    whole = make(sampling).offsets(5)
    rows = 8 // world
    parts = [
        make(sampling).offsets(5)[rank * rows : (rank + 1) * rows][i : i + micro_batch]
        for rank in range(world)
        for i in range(0, rows, micro_batch)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("sampling", ["shuffled", "sequential"])
def test_blocks_are_dealt_out_in_one_row(sampling: str) -> None:
    """Half the global batch and twice the steps: the same blocks in the same order."""
    large = [make(sampling, global_batch=8).offsets(step) for step in range(20)]
    small = [make(sampling, global_batch=4).offsets(step) for step in range(40)]
    np.testing.assert_array_equal(np.concatenate(large), np.concatenate(small))


@pytest.mark.parametrize("sampling", SAMPLING)
@given(st.integers(2, 500), st.integers(1, 50), st.integers(0, 10**9))
def test_windows_lie_inside_the_split(sampling: str, tokens: int, context: int, step: int) -> None:
    if tokens < context + 1:
        with pytest.raises(ValueError, match="needs"):
            create_order(sampling, tokens=tokens, context=context, global_batch=5, seed=0)
        return
    order = create_order(sampling, tokens=tokens, context=context, global_batch=5, seed=0)
    offsets = order.offsets(step)
    assert offsets.shape == (5,) and offsets.dtype == np.int64
    assert offsets.min() >= 0 and offsets.max() + context + 1 <= tokens


def test_random_crops_reach_every_offset_equally() -> None:
    order = create_order("random_crops", tokens=40, context=16, global_batch=24_000, seed=0)
    counts = np.bincount(order.offsets(0), minlength=24)
    assert counts.size == 24  # the last window ends with the last token
    assert_uniform(counts)
    assert (order.offsets(0) != order.offsets(1)).mean() > 0.9


def test_sequential_reads_on_and_starts_over() -> None:
    order = make("sequential", n_blocks=5, global_batch=3)
    stream = np.concatenate([order.offsets(step) for step in range(4)]) // 16
    assert stream.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_a_corpus_of_any_size_costs_no_memory() -> None:
    order = create_order(
        "shuffled", tokens=10**15, context=1024, global_batch=512, seed=0, repeat=False
    )
    assert len(set(order.offsets(10**6).tolist())) == 512


@pytest.mark.parametrize("sampling", ["shuffled", "sequential"])
def test_without_repeat_a_long_run_is_refused(sampling: str) -> None:
    order = create_order(sampling, tokens=161, context=16, global_batch=4, seed=0, repeat=False)
    order.check(2)
    with pytest.raises(
        ValueError, match=r"train\.steps=3 needs 12 blocks .*has 10: lower .*data\.repeat=true"
    ):
        order.check(3)
    create_order(sampling, tokens=161, context=16, global_batch=4, seed=0).check(3)


def test_random_crops_never_end() -> None:
    create_order("random_crops", tokens=20, context=16, global_batch=4, seed=0, repeat=False).check(
        10**9
    )


def test_unknown_sampling_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"data\.sampling=shufled: .*did you mean shuffled"):
        make("shufled")


# --- the fixed validation set -----------------------------------------------------------------


@given(st.integers(2, 3000), st.integers(1, 64), st.none() | st.integers(1, 4000))
def test_validation_windows(tokens: int, context: int, max_tokens: int | None) -> None:
    if tokens <= context or (max_tokens is not None and max_tokens < context):
        with pytest.raises(ValueError, match="window of context"):
            validation_offsets(tokens, context, max_tokens)
        return
    offsets = validation_offsets(tokens, context, max_tokens)
    targets = (offsets[:, None] + 1 + np.arange(context)).ravel()
    assert targets.max() < tokens
    assert len(np.unique(targets)) == len(targets)  # none twice
    if max_tokens is None:
        assert len(targets) == (tokens - 1) // context * context
    else:
        assert len(targets) <= max_tokens
    gaps = np.diff(offsets)
    assert gaps.size == 0 or gaps.max() - gaps.min() <= context  # evenly spread
