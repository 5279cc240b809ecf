"""A sweep loses no trial and runs none twice, whatever kills it; its best lies inside its grid."""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from forks import forks
from omegaconf import OmegaConf
from system import TINY, Command, here

from optim import list_optimizers
from scripts.compose import CONFIGS, compose_tree
from scripts.sweep import held, main, slots
from scripts.sweep_plan import (
    Grid,
    Journal,
    Trial,
    between,
    beyond,
    listed,
    split_overrides,
    trial,
)

STAND_IN = f"--command={sys.executable} -IS {Path(__file__).parent / 'trial.py'}"


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where each trial that finishes leaves a line; the current folder is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LEDGER", str(tmp_path / "ledger"))
    (tmp_path / "ledger").touch()
    return tmp_path / "ledger"


def records(folder: str = "sweep") -> dict[str, dict[str, Any]]:
    lines = (Path(folder) / "trials.jsonl").read_text().splitlines()
    assert len({json.loads(line)["trial"] for line in lines}) == len(lines), "recorded twice"
    return {json.loads(line)["trial"]: json.loads(line) for line in lines}


# ---- the plan ------------------------------------------------------------------------------------


def test_a_trial_is_named_by_its_values() -> None:
    assert trial({"optim.lr": "0.001", "seed": "1"}).name == "lr-0.001_seed-1"
    awkward = [{"a": "[1,2]"}, {"a": "[1 2]"}, {"a": "x" * 200}, {"a": "x" * 201}]
    assert len({trial(values).name for values in awkward}) == 4


def test_what_is_swept_over() -> None:
    fixed, swept = split_overrides(["optim=lion", "optim.lr=1e-3,3e-3", "seed=range(1,4)"])
    assert fixed == ["optim=lion"]
    assert listed(swept) == {"optim.lr": ["0.001", "0.003"], "seed": ["1", "2", "3"]}
    with pytest.raises(ValueError, match="is an interval"):
        listed(split_overrides(["optim.lr=interval(0,1)"])[1])


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([3.0, 2.0, 3.0], None),
        ([1.0, 2.0, 3.0], "0.0005"),
        ([3.0, 2.0, 1.0], "0.008"),
        ([math.inf] * 3, "0.0005"),
        ([2.0, 1.0, math.inf], None),
    ],
)
def test_beyond_the_edge(losses: list[float], expected: str | None) -> None:
    assert beyond(["1e-3", "2e-3", "4e-3"], losses) == expected


def test_scales_with_zero_and_of_integers() -> None:
    assert beyond(["0", "0.1", "0.2"], [1.0, 2.0, 3.0]) is None  # a scale ends at zero
    assert beyond(["-1", "0", "1"], [3.0, 2.0, 1.0]) == "2"
    assert beyond(["1000", "2000", "4000"], [3.0, 2.0, 1.0]) == "8000"  # no 8e+03: a valid integer
    found = {
        ("0.0025", "0.005"): "0.00354",
        ("1e-05", "2e-05"): "1.41e-05",
        ("0", "0.1"): "0.05",
        ("-1.0", "0.5"): "-0.25",
        ("500", "1000"): "707",
        ("1.0", "2.0"): "1.41",
        ("1", "2"): None,
        ("0.101", "0.102"): None,  # three digits have nothing between them
    }
    assert {pair: between(*pair) for pair in found} == found


def play(grid: Grid, loss: Any) -> list[Trial]:
    """Run a plan without processes: each trial ends at once with ``loss(values)``."""
    given = []
    while (candidate := grid.next()) is not None:
        given.append(candidate)
        value = loss(dict(candidate.values))
        record = {"status": "finished", "val_loss": value} if value < math.inf else {}
        grid.journal.add(candidate, **{"status": "diverged", **record})
        grid.ended(candidate)
    return given


