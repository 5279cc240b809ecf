"""Of every stretch of rows each source has its share, and is itself walked through in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shards import write

from data import DataConfig
from data.corpus import Corpus, open_corpus
from data.mixture import Deal, MixedSplit
from data.shards import Manifest, open_split
from data.tokenizer import get_tokenizer

CONTEXT = 8
SIZES = {"web": 1000, "books": 400, "code": 90}
WEIGHTS = {"web": 0.5, "books": 0.3, "code": 0.2}
FIRST = {"web": 0, "books": 60, "code": 120}  # each source has ids of its own, 60 of them


def make(folder: Path, sizes: dict[str, int] = SIZES) -> dict[str, Path]:
    """A prepared folder for each source, in which ids count up within the source's range."""
    folders = {}
    for name, size in sizes.items():
        folders[name] = folder / name
        folders[name].mkdir(parents=True)
        write(folders[name], FIRST[name] + np.arange(size) % 60, shard_tokens=170)
        manifest = vars(Manifest.load(folders[name]))
        fingerprint = get_tokenizer("bytes").fingerprint
        Manifest(**{**manifest, "tokenizer_fingerprint": fingerprint}).save(folders[name])
    return folders


def mixed(folder: Path, sampling: str = "shuffled", repeat: bool = True) -> Corpus:
    return open_corpus(
        DataConfig(
            source="mixture",
            tokenizer="bytes",
            sampling=sampling,
            repeat=repeat,
            mixture={
                name: {"weight": WEIGHTS[name], "dir": str(path)}
                for name, path in make(folder).items()
            },
        )
    )


weights = st.lists(st.floats(0.001, 1000), min_size=1, max_size=6).map(
    lambda values: {f"s{i}": value for i, value in enumerate(values)}
)


@settings(max_examples=200, deadline=None)
@given(weights, st.integers(0, 2**63 - 1), st.integers(0, 10**9))
def test_every_row_has_its_place(weights: dict[str, float], seed: int, start: int) -> None:
    """A source's rows are numbered one after another, and no stretch of rows lacks its share."""
    deal = Deal(weights, seed)
    n = 600
    sources, places = deal(np.arange(start, start + n))
    before, after = deal.counts(start), deal.counts(start + n)
    total = sum(weights.values())
    for index, weight in enumerate(weights.values()):
        mine = places[sources == index]
        np.testing.assert_array_equal(mine, np.arange(before[index], after[index]))
        assert abs(len(mine) - n * weight / total) <= len(weights)
    assert sum(before) == start and sum(after) == start + n


def test_proportions_are_exact_in_the_long_run() -> None:
    assert Deal({"a": 1, "b": 2, "c": 4}, 5).counts(7 * 10**9) == [10**9, 2 * 10**9, 4 * 10**9]
    assert Deal({"a": 0.1, "b": 0.2, "c": 0.7}, 5).counts(10**10) == [10**9, 2 * 10**9, 7 * 10**9]


def test_this_very_deal_forever() -> None:
    sources, places = Deal({"web": 0.5, "books": 0.3, "code": 0.2}, 1337)(np.arange(12))
    assert sources.tolist() == [0, 1, 0, 2, 0, 1, 0, 2, 0, 1, 0, 1]
    assert places.tolist() == [0, 0, 1, 0, 2, 1, 3, 1, 4, 2, 5, 3]


def test_seeds_begin_at_different_points() -> None:
    firsts = {tuple(Deal(WEIGHTS, seed)(np.arange(10))[0].tolist()) for seed in range(50)}
    assert len(firsts) > 5


def test_rows_are_dealt_alike_however_they_are_asked_for() -> None:
    deal = Deal(WEIGHTS, 3)
    rows = np.random.default_rng(0).permutation(1000)
    sources, places = deal(np.arange(1000))
    shuffled = deal(rows)
    np.testing.assert_array_equal(shuffled[0], sources[rows])
    np.testing.assert_array_equal(shuffled[1], places[rows])


@pytest.mark.parametrize("sampling", ["shuffled", "random_crops", "sequential"])
def test_windows_lie_in_one_source_each(tmp_path: Path, sampling: str) -> None:
    corpus = mixed(tmp_path, sampling)
    order = corpus.order(CONTEXT, 10, seed=4)
    seen = []
    with corpus.loader(order) as loader:
        for step in range(60):
            batch = loader.batch(step).numpy()
            np.testing.assert_array_equal(  # each window counts up, modulo 60, in one range
                batch % 60, (batch[:, :1] + np.arange(CONTEXT + 1)) % 60
            )
            source = batch // 60
            assert (source == source[:, :1]).all()
            seen.append(source[:, 0])
    counts = np.bincount(np.concatenate(seen))
    np.testing.assert_allclose(counts, [300, 180, 120], atol=2)


@pytest.mark.parametrize("sampling", ["shuffled", "random_crops"])
def test_seeds_differ(tmp_path: Path, sampling: str) -> None:
    corpus = mixed(tmp_path, sampling)
    one, other = (corpus.order(CONTEXT, 100, seed).offsets(0) for seed in (1, 2))
    assert (one != other).mean() > 0.9


