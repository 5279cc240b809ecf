"""The published facts: carried over whole, found by what ran, never mixed."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generated import settings

from report.options import run_command
from report.reference import SUPERSEDED, Curve, curves, find, matching, read_curve
from report.reference.__main__ import Options, main, records, write_wandb
from runtime.config import flatten


def of(**changes: Any) -> list[Curve]:
    return matching(flatten(settings(**changes)))


def test_every_fact_was_carried_over(shared: Path) -> None:
    """Row by row equal to the reference material, each number as it is written there."""
    file = shared / "reference" / "reference_curves.csv"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    with file.open(newline="") as lines:
        there = list(csv.DictReader(lines))
    here = []
    for curve in curves():
        for value, step in zip(curve.values, curve.steps, strict=True):
            where = (curve.curve, curve.source, curve.confidence, curve.metric)
            here.append((*where, float(value), float(step)))
    expected = [
        (r["curve"], r["source"], r["confidence"], r["metric"], float(r["value"]),
         float(r["step"]) if r["step"] else math.nan)
        for r in there
    ]  # fmt: skip
    assert len(here) == len(expected)
    assert sorted(map(str, here)) == sorted(map(str, expected))


def test_every_curve_has_a_source_a_confidence_and_a_set() -> None:
    found = curves()
    assert len(found) > 700 and len({curve.curve for curve in found}) == len(found)
    for curve in found:
        assert curve.source and curve.confidence and curve.set.count("/") == 1
        if curve.is_loss:
            assert np.isfinite(curve.losses).all() and (curve.tolerance > 0).all()


def test_the_readmes_table() -> None:
    """papers.md's numbers at the tokens that were really trained on: steps 10k, 40k and 100k."""
    (table,) = [c for c in of(optim__name="mars_adamw", optim__correction="mars")
                if c.set == "mars/readme-table"]  # fmt: skip
    assert table.values.tolist() == [3.108, 2.981, 2.849]
    assert (table.tokens / 491_520).tolist() == [10_000, 40_000, 100_000]
    np.testing.assert_allclose(table.tolerance, 0.0105)  # rounding, and an evaluation's noise


@pytest.mark.parametrize(
    ("changes", "sets"),
    [
        ({}, {"mars/readme-table", "mars/readme-figures", "mars-m/figures"}),
        ({"optim__name": "muon"}, {"mars/readme-table", "mars/readme-figures"}),
        ({"optim__name": "moonlight"}, {"mars-m/figures"}),
        ({"optim__name": "lion"}, set()),  # the paper has Lion for large alone
        (
            {"optim__name": "lion", "model__n_layer": 36, "model__n_embd": 1280},
            {"mars/paper-v4"},
        ),
        ({"optim__correction": "mars"}, set()),  # no paper ran AdamW's settings under MARS
        ({"data__name": "HuggingFaceFW/fineweb-edu"}, {"mars/fineweb-figures", "mars-m/figures"}),
        ({"data__name": "HuggingFaceFW/fineweb"}, set()),  # modded's model is not GPT-2
        ({"data__name": None, "data__source": "stdlib"}, set()),
        ({"model__n_layer": 4}, set()),
    ],
)
def test_matching(changes: dict[str, Any], sets: set[str]) -> None:
    found = of(**changes)
    assert {curve.set for curve in found} == sets
    assert not any(SUPERSEDED in curve.set for curve in found)


def test_exact_and_approximate_mars_and_gamma_are_told_apart() -> None:
    mars = {"optim__name": "mars_adamw", "optim__correction": "mars"}
    exact = of(**mars, optim__mars={"exact": True, "gamma": 0.025})
    approximate = of(**mars, optim__mars={"exact": False, "gamma": 0.025})
    assert {c.variant.partition(";")[0] for c in exact} == {"exact"}
    assert {c.variant.partition(";")[0] for c in approximate} == {"approx"}
    mars_m = of(optim__name="mars_m", optim__correction="mars", optim__mars={"gamma": 0.01})
    assert mars_m and all("gamma=0.01" in curve.variant for curve in mars_m)


def test_finding_by_number_set_and_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert [c.curve for c in find(["c0007"])] == ["c0007"]
    assert len(find(["mars/readme-table"])) == 10
    assert {c.model for c in find(["mars/readme-table/gpt2-small/*"])} == {"gpt2-small"}
    with pytest.raises(ValueError, match="did you mean mars/readme-table"):
        find(["mars/readme-tabl"])
    assert run_command(Options, main, "doc", ["list", "mars/superseded"]) == 0
    out = capsys.readouterr().out
    assert "c0010" in out and "0456cdd" in out and "2.755 at 49.15B tokens" in out
    assert run_command(Options, main, "doc", ["lst"]) == 1


def test_perplexity_becomes_nats() -> None:
    curve = find(["c0502"])[0]
    assert curve.metric == "ppl"
    np.testing.assert_allclose(np.exp(curve.losses), curve.values)
    np.testing.assert_allclose(curve.tolerance, 0.05 / curve.values)  # figure (+-0.05)


def test_a_curve_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("step,value,metric,confidence\n1,4.00,train_loss,mine (+-1e-5)\n2,3.50,,\n")
    curve = read_curve(file)
    assert curve.metric == "train_loss" and curve.steps.tolist() == [1, 2]
    assert curve.tolerance.tolist() == [1e-5, 1e-5]
    for text, said in (
        ("a,b\n1,2\n", "expected a CSV"),
        ("step,value\n1,x\n", "could not convert"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            read_curve(file)


@pytest.mark.slow
def test_wandb_offline_holds_the_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "runtime")
    from test_mirrors import settled_history

    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    chosen = find(["c0007", "c0762"])
    folders = write_wandb(chosen, "p", "offline", tmp_path)
    for curve, folder in zip(chosen, folders, strict=True):
        assert f"reference-{curve.curve}" in folder.name
        written = settled_history(folder, len(curve.values))
        names = ("step", "tokens", "val/loss")
        assert [{n: line[n] for n in names} for line in written] == list(records(curve))