@pytest.mark.parametrize("optimum", [1e-4, 1e-3, 5e-2])
def test_a_grid_is_extended_until_its_best_lies_inside(tmp_path: Path, optimum: float) -> None:
    def loss(values: dict[str, str]) -> float:
        lr = float(values["optim.lr"])
        if lr > 8 * optimum:
            return math.inf
        return (math.log(lr) - math.log(optimum)) ** 2 + int(values.get("seed", 1)) / 100

    journal = Journal(tmp_path / "trials.jsonl")
    values = {"optim.lr": ["0.001", "0.002", "0.004"]}
    given = play(Grid(values, journal, "optim.lr", 10, {"seed": ["2", "3"]}), loss)
    ends = [dict(t.values) for t in given if len(t.values) == 2]
    assert [end["seed"] for end in ends] == ["2", "3"]
    tried = sorted(float(dict(t.values)["optim.lr"]) for t in given if len(t.values) == 1)
    best = float(ends[0]["optim.lr"])
    assert tried[0] < best < tried[-1]
    assert abs(math.log2(best / optimum)) < 1
    # a second start finds nothing to do
    assert (
        play(Grid(values, Journal(journal.path), "optim.lr", 10, {"seed": ["2", "3"]}), loss) == []
    )


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("optimum", [3.4e-4, 1.3e-3, 2.7e-3, 9e-3])
def test_refinements_close_in_on_the_optimum(tmp_path: Path, optimum: float, times: int) -> None:
    """The best value ends within half a step of the optimum, steps being the 2**times-th root of
    the grid's, diverging neighbours or not; seeds come after, there."""

    def loss(values: dict[str, str]) -> float:
        lr = float(values["optim.lr"])
        return math.inf if lr > 1.3 * optimum else math.log(lr / optimum) ** 2

    def plan(file: str, refine: int) -> Grid:
        values = {"optim.lr": ["0.001", "0.002", "0.004"]}
        return Grid(values, Journal(tmp_path / file), "optim.lr", 10, {"seed": ["2"]}, refine)

    given = play(plan("once", times), loss)
    assert given[-1].values[1:] == (("seed", "2"),) and all(len(t.values) == 1 for t in given[:-1])
    tried = sorted(float(t.values[0][1]) for t in given[:-1])
    best = float(given[-1].values[0][1])
    step = 2 ** (0.5**times)
    below, above = tried[tried.index(best) - 1], tried[tried.index(best) + 1]
    assert best / below == pytest.approx(step, rel=0.02)
    assert above / best == pytest.approx(step, rel=0.02)
    assert optimum / step**0.5 < best * 1.02 and best < 1.02 * optimum * step**0.5

    # asked for later, it runs what is missing, whatever had been run
    first = play(plan("later", 0), loss)
    again = plan("later", times)
    second = play(again, loss)
    assert not {t.name for t in first} & {t.name for t in second}
    assert {t.name for t in given} <= {t.name for t in [*first, *second]}
    assert again.best() == plan("once", times).best()
    assert again.total() == len(first) + len(second)
    assert play(plan("later", times), loss) == []


def test_losses_are_means_over_seeds_and_each_optimizer_has_its_own_optimum(tmp_path: Path) -> None:
    def loss(values: dict[str, str]) -> float:
        best = {"adamw": 2e-3, "lion": 4e-3}[values["optim"]]
        spoiled = values["seed"] == "2" and float(values["optim.lr"]) == best / 2
        return abs(math.log2(float(values["optim.lr"]) / best)) + (-1.5 if spoiled else 0)

    values = {"optim": ["adamw", "lion"], "optim.lr": ["0.001", "0.002", "0.004"]}
    values["seed"] = ["1", "2"]
    grid = Grid(values, Journal(tmp_path / "t"), "optim.lr", 6, {"seed": ["7"]})
    ends = [dict(t.values) for t in play(grid, loss) if dict(t.values)["seed"] == "7"]
    assert {end["optim"]: float(end["optim.lr"]) for end in ends} == {"adamw": 2e-3, "lion": 4e-3}


