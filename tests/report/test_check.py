"""report.check tells a run of paper mode from the same run with one quirk left out.

The reference at toy size: the golden training runs, made by the authors' own code. What is checked:
runs of train.py's own update from the same initial values on the same tokens, written as a run
directory, with all switches of paper mode and with one of them off.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from generated import TOKENS, write_run
from safetensors.torch import load_file
from test_golden_training import Batches, configuration, metadata
from test_reference import of

from model import GPT2, GPT2Config
from optim import create_optimizer
from report.check import Options, check, choose, main
from report.options import run_command
from report.reference import find
from report.runs import read_run
from runtime.config import schedule
from runtime.device import Device
from runtime.metrics import MetricsLog
from train import update

GOLDENS = Path(__file__).resolve().parents[1] / "goldens" / "training"
MARS = GOLDENS / "mars_paper_mars_adamw.safetensors"
ADAMW = GOLDENS / "mars_paper_adamw.safetensors"


def reference(golden: Path, file: Path) -> Path:
    """A golden run's training losses as a curve, with the tolerance that its README states."""
    losses = load_file(golden)["loss"].mean(1).tolist()
    with file.open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(("step", "value", "metric", "confidence"))
        for step, loss in enumerate(losses, start=1):
            writer.writerow((step, f"{loss:.9f}", "train_loss", "exact (authors' code, +-1e-5)"))
    return file


def replay(golden: Path, folder: Path, **quirks: Any) -> Path:
    """Train as the golden run did, but for `quirks`; returns the run directory."""
    meta, data = metadata(golden), load_file(golden)
    shape, config = (
        json.loads(meta["model"]),
        configuration(meta["kind"], json.loads(meta["settings"])),
    )
    if "accumulation" in quirks:
        config.train.accumulation = quirks["accumulation"]
    if "warmup" in quirks:
        config.schedule.warmup = quirks["warmup"]
    config.optim |= quirks.get("optim", {})
    scaled = quirks.get("scale_attn", True)
    model = GPT2(
        GPT2Config(
            n_layer=shape["n_layer"], n_head=shape["n_head"], n_embd=shape["n_embd"],
            context=shape["block_size"], vocab_size=shape["vocab_size"], bias=shape["bias"],
            scale_attn_by_inverse_layer_idx=scaled,
        )
    )  # fmt: skip
    model.load_state_dict({name: data[f"init.{name}"] for name, _ in model.named_parameters()})
    optimizer = create_optimizer(named_parameters=model.named_parameters(), **config.optim)
    device, batches = Device.choose(config.train), Batches(data["tokens"])
    log = MetricsLog(folder, [], None)
    for step in range(config.train.steps):
        figures = update(config, step, model, optimizer, schedule(config), batches, device)
        tokens = (step + 1) * config.train.global_batch * shape["block_size"]
        log.log(step + 1, tokens, float(step), {"train/loss": figures.losses.mean().item()})
    log.close()
    tree = {"seed": config.seed, "optim": config.optim, "train": {"steps": config.train.steps}}
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(tree))))
    return folder


