"""Interrupted anywhere and started again: bit-identical to never interrupted.

A checkpoint after every step puts about half of all kills inside a checkpoint write.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from system import (
    TINY,
    Command,
    assert_same_run,
    checkpoints,
    here,
    metrics,
    shell,
    start,
    tensors,
    until,
    wait,
)

EVERY_STEP = ("train.checkpoint_every=1", "train.eval_every=5")


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def starts(folder: Path) -> int:
    """How often training has started or gone on; it then says "run <folder> ..."."""
    return sum(line.startswith("run ") for line in lines(folder / "log.txt"))


def kill(command: Command, folder: Path, chance: random.Random) -> tuple[bool, bool]:
    """Start the command and kill it after a random time. Returns whether it was alive still, and
    whether it was killed inside a checkpoint write."""
    before = starts(folder)
    process = start(*command, output=folder.with_suffix(".out"))
    if chance.random() < 0.75:  # count from the first checkpoint, else from the process's start
        while process.is_alive() and starts(folder) == before:
            time.sleep(0.001)
        had = set(folder.glob("checkpoints/*"))
        while process.is_alive() and set(folder.glob("checkpoints/*")) == had:
            time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.25))
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive, any(folder.glob("checkpoints/*.tmp"))


def finish(command: Command, folder: Path) -> None:
    output = folder.with_suffix(".out")
    process = start(*command, output=output)
    process.join(120)
    assert process.exitcode == 0, output.read_text()


def survives(command: Command, reference: Path, folder: Path, kills: int, seed: int) -> list[bool]:
    """Run the command through so many kills, and compare. Per kill: whether inside a write."""
    chance = random.Random(seed)
    inside: list[bool] = []
    for _ in range(kills):
        alive, wrote = kill(command, folder, chance)
        if not alive:
            break
        inside.append(wrote)
    finish(command, folder)
    print(
        f"seed {seed}: {len(inside)} kills, {sum(inside)} inside a checkpoint write"
    )  # on failure
    assert_same_run(reference, folder)
    assert not list(folder.glob("**/*.tmp"))
    return inside


def test_sigkill_changes_no_bit(tiny: Command, tmp_path: Path) -> None:
    command = (*tiny, *EVERY_STEP, "train.steps=60")
    reference = here(*command, "run.dir=reference").dir
    inside = survives((*command, "run.dir=killed"), reference, tmp_path / "killed", 3, seed=1)
    assert inside, "the run ended before the first kill"


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [("optim=adamw", "model.dropout=0.1"), ("optim=mars_adamw", "optim.mars.exact=true")],
    ids=["adamw", "exact_mars"],
)
def test_sigkill_at_many_moments(tiny: Command, tmp_path: Path, optimizer: Command) -> None:
    command = (*tiny, *EVERY_STEP, *optimizer, "train.steps=100", "train.micro_batch=2")
    reference = here(*command, "run.dir=reference").dir
    inside: list[bool] = []
    attempt = 0
    while len(inside) < 10:
        attempt += 1
        name = f"killed_{attempt}"
        inside += survives(
            (*command, f"run.dir={name}"), reference, tmp_path / name, 12, seed=100 + attempt
        )
    assert any(inside), (
        "no kill fell into a checkpoint write: the test has tested less than it says"
    )


def test_a_signal_ends_cleanly_and_loses_nothing(tiny: Command) -> None:
    """Any number of times."""
    command = (*tiny, "train.steps=200", "train.eval_every=50", "train.checkpoint_every=1000")
    stopped = 0
    for name in ("SIGTERM", "SIGINT"):
        process = shell(*command, "run.dir=stopped")
        until(
            lambda before=stopped: len(lines(Path("stopped/metrics.jsonl"))) > before + 10,
            lambda process=process: process.poll() is None,
        )
        process.send_signal(getattr(signal, name))
        outcome = wait(process)
        before, stopped = stopped, outcome.result["step"]
        assert outcome.err == ""
        assert before < stopped < 200
        assert checkpoints(outcome.dir)[-1].name == f"step_{stopped:08d}"
        assert json.loads(Path("stopped/summary.json").read_text())["stopped_by"] == name
        assert f"stopped by {name}; the same command continues it" in outcome.out

    assert here(*command, "run.dir=stopped").result["step"] == 200
    assert_same_run(here(*command, "run.dir=reference").dir, Path("stopped"))


def test_a_living_run_is_not_taken_over(tiny: Command) -> None:
    """Without run.dir the second start makes a run of its own; with it, it is refused."""
    long = (*tiny, "train.steps=10000", "train.eval_every=0", "train.checkpoint_every=0")
    metrics_files = partial(Path("runs").glob, "*/metrics.jsonl")
    first = start(*long, output=Path("first"))
    try:
        until(lambda: any(map(lines, metrics_files())), first.is_alive)
        (living,) = Path("runs").iterdir()
        assert "is in use by another process" in here(*long, f"run.dir={living}").error
        assert "is in use by another process" in here(*long, f"train.resume={living}").error
        second = start(*long, output=Path("second"))
        until(lambda: len(list(metrics_files())) == 2, second.is_alive)
        second.kill()
    finally:
        first.terminate()
        first.join()
    assert Path(json.loads(lines(Path("first"))[-1])["run_dir"]).name == living.name


def interrupted(command: Command, at: int, run: str) -> Path:
    """A run folder as a kill right after the checkpoint of step ``at`` leaves it."""
    folder = here(*command, f"run.dir={run}").dir
    for path in checkpoints(folder):
        if int(path.name[5:]) > at:
            shutil.rmtree(path)
    (folder / "summary.json").unlink()
    return folder


EIGHT = ("train.checkpoint_every=2", "train.keep_checkpoints=9")  # steps, all checkpoints kept


@pytest.fixture
def eight(tiny: Command) -> Command:
    return (*tiny, *EIGHT)


@pytest.fixture(scope="module")
def reference(corpus: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `eight` gives undisturbed."""
    folder = tmp_path_factory.mktemp("undisturbed") / "reference"
    return here(*TINY, *corpus, *EIGHT, f"run.dir={folder}").dir