def test_a_torn_line_of_the_journal_is_dropped(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "trials.jsonl")
    journal.add(trial({"a": "1"}), status="finished", val_loss=1.0)
    with journal.path.open("a") as file:
        file.write('{"trial": "a-2", "sta')
    again = Journal(journal.path)
    again.add(trial({"a": "2"}), status="failed")
    assert list(Journal(journal.path).ended) == ["a-1", "a-2"]


# ---- where trials run ----------------------------------------------------------------------------


def test_threads_and_gpus_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [slot["OMP_NUM_THREADS"] for slot in slots(4, None, 1)] == ["4"] * 4
    assert "CUDA_VISIBLE_DEVICES" not in slots(4, None, 1)[0]
    shared = slots(None, "0,1,2,3,4,5,6,7", 2)
    assert [s["CUDA_VISIBLE_DEVICES"] for s in shared] == ["0,1", "2,3", "4,5", "6,7"]
    assert {slot["OMP_NUM_THREADS"] for slot in shared} == {"2"}
    with pytest.raises(ValueError, match="need 8 GPUs, --gpus has 4"):
        slots(4, "0,1,2,3", 2)


def test_a_lock_says_that_a_run_is_alive(tmp_path: Path) -> None:
    assert not held(tmp_path)
    with (tmp_path / ".run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert held(tmp_path)
    assert not held(tmp_path)


# ---- sweeps --------------------------------------------------------------------------------------


def test_failures_are_recorded_and_stop_nothing(ledger: Path) -> None:
    assert main(["sweep", STAND_IN, "optim.lr=0.5,0.25,0.01,0.02", "--jobs=2"]) == 0
    found = records()
    assert {name: r["status"] for name, r in found.items()} == {
        "lr-0.5": "diverged",
        "lr-0.25": "failed",
        "lr-0.01": "finished",
        "lr-0.02": "finished",
    }
    assert found["lr-0.25"]["error"] == "error: there is no such optimizer"
    assert found["lr-0.02"]["val_loss"] == 1.0
    before = Path("sweep/trials.jsonl").read_bytes()
    assert main(["sweep", STAND_IN, "optim.lr=0.5,0.25,0.01,0.02"]) == 0
    assert Path("sweep/trials.jsonl").read_bytes() == before
    assert sorted(ledger.read_text().split()) == ["lr-0.01", "lr-0.02"]
    assert main(["sweep", STAND_IN, "optim.lr=0.5,0.25,0.01,0.02", "--retry-failed"]) == 0
    assert len(Path("sweep/logs/lr-0.25.log").read_text().splitlines()) == 2


def test_mistakes_end_in_one_line_before_the_first_trial(
    ledger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {
        ("optim.lr=0.01",): "nothing to sweep over",
        ("optim.lr=0.01,-1",): "lr must be a number that is not negative, given -1",
        ("optim.lr=0.01,0.02", "optmi=lion"): "unknown configuration key optmi",
        ("optim.lr=0.01,0.02", "--extend=seed"): "--extend=seed is not swept over",
        ("optim.lr=interval(0,1)",): "add --search N",
        ("optim.lr=0.01,0.02", "--gpus=0", "--nproc=2"): "fewer than the --nproc=2",
        ("optim.lr=0.01,0.02", "--refine=1"): "--refine needs --extend KEY",
        ("optim.lr=0.01,0.02", "--extend=optim.lr", "--refine=-1"): "0 or more",
        ("optim=adamw,lion", "--extend=optim"): "'adamw'; expected numbers",
        ("optim.lr=0.01,0.02", "--search=2", "--refine=1"): "--search has none",
    }
    for arguments, expected in wrong.items():
        assert main(["sweep", STAND_IN, *arguments]) == 1
        error = capsys.readouterr().err
        assert expected in error and len(error.splitlines()) == 1, error
    assert main(["sweep", STAND_IN, "optim.lr=0.01,0.02"]) == 0
    assert main(["sweep", STAND_IN, "optim.lr=0.01,0.02", "optim=lion"]) == 1
    assert "holds a sweep with other settings" in capsys.readouterr().err
    assert ledger.read_text().split() == ["lr-0.01", "lr-0.02"]


GRID = ["sweep", STAND_IN, "optim.lr=0.01,0.02,0.04,0.5", "seed=1,2", "train.steps=12", "--jobs=2"]
GRID += ["--extend=optim.lr", "--refine=1", "--then=seed=3"]
# 0.01, 0.02, 0.04; 0.005, which the best at the edge asks for; 0.00707 and 0.0141; seed 3
FINISHED = 2 * 6 + 1


def begin(arguments: list[str]) -> Any:
    process = forks.Process(target=main, args=(arguments,))
    process.start()
    return process


def test_sigkill_again_and_again(ledger: Path) -> None:
    """Nothing finished is run twice, nothing is lost; trials that outlive the sweep are waited
    for."""
    chance = random.Random(0)
    kills = 0
    for _ in range(6):
        process = begin(GRID)
        process.join(chance.uniform(0.3, 1.2))
        kills += process.is_alive()
        process.kill()
        process.join()
    assert main(GRID) == 0
    assert kills >= 2, "the sweep was too fast to be killed: the test has tested nothing"
    assert set(Counter(ledger.read_text().split()).values()) == {1}
    found = records()
    assert sum(r["status"] == "finished" for r in found.values()) == FINISHED
    assert sum(r["status"] == "diverged" for r in found.values()) == 2
    best = Path("sweep/best_runs.txt").read_text().split()
    assert best == [f"sweep/lr-0.01_seed-{seed}" for seed in (1, 2, 3)]
    assert all(found[Path(run).name]["status"] == "finished" for run in best)


def test_a_finished_sweep_is_refined_in_its_folder(ledger: Path) -> None:
    arguments = ["sweep", STAND_IN, "optim.lr=0.008,0.016,0.032", "--extend=optim.lr"]
    arguments += ["--then=seed=2", "--jobs=2"]
    assert main(arguments) == 0
    first = set(ledger.read_text().split())
    assert first == {"lr-0.008", "lr-0.016", "lr-0.032", "lr-0.004", "lr-0.008_seed-2"}
    assert main([*arguments, "--refine=1"]) == 0
    done = Counter(ledger.read_text().split())
    assert set(done) - first == {"lr-0.00566", "lr-0.0113", "lr-0.0113_seed-2"}
    assert set(done.values()) == {1}
    best = Path("sweep/best_runs.txt").read_text().split()
    assert best == ["sweep/lr-0.0113", "sweep/lr-0.0113_seed-2"]


def test_a_signal_stops_the_trials_which_then_go_on(ledger: Path) -> None:
    arguments = ["sweep", STAND_IN, "optim.lr=0.01,0.02", "train.steps=150", "--jobs=2"]
    process = begin(arguments)
    while len(list(Path("sweep").glob("lr-*/metrics.jsonl"))) < 2:
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert process.exitcode is not None
    stopped = [json.loads(f.read_text())["step"] for f in Path("sweep").glob("lr-*/summary.json")]
    assert len(stopped) == 2 and all(0 < step < 150 for step in stopped)
    assert not Path("sweep/trials.jsonl").exists() and ledger.read_text() == ""
    assert main(arguments) == 0
    assert {r["step"] for r in records().values()} == {150}


# ---- search --------------------------------------------------------------------------------------


def test_a_search_finds_the_optimum_and_survives_kills(ledger: Path) -> None:
    pytest.importorskip("optuna")
    # sixty steps: a trial that lives for less than the sweep's pause is over before it is looked at
    arguments = ["sweep", STAND_IN, "optim.lr=tag(log,interval(1e-4,1.0))", "train.steps=60"]
    arguments += ["--search=24", "--jobs=2"]
    for begun, outlived in ((2, True), (6, False)):
        process = begin(arguments)
        while len(list(Path("sweep").glob("trial_*/step"))) < begun:
            assert process.is_alive()
            time.sleep(0.01)
        process.kill()
        process.join()
        while outlived and any(held(folder) for folder in Path("sweep").glob("trial_*")):
            time.sleep(0.01)  # what ended while no sweep was there counts as well
    assert main(arguments) == 0
    found = records()
    assert sorted(found) == [f"trial_{i:04d}" for i in range(24)]
    assert set(Counter(ledger.read_text().split()).values()) == {1}
    counts = Counter(record["status"] for record in found.values())
    assert counts["pruned"] >= 3 and counts["finished"] >= 5
    done = [r for r in found.values() if r["status"] == "finished"]
    best = min(done, key=lambda record: record["val_loss"])
    assert abs(math.log2(float(best["values"]["optim.lr"]) / 0.01)) < 1.5
    hopeless = [r for r in found.values() if r["status"] == "pruned"]
    steps = [int(Path("sweep", r["trial"], "step").read_text()) for r in hopeless]
    assert all(step < 60 for step in steps), "a pruned trial ran to its end"


# ---- the files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted((CONFIGS / "sweep").glob("*.yaml")), ids=lambda f: f.stem)
def test_a_grid_of_learning_rates(file: Path) -> None:
    """It names its optimizer and its source, is geometric, and holds the optimizer's own lr."""
    name = file.stem.removeprefix("lr_")
    assert name in list_optimizers()
    tree = compose_tree([f"+sweep={file.stem}"])
    assert tree.optim.name == name
    points = [float(value) for value in tree.hydra.sweeper.params["optim.lr"].split(",")]
    ratios = [b / a for a, b in itertools.pairwise(points)]
    assert len(points) >= 3 and all(ratio == pytest.approx(2, rel=0.02) for ratio in ratios)
    own = OmegaConf.load(CONFIGS / "optim" / f"{name}.yaml").lr
    assert points[0] <= own <= points[-1] or name == "adafactor"  # its own is relative
    assert file.read_text().splitlines()[1].startswith("# The learning rate of ")


def test_hydra_sweeps_over_the_grid_by_itself(tiny: Command) -> None:
    outcome = here("-m", "+sweep=lr_prodigy", *tiny, "hydra.sweep.dir=sweep")
    assert outcome.code == 0, outcome.err
    runs = [OmegaConf.load(f) for f in sorted(Path("sweep").glob("*/config.yaml"))]
    assert [run.optim.lr for run in runs] == [0.5, 1.0, 2.0]


def test_hydra_records_failed_trials(tiny: Command) -> None:
    outcome = here("-m", *tiny, "optim.lr=-1,1e-3,1e38", "hydra.sweep.dir=sweep")
    assert outcome.code == 1
    failed = [json.loads(line) for line in Path("sweep/failed.jsonl").read_text().splitlines()]
    assert [line["trial"] for line in failed] == ["0", "2"]
    assert failed[0]["error"].endswith("given -1")
    assert "at step" in failed[1]["error"]
    assert Path("sweep/1/summary.json").exists()


@pytest.mark.slow
def test_joblib_runs_trials_side_by_side(tiny: Command) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    outcome = here("-m", "hydra/launcher=cpu", *tiny, "seed=1,2", "hydra.sweep.dir=sweep")
    assert outcome.code == 0, outcome.err
    assert len(list(Path("sweep").glob("*/summary.json"))) == 2


@pytest.mark.slow
def test_a_sweep_of_real_runs_survives_a_kill(
    corpus: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["sweep", "optim.lr=1e-3,1e38", "seed=1", *TINY, *corpus, "train.steps=400"]
    process = begin(arguments)
    while not Path("sweep/lr-0.001/metrics.jsonl").exists():
        assert process.is_alive()
        time.sleep(0.05)
    process.kill()
    process.join()
    assert main(arguments) == 0
    found = records()
    assert {n: r["status"] for n, r in found.items()} == {
        "lr-0.001": "finished",
        "lr-1e+38": "diverged",
    }
    assert found["lr-0.001"]["step"] == 400