def outcome(
    run: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[int, dict[str, Any]]:
    code = run_command(Options, main, "doc", [str(run), f"reference={file}"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])["references"][0]


def groups_of(golden: Path, **matches: list[str]) -> dict[str, Any]:
    """The golden's optimizer settings with other roles in its groups."""
    meta = metadata(golden)
    config = configuration(meta["kind"], json.loads(meta["settings"]))
    groups = json.loads(json.dumps(config.optim["groups"]))
    for name, match in matches.items():
        groups[name]["match"] = match
    return {"groups": groups}


QUIRKS: dict[str, tuple[Path, dict[str, Any]]] = {
    "summed micro-batches": (MARS, {"accumulation": "mean"}),
    "attention divided by layer + 1": (MARS, {"scale_attn": False}),
    "a first step of learning rate zero": (MARS, {"warmup": "nanogpt"}),
    "the correction": (MARS, {"optim": {"correction": "none"}}),
    "its clip": (MARS, {"optim": {"mars": {"gamma": 0.025, "clip": None, "exact": False}}}),
    "undecayed embeddings": (
        ADAMW,
        {"optim": groups_of(ADAMW, decay=["matrix", "embedding", "head"], no_decay=["vector"])},
    ),
    "summed micro-batches under AdamW": (ADAMW, {"accumulation": "mean"}),
}  # fmt: skip


@pytest.mark.parametrize("golden", [MARS, ADAMW], ids=["mars_adamw", "adamw"])
def test_paper_mode_is_inside(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = reference(golden, tmp_path / "paper.csv")
    code, said = outcome(replay(golden, tmp_path / "run"), file, capsys)
    assert code == 0 and said["inside"] and said["points"] == 40 and said["outside"] == 0


@pytest.mark.parametrize("quirk", QUIRKS)
def test_one_quirk_left_out_is_outside(
    quirk: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden, changes = QUIRKS[quirk]
    file = reference(golden, tmp_path / "paper.csv")
    code, said = outcome(replay(golden, tmp_path / "run", **changes), file, capsys)
    assert code == 2 and not said["inside"]
    assert abs(said["worst_deviation"]) > 3 * said["allowed"]  # not by a hair


# ---- against the papers' curves ------------------------------------------------------------------


def table_run(folder: Path, shift: float = 0.0, steps: int = 100_000) -> Path:
    """A run that goes through the README table's MARS-AdamW points."""
    known = {0: 10.9, 1000: 5.0, 10_000: 3.108, 40_000: 2.981, 99_000: 2.849, 100_000: 2.853}
    val = {step: loss + shift for step, loss in known.items() if step <= steps}
    return write_run(
        folder, val, train__steps=steps, optim__name="mars_adamw", optim__correction="mars",
        optim__mars={"exact": False, "gamma": 0.025},
    )  # fmt: skip


def test_a_set_that_a_run_reproduces_and_one_that_it_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = read_run(table_run(tmp_path / "run"))
    found = {verdict.curve.set: verdict for verdict in (check(run, c) for c in choose(run, None))}
    table, figure = found["mars/readme-table"], found["mars/readme-figures"]
    assert table.inside and len(table.points) == 3
    assert [point.at for point in table.points] == [491_520 * n for n in (10_000, 40_000, 100_000)]
    assert table.points[-1].run == 2.849  # val_loss_best: the lowest so far
    assert not figure.inside  # lower at 20B tokens, higher at 50B: other runs
    assert run_command(Options, main, "doc", [str(run.dir)]) == 0  # inside one set is reproduced
    text = capsys.readouterr().out
    assert "INSIDE: 3 of 3" in text and "OUTSIDE" in text
    only = [str(run.dir), "reference=mars/readme-figures"]
    assert run_command(Options, main, "doc", only) == 2


def test_by_how_much_it_is_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = table_run(tmp_path / "run", shift=0.03)
    words = [str(folder), "reference=mars/readme-table"]
    assert run_command(Options, main, "doc", words) == 2
    text = capsys.readouterr().out
    assert "OUTSIDE: 0 of 3" in text and "mean deviation +0.03" in text
    assert re.search(r"\+0\.03000 +0\.01\d* +out by 0\.0(19|2)", text)
    assert run_command(Options, main, "doc", [*words, "tolerance=0.031"]) == 0


def test_only_points_that_both_have_are_compared(tmp_path: Path) -> None:
    short = read_run(table_run(tmp_path / "short", steps=10_000))
    (table,) = [c for c in choose(short, None) if c.set == "mars/readme-table"]
    verdict = check(short, table)
    assert len(verdict.points) == 1 and verdict.inside
    shorter = check(read_run(table_run(tmp_path / "shorter", steps=1000)), table)
    assert not shorter.points and not shorter.inside and "no tokens in common" in shorter.why_not


def test_between_evaluations_it_is_linear_and_only_if_they_are_near(tmp_path: Path) -> None:
    (curve,) = find(["c0448"])  # figure, a point every 1,000 steps from 4,000 on
    near = write_run(tmp_path / "near", {0: 11.0, 9700: 3.0, 10_300: 3.2})
    points = check(read_run(near), curve).points
    assert [round(point.at / TOKENS) for point in points] == [10_000]
    assert points[0].run == pytest.approx(3.1, abs=1e-3)
    far = write_run(tmp_path / "far", {0: 11.0, 8500: 3.0, 11_500: 3.2})
    assert check(read_run(far), curve).points == ()


def test_nothing_to_compare_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert of(optim__name="soap") == []
    folder = write_run(tmp_path / "run", {0: 11.0, 100: 5.0}, optim__name="soap")
    for words, said in (
        ([str(folder)], "no published curve of model gpt2-small, data openwebtext, optimizer soap"),
        ([str(folder), "reference=c0007"], "no point in common"),
        ([str(folder), "reference=c0020"], "no point in common"),
        ([str(tmp_path)], "config.yaml is missing"),
        ([], "expected one run"),
    ):
        assert run_command(Options, main, "doc", words or ["tolerance=1"]) == 1
        assert said in capsys.readouterr().err or "c0020" in words[-1]
