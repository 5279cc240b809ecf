"""The tokens of a step depend on (seed, step) alone: not on how many processes share it, how they
cut it into micro-batches, or where they stopped and how many went on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mixture import mixed
from test_shards import write

from data.corpus import Corpus
from data.loader import Loader, read_windows
from data.order import SAMPLING, Order, create_order
from data.shards import Split, open_split

CONTEXT = 8
GLOBAL_BATCH = 840  # what 1 to 8 processes divide; read with a context this short in no time
WORLDS = range(1, 9)
Source = tuple[Split, Order]


@pytest.fixture(scope="module", params=[*SAMPLING, *(f"mixture {name}" for name in SAMPLING)])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("source")
    sampling = request.param.split()[-1]
    if request.param.startswith("mixture"):
        corpus: Corpus = mixed(folder, sampling)
        return corpus.train, corpus.order(CONTEXT, GLOBAL_BATCH, seed=11)
    split = open_split(write(folder, np.arange(9000) * 31 % 251, shard_tokens=1000), "train")
    return split, create_order(
        sampling, tokens=len(split), context=CONTEXT, global_batch=GLOBAL_BATCH, seed=11
    )


def whole(source: Source, step: int) -> torch.Tensor:
    """One process, one batch, no thread."""
    split, order = source
    return read_windows(split, order.offsets(step), CONTEXT)


@st.composite
def lives(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    """A run in several lives, each of another number of processes: (first step, steps, processes,
    micro-batches per process)."""
    step, parts = draw(st.integers(0, 10**6)), []
    for _ in range(draw(st.integers(1, 4))):
        world = draw(st.sampled_from(WORLDS))
        rows = GLOBAL_BATCH // world
        micro = draw(st.sampled_from([n for n in (1, 2, 3, 5, 15, rows) if rows % n == 0]))
        steps = draw(st.integers(1, 3))
        parts.append((step, steps, world, micro))
        step += steps
    return parts


@settings(max_examples=12, deadline=None)
@given(lives=lives())
def test_any_life_of_a_run_sees_the_same_batches(
    source: Source, lives: list[tuple[int, int, int, int]]
) -> None:
    split, order = source
    for first, steps, world, micro in lives:
        loaders = []
        for rank in range(world):
            rows = slice(rank * GLOBAL_BATCH // world, (rank + 1) * GLOBAL_BATCH // world)
            loaders.append(Loader(split, order, rows=rows, prefetch=1))
        try:
            for step in range(first, first + steps):
                parts = [part for loader in loaders for part in loader.batch(step).chunk(micro)]
                assert torch.equal(torch.cat(parts), whole(source, step))
        finally:
            for loader in loaders:
                loader.close()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**9), st.lists(st.integers(0, GLOBAL_BATCH - 1), min_size=1, max_size=20))
def test_any_rows_alone_are_those_of_the_batch(source: Source, step: int, rows: list[int]) -> None:
    _, order = source
    chosen = np.array(rows)
    np.testing.assert_array_equal(
        order.windows(order.rows(step)[chosen]), order.offsets(step)[chosen]
    )
