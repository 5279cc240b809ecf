"""The comparison's page and tables, from runs whose answer is known."""

from __future__ import annotations

import csv
import re
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from generated import falling, sweep, write_run

from report.compare import Options, compare, main
from report.options import run_command
from report.runs import TRAIN, VAL, read_runs
from report.settings import differences, group


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """AdamW at 3.0, Lion at 2.9 (twice as fast at first), three seeds each, and one run of another
    batch size."""
    folder = tmp_path / "runs"
    for seed in (1, 2, 3):
        offset = 0.01 * seed
        write_run(folder / f"adamw_{seed}", falling(3.0 + offset), [4.0, 3.5] * 50, seed=seed)
        write_run(
            folder / f"lion_{seed}", falling(2.9 + 1.1 * offset), [4.0, 3.0] * 50, second=1.0,
            seed=seed, optim__name="lion", optim__lr=1e-4,
        )  # fmt: skip
    write_run(folder / "muon", falling(2.8), seed=1, optim__name="muon", train__global_batch=240)
    return folder


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(*words: str) -> int:
    return run_command(Options, main, "doc", words)


def test_numbers(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(str(runs), f"out={out}") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{out}/report.html"
    table = {row["setting"]: row for row in read_csv(out / "settings.csv")}
    assert [*table] == ["muon", "lion", "adamw"]  # best first
    lion, adamw = table["lion"], table["adamw"]
    assert float(adamw["final"]) == pytest.approx(3.02)
    assert float(lion["difference"]) == pytest.approx(-0.1 + 0.002)
    assert lion["difference_method"] == "paired t"
    assert float(lion["difference_low"]) < -0.098 < float(lion["difference_high"]) < -0.09
    # lion's steps take twice as long: its speed-up in seconds is half that in tokens
    tokens, seconds = float(lion["token_speedup"]), float(lion["time_speedup"])
    assert tokens > 1.1 and seconds == pytest.approx(tokens / 2)
    assert float(lion["step_ms"]) == 1000 and float(lion["memory_gb"]) == 2.5
    assert lion["state_bytes"] == "100"
    assert adamw["difference"] == "" and table["muon"]["difference_low"] == ""  # one seed
    assert len(read_csv(out / "runs.csv")) == 7
    curves = read_csv(out / "curves.csv")
    end = [r for r in curves if (r["setting"], r["metric"], r["axis"]) == ("adamw", VAL, "tokens")]
    assert float(end[-1]["mean"]) == pytest.approx(3.02) and end[-1]["seeds"] == "3"
    assert float(end[-1]["min"]) == pytest.approx(3.01)
    for name in ("loss_val_tokens", "loss_val_flops", "loss_train_seconds", "final"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


class Page(HTMLParser):
    """Addresses that a page would load, whether its tags close, and its text in red."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads, self.open, self.alarm = list[str](), list[str](), ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        table = dict(attrs)
        self.loads += [v for k, v in attrs if k in ("src", "href", "action") and v]
        assert tag not in ("script", "link", "iframe", "object")
        if tag not in ("meta", "img", "br"):
            self.open.append(f"{tag} {table.get('class') or ''}".strip())

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().split()[0] == tag

    def handle_data(self, data: str) -> None:
        if any("alarm" in each for each in self.open):
            self.alarm += data + " "


def test_the_page_needs_nothing_but_itself_and_is_red_where_more_than_the_optimizer_differs(
    runs: Path, tmp_path: Path
) -> None:
    hostile = tmp_path / "runs" / "<b>&amp;"
    write_run(hostile, falling(3.3), seed=9, data__text_field="<script>alert(1)</script>")
    assert run(str(runs), f"out={tmp_path}") == 0
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.loads and all(each.startswith("data:image/svg+xml;base64,") for each in page.loads)
    assert not re.search(r"url\(|@import|https?://", re.sub(r'src="[^"]*"', "", text))
    assert 'name="viewport"' in text
    assert "train.global_batch" in page.alarm and "240" in page.alarm
    assert "data.text_field" in page.alarm and "optim.lr" not in page.alarm
    for word in ("ttest_rel", "Holm", "bootstrap", "95 %"):
        assert word in text


def test_nothing_is_red_where_only_optimizer_and_seed_differ(runs: Path, tmp_path: Path) -> None:
    names = [str(path) for path in runs.iterdir() if path.name != "muon"]
    assert run(*names, f"out={tmp_path}") == 0
    assert Page((tmp_path / "report.html").read_text()).alarm == ""


def test_groups_and_labels(tmp_path: Path) -> None:
    write_run(tmp_path / "a", falling(3.0), seed=1, train__micro_batch=6)
    write_run(
        tmp_path / "b", falling(3.0), seed=2, train__micro_batch=12
    )  # cut otherwise: the same
    write_run(tmp_path / "c", falling(3.0), seed=1, optim__lr=1e-3)
    write_run(tmp_path / "d", falling(3.0), seed=1, optim__lr=1e-3, optim__weight_decay=0.0)
    write_run(tmp_path / "e", falling(3.0), seed=1, optim__name="lion")
    groups = group(read_runs([tmp_path])[0])
    found = {each.label: [run.dir.name for run in each.runs] for each in groups}
    assert found == {
        "adamw lr=0.0006 weight_decay=0.1": ["a", "b"],
        "adamw lr=0.001 weight_decay=0.1": ["c"],
        "adamw lr=0.001 weight_decay=0": ["d"],
        "lion": ["e"],
    }
    kinds = {each.key: each.kind for each in differences(groups)}
    assert kinds["train.micro_batch"] == "speed" and kinds["optim.lr"] == "optimizer"
    assert "seed" not in kinds


def test_baselines(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = read_runs([runs])
    assert compare(found).baseline.label == "adamw"
    assert compare(found, "lion").baseline.label == "lion"
    assert compare(found, str(runs / "muon")).baseline.label == "muon"
    assert compare([r for r in found if r.optimizer != "adamw"]).baseline.label == "lion"
    assert run(str(runs), f"out={tmp_path}", "baseline=soap") == 1
    assert "expected one of muon, lion, adamw" in capsys.readouterr().err


def test_mistakes_end_in_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nothing").mkdir()
    for words, said in (
        (["nowhere"], "no such folder"),
        ([str(runs), "metrik=x"], "did you mean metric"),
        ([str(runs), "metric=val"], "expected one of val/loss, train/loss"),
        ([str(tmp_path / "nothing")], "no run that can be read"),
        (["out=x"], "no run given"),
    ):
        assert run(*words) == 1
        (line,) = [each for each in capsys.readouterr().err.splitlines() if "skipped" not in each]
        assert line.startswith("error: ") and said in line


def test_without_validation_the_training_loss_is_compared(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_run(tmp_path / "runs" / f"{seed}", train=[5.0] * 95 + [3.0] * 5, seed=seed)
    comparison = compare(read_runs([tmp_path / "runs"])[0])
    assert comparison.metric == TRAIN
    assert comparison.rows[0].final is not None
    assert comparison.rows[0].final.value == pytest.approx(3.0)  # the last twentieth


def test_published_curves_of_the_same_run_are_drawn_and_listed(tmp_path: Path) -> None:
    long = {step: 3.0 + 1e4 / (step + 2e3) for step in range(0, 100_001, 5000)}
    write_run(tmp_path / "runs" / "a", long, train__steps=100_000)
    comparison = compare(read_runs([tmp_path / "runs"])[0])
    sets = {curve.set for curve, _ in comparison.references}
    assert sets == {"mars/readme-table", "mars/readme-figures", "mars-m/figures"}
    assert run(str(tmp_path / "runs"), f"out={tmp_path}") == 0
    assert "Published curves" in (tmp_path / "report.html").read_text()
    assert run(str(tmp_path / "runs"), f"out={tmp_path}", "references=false") == 0
    assert "Published curves" not in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_fifty_runs_of_ten_thousand_points_take_less_than_twenty_seconds(tmp_path: Path) -> None:
    from report.sweep import Options as SweepOptions
    from report.sweep import main as sweep_main

    grid = 1e-3 * 2.0 ** np.arange(-2, 3)
    for name in ("adamw", "lion"):
        sweep(tmp_path / "runs" / name, grid.tolist(), [1, 2, 3, 4, 5], 1e-3, 0.05, 0.003,
              points=10_000, optim__name=name)  # fmt: skip
    for options, command in ((Options, main), (SweepOptions, sweep_main)):
        began = time.process_time()
        words = [str(tmp_path / "runs"), f"out={tmp_path / 'out'}"]
        assert run_command(options, command, "doc", words) == 0  # type: ignore[arg-type]
        assert time.process_time() - began < 20, sys.argv
