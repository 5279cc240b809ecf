"""Options are taken literally, typed, and refused with the nearest name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from eval.options import read_options


@dataclass(frozen=True)
class Options:
    checkpoint: str
    tokens: int = 200
    top_p: float | None = None
    stream: bool = True


def test_values() -> None:
    words = ["checkpoint=a=b: {c} [d] null 'e'", "tokens=3", "top_p=0.5", "stream=False"]
    expected = Options("a=b: {c} [d] null 'e'", tokens=3, top_p=0.5, stream=False)
    assert read_options(Options, words) == expected
    assert read_options(Options, ["checkpoint=null", "top_p=null"]) == Options("null")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tokens=3"], "checkpoint= is missing"),
        (["checkpoint=x", "token=3"], "unknown option token: did you mean tokens?"),
        (["--checkpoint=x"], "unknown option --checkpoint: did you mean checkpoint?"),
        (["qqq=1"], "unknown option qqq: expected checkpoint, tokens, top_p, stream"),
        (["checkpoint=x", "tokens"], "tokens has no value: write tokens=..."),
        (["checkpoint=x", "tokens=1.5"], "tokens=1.5: expected a value of type int"),
        (["checkpoint=x", "top_p=half"], "top_p=half: expected a value of type float"),
        (["checkpoint=x", "stream=1"], "stream=1: expected true or false"),
        (["checkpoint=x", "tokens=null"], "tokens=null: expected a value of type int"),
        (["checkpoint=x", "checkpoint=y"], "checkpoint is given twice"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        read_options(Options, words)
    assert str(error.value) == message