def test_the_same_command_finds_its_unfinished_run(
    eight: Command, reference: Path, tmp_path: Path
) -> None:
    for name, run in {
        "mine": "runs/2026-01-01_000000_mine",
        "not_mine": "runs/2026-01-02_000000_not_mine",  # the name merely ends alike
    }.items():
        interrupted((*eight, f"run.name={name}"), 4, run)
    outcome = here(*eight, "run.name=mine")
    assert outcome.dir == tmp_path / "runs/2026-01-01_000000_mine"
    assert "continuing at step 4" in outcome.out
    assert_same_run(reference, outcome.dir)
    assert here(*eight, "run.name=mine").dir != outcome.dir  # that one is finished: a new run


def test_a_home_folder_is_meant_by_its_sign(
    eight: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shells leave the ~ of run.dir=~/mine to the program, and Hydra wants it in quotes."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert here(*eight, 'run.dir="~/mine"').dir == tmp_path / "home/mine"
    assert "continuing at step 8" in here(*eight, 'train.resume="~/mine"', "train.steps=9").out
    here(*eight, 'paths.runs="~/runs"')
    assert list((tmp_path / "home/runs").glob("*/summary.json"))
    assert not Path("~").exists()


def test_resume_never_starts_anew(eight: Command) -> None:
    folder = interrupted(eight, 4, "runs/2026-01-01_000000_gpt2_nano_adamw_text")
    assert here(*eight, "train.resume=never").dir.resolve() != folder.resolve()
    error = here(*eight, "train.resume=never", f"run.dir={folder}").error
    assert "already holds a run: choose another run.dir, or train.resume=auto" in error


def test_a_finished_run_is_not_run_again(eight: Command) -> None:
    first = here(*eight, "run.dir=done")
    before = tensors(first.dir)
    again = here(*eight, "run.dir=done")
    assert again.result == first.result
    assert tensors(first.dir) == before


def test_a_finished_run_can_be_continued_for_longer(eight: Command) -> None:
    folder = here(*eight, "schedule=constant", "run.dir=longer").dir
    longer = (*eight, "schedule=constant", f"train.resume={folder}", "train.steps=12")
    outcome = here(*longer)
    assert outcome.result["step"] == 12
    assert "continuing with changed settings: train.steps was 8, now 12" in outcome.out
    assert [line["step"] for line in metrics(folder)] == list(range(13))
    assert here(*longer).result == outcome.result  # finished now


def test_fewer_steps_than_done_are_refused(eight: Command) -> None:
    folder = interrupted(eight, 6, "done_6")
    error = here(*eight, f"train.resume={folder}", "train.steps=4").error
    assert "step_00000006 is already beyond train.steps=4: raise train.steps" in error


@pytest.mark.parametrize("path", ["source", "source/checkpoints/step_00000004"])
def test_a_fork_goes_on_from_a_checkpoint_in_a_new_folder(
    eight: Command, reference: Path, path: str
) -> None:
    interrupted(eight, 4, "source")
    before = sorted(Path("source").rglob("*"))
    fork = here(*eight, f"train.resume={path}", "run.dir=fork").dir
    assert sorted(Path("source").rglob("*")) == before
    assert tensors(fork) == tensors(reference)
    assert metrics(fork) == [line for line in metrics(reference) if line["step"] > 4]


def test_a_fork_killed_before_its_first_checkpoint_starts_from_its_source_again(
    eight: Command, reference: Path
) -> None:
    interrupted(eight, 4, "source")
    fork = (*eight, "train.resume=source", "run.dir=fork")
    folder = here(*fork).dir
    shutil.rmtree(folder / "checkpoints")
    (folder / "summary.json").unlink()
    assert "continuing at step 4" in here(*fork).out
    assert tensors(folder) == tensors(reference)


def test_a_fork_may_change_settings_but_not_the_model_or_optimizer(eight: Command) -> None:
    interrupted(eight, 4, "source")
    fork = (*eight, "train.resume=source/checkpoints/step_00000004")
    assert here(*fork, "run.dir=a", "optim.lr=1e-4").result["step"] == 8
    error = here(*fork, "run.dir=b", "model.n_embd=64").error
    assert "step_00000004 holds another model than model=" in error
    assert "size mismatch for transformer.wte.weight" in error
    error = here(*fork, "run.dir=c", "optim=lion").error
    assert "the saved optimizer state is another optimizer's" in error
    assert not Path("b").exists() and not Path("c").exists()


def test_other_settings_in_the_same_folder_are_named(eight: Command) -> None:
    folder = interrupted((*eight, "optim.lr=1e-5"), 4, "mine")
    error = here(*eight, "run.dir=mine", "optim.lr=0.5").error
    assert "mine holds a run with other settings: optim.lr was 1e-05, now 0.5" in error
    before = metrics(folder)
    outcome = here(*eight, "train.resume=mine", "optim.lr=0.5")
    assert outcome.dir == folder
    # what the run wrote after the checkpoint is replaced, not kept beside the new lines
    after = metrics(folder)
    assert [line["step"] for line in after] == [line["step"] for line in before]
    assert after[:5] == before[:5] and all(
        a != b for a, b in zip(after[5:], before[5:], strict=True)
    )
    assert "continuing with changed settings: optim.lr was 1e-05, now 0.5" in outcome.out


def test_what_shapes_no_weight_may_change(eight: Command) -> None:
    """Another micro-batch, logging, keeping of checkpoints; infinity, which JSON does not have."""
    command = (*eight, "train.grad_clip=inf", "run.dir=mine")
    interrupted(command, 4, "mine")
    free = ("train.micro_batch=1", "logging.every=3", "train.keep_checkpoints=1")
    assert "continuing at step 4" in here(*command, *free).out


def test_a_run_killed_before_its_first_record_starts_again(eight: Command) -> None:
    """Between making the folder and writing trajectory.json, last of the header."""
    reference = here(*eight, "run.dir=mine").dir
    final = tensors(reference)
    for path in reference.iterdir():
        if path.name not in (".run.lock", "log.txt", "config.yaml"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert tensors(here(*eight, "run.dir=mine").dir) == final


def test_half_a_checkpoint_is_never_picked_up(eight: Command, reference: Path) -> None:
    folder = interrupted(eight, 4, "mine")
    newest = folder / "checkpoints/step_00000004"
    shutil.copytree(newest, newest.with_name("step_00000006.tmp"))
    outcome = here(*eight, "run.dir=mine")
    assert "continuing at step 4" in outcome.out
    assert_same_run(reference, folder)
    assert not list(folder.glob("checkpoints/*.tmp"))


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("file", ["tensors.safetensors", "checkpoint.json"])
def test_a_damaged_checkpoint_is_set_aside(eight: Command, reference: Path, file: str) -> None:
    folder = interrupted(eight, 6, "mine")
    cut(folder / "checkpoints/step_00000006" / file)
    outcome = here(*eight, "run.dir=mine")
    assert "step_00000006 is not whole: set aside, continuing without it" in outcome.out
    assert "continuing at step 4" in outcome.out
    assert_same_run(reference, folder)
    assert (folder / "checkpoints/step_00000006.damaged" / file).exists()


def test_a_damaged_checkpoint_named_by_the_user_is_refused(eight: Command) -> None:
    folder = interrupted(eight, 6, "mine")
    newest = folder / "checkpoints/step_00000006"
    cut(newest / "tensors.safetensors")
    error = here(*eight, f"train.resume={newest}").error
    assert "is neither a run with a checkpoint nor a checkpoint" in error
    assert newest.exists()


def test_a_checkpoint_of_other_data_is_refused(eight: Command, tmp_path: Path) -> None:
    interrupted(eight, 4, "mine")
    (tmp_path / "other.txt").write_text("To be or not to be, that is the question.\n" * 500)
    other = ("data.files=[other.txt]", "data.dir=other")
    error = here(*eight, *other, "train.resume=mine/checkpoints/step_00000004").error
    assert "was trained on other data than" in error


def test_a_stopped_sweep_does_not_start_its_next_trial(tiny: Command) -> None:
    trials = ("-m", *tiny, "seed=1,2", "train.steps=100000", "train.eval_every=0")
    sweep = shell(*trials, "hydra.sweep.dir=sweep", "train.checkpoint_every=0")
    until(lambda: any(lines(Path("sweep/0/metrics.jsonl"))), lambda: sweep.poll() is None)
    sweep.send_signal(signal.SIGTERM)
    outcome = wait(sweep)
    assert outcome.result["run_dir"] == "sweep/0"
    assert not Path("sweep/1").exists()