def test_each_source_is_read_whole_before_it_is_read_again(tmp_path: Path) -> None:
    corpus = mixed(tmp_path)
    order = corpus.order(CONTEXT, 10, seed=4)
    assert isinstance(corpus.train, MixedSplit)
    stream = np.concatenate([order.offsets(step) for step in range(200)])
    ends = [*corpus.train.starts[1:], len(corpus.train)]
    for start, end in zip(corpus.train.starts, ends, strict=True):
        mine = stream[(stream >= start) & (stream < end)] - start
        blocks = (end - start - 1) // CONTEXT
        epochs = len(mine) // blocks
        assert epochs >= 2
        for epoch in mine[: epochs * blocks].reshape(epochs, blocks):
            assert sorted(epoch) == [CONTEXT * block for block in range(blocks)]


def test_a_source_keeps_its_order_whatever_it_is_mixed_with(tmp_path: Path) -> None:
    folders = make(tmp_path)

    def stream(names: list[str], weight: float) -> list[int]:
        mixture = {
            n: {"weight": weight if n == "web" else 1, "dir": str(folders[n])} for n in names
        }
        corpus = open_corpus(DataConfig(source="mixture", tokenizer="bytes", mixture=mixture))
        order = corpus.order(CONTEXT, 8, seed=1)
        offsets = np.concatenate([order.offsets(step) for step in range(100)])
        assert isinstance(corpus.train, MixedSplit)
        start = corpus.train.starts[names.index("web")]
        mine = offsets[(offsets >= start) & (offsets < start + SIZES["web"])] - start
        return mine[:80].tolist()

    assert stream(["web", "books"], 3) == stream(["code", "web", "books"], 1) == stream(["web"], 2)


def test_validation_has_the_proportions_of_the_mixture(tmp_path: Path) -> None:
    split = mixed(tmp_path).val
    for tokens, expected in [(None, [27, 16, 11]), (80, [5, 3, 2])]:
        offsets = split.validation_offsets(CONTEXT, tokens)
        rows = np.empty((len(offsets), CONTEXT + 1), np.int64)
        split.read_rows(offsets, rows)
        assert (rows // 60 == rows[:, :1] // 60).all()
        assert np.bincount(rows[:, 0] // 60).tolist() == expected
    with pytest.raises(ValueError, match=r"1 windows of context=8 holds none of data\.mixture"):
        split.validation_offsets(CONTEXT, CONTEXT)


def test_bytes_per_token_is_that_of_the_mixture(tmp_path: Path) -> None:
    corpus = mixed(tmp_path)
    assert corpus.val.bytes_per_token == pytest.approx(1.0)
    assert isinstance(corpus.val, MixedSplit)
    corpus.val.parts["web"].bytes = 3 * SIZES["web"]
    assert corpus.val.bytes_per_token == pytest.approx(2.0)  # half of it is web
    corpus.val.parts["code"].bytes = None
    assert corpus.val.bytes_per_token is None


def test_one_source_alone_is_that_source(tmp_path: Path) -> None:
    folder = make(tmp_path)["web"]
    mixture = {"web": {"weight": 7, "dir": str(folder)}}
    corpus = open_corpus(DataConfig(source="mixture", tokenizer="bytes", mixture=mixture))
    plain = open_split(folder, "train")
    np.testing.assert_array_equal(corpus.train.read(0, 1000), plain.read(0, 1000))
    assert str(corpus).splitlines()[1].strip().startswith("100.00% web: 1,000 tokens")


# --- what a user can get wrong --------------------------------------------------------------------


def test_without_repeat_the_source_that_ends_is_named(tmp_path: Path) -> None:
    order = mixed(tmp_path, repeat=False).order(CONTEXT, 10, seed=0)
    order.check(5)
    with pytest.raises(ValueError, match=r"train\.steps=6 needs 12 blocks .*data\.mixture\.code"):
        order.check(6)


@pytest.mark.parametrize(
    ("mixture", "complaint"),
    [
        ({}, r"data\.mixture is empty"),
        ({"a": 1}, r"data\.mixture\.a has no weight"),
        ({"a": {"dir": "x"}}, r"data\.mixture\.a has no weight"),
        ({"a": {"weight": "much"}}, r"data\.mixture\.a\.weight=much: expected a number"),
        ({"a": {"weight": 0}}, r"data\.mixture\.a\.weight=0\.0: expected a positive number"),
        ({"a": {"weight": -1}}, "expected a positive number"),
        ({"a": {"weight": float("nan")}}, "expected a positive number"),
        ({"a": {"weight": 1}, "b": {"weight": 1e-12}}, "lie too far apart"),
        ({"a": {"weight": 1, "fils": []}}, r"data\.mixture\.a: .*fils"),
        ({"a": {"weight": 1, "files": "x"}}, r"data\.mixture\.a: "),
        ({"a": {"weight": 1, "source": "mixture"}}, "is a mixture itself"),
        ({"a": {"weight": 1, "tokenizer": "gpt2"}}, r"tokenizer=gpt2, but data\.tokenizer=bytes"),
        ({"a": {"weight": 1, "dir": "/nowhere"}}, "/nowhere not found"),
        ({"a": {"weight": 1}}, r"needs data\.dir"),
    ],
)
def test_mistakes(mixture: dict[str, Any], complaint: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        open_corpus(DataConfig(source="mixture", tokenizer="bytes", mixture=mixture))


def test_a_source_shorter_than_a_window_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.mixture\.code: the split has 90 tokens"):
        mixed(tmp_path).order(100, 4, seed=0)
