"""WikiText and LAMBADA as lm-evaluation-harness's tasks give them: its recorded answers on texts
written for these tests, and its own text functions where it is installed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from lm_eval_tasks import GOLDENS, PAGES, PASSAGES, tiny_model

from data.tokenizer import get_tokenizer
from eval.checkpoint import open_device
from eval.likelihood import Scorer
from eval.perplexity import articles, detokenize, lambada, passage, rolling_windows, wikitext

CPU = open_device("cpu", "fp32")


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(tiny_model(), CPU)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    golden: dict[str, Any] = json.loads((GOLDENS / "lm_eval.json").read_text())
    return golden


def test_wikitext_equals_lm_eval(scorer: Scorer, golden: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "wiki.test.raw"
    file.write_text("\n".join(PAGES))
    found = wikitext(scorer, get_tokenizer("gpt2"), str(file), None)
    expected = golden["wikitext"]
    assert articles(str(file), None) == PAGES
    assert found["n"] == len(PAGES) and found["unknown_words"] == 1
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5)


def test_lambada_equals_lm_eval(scorer: Scorer, golden: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "passages.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    found = lambada(scorer, get_tokenizer("gpt2"), str(file), None)
    assert found["perplexity"] == pytest.approx(golden["lambada"]["perplexity"], rel=1e-5)
    assert found["acc"] == golden["lambada"]["acc"]
    assert found["n"] == len(PASSAGES)
    assert found["perplexity_stderr"] > 0


def test_both_forms_of_a_passage() -> None:
    assert passage({"text": "one two three"}) == ("one two", " three")
    for word in ("three", " three"):
        assert passage({"context": "one two", "continuation": word}) == ("one two", " three")
    with pytest.raises(ValueError, match="a row has a: expected text"):
        passage({"a": 1})


@pytest.mark.parametrize("length", [1, 5, 10, 11, 20, 23])
def test_windows_predict_each_token_once(length: int) -> None:
    """The example of lm_eval's documentation, and its property."""
    ids, context = list(range(100, 100 + length)), 10
    windows = list(rolling_windows(ids, 0, context))
    assert [token for window in windows for token in window.continuations[0]] == ids
    text = [0, *ids]
    for window in windows:
        whole = [*window.context, *window.continuations[0]]
        assert len(whole) == min(context, length) + 1  # each but a short text's one is full
        start = text.index(whole[0])
        assert text[start : start + len(whole)] == whole
    assert list(rolling_windows([], 0, context)) == []


@pytest.mark.slow
def test_windows_are_lm_evals() -> None:
    utils = pytest.importorskip("lm_eval.utils", reason="lm_eval is not installed")
    for length in (1, 7, 8, 9, 16, 21):
        ids = list(range(length))
        theirs = [
            utils.make_disjoint_window(pair)
            for pair in utils.get_rolling_token_windows(ids, 99, 8, 1)
        ]
        ours = [(w.context, w.continuations[0]) for w in rolling_windows(ids, 99, 8)]
        assert ours == theirs


@pytest.mark.slow
def test_text_is_lm_evals(shared: Path) -> None:
    theirs = pytest.importorskip(
        "lm_eval.tasks.wikitext.preprocess_wikitext", reason="lm_eval is not installed"
    )
    pages = articles(str(shared / "data/wikitext-2/test.txt"), None)
    assert len(pages) == 62  # as in EleutherAI/wikitext_document_level
    for page in [*pages, *PAGES]:
        assert detokenize(page) == theirs.wikitext_detokenizer({"page": page})


def test_the_loss_behind_the_perplexities_is_one(scorer: Scorer, tmp_path: Path) -> None:
    file = tmp_path / "wiki.test.raw"
    file.write_text(PAGES[0])
    found = wikitext(scorer, get_tokenizer("gpt2"), str(file), None)
    size, words = len(PAGES[0].encode()), len(PAGES[0].split()) + 2  # two empty ends count
    nats = found["bits_per_byte"] * math.log(2) * size
    assert nats == pytest.approx(math.log(found["byte_perplexity"]) * size)
    assert nats == pytest.approx(math.log(found["word_perplexity"]) * words)


def test_a_missing_file(scorer: Scorer, tmp_path: Path) -> None:
    for task in (wikitext, lambada):
        with pytest.raises(FileNotFoundError, match="nowhere does not exist: expected"):
            task(scorer, get_tokenizer("gpt2"), str(tmp_path / "nowhere"), None)
