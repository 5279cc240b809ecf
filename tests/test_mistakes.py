"""Whatever a user gets wrong ends with exit code 1 and one line: what was given, what was expected,
what to do. And nothing that existed is lost.
"""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from system import Command, assert_same_run, checkpoints, here, shell, tensors, wait

SETTINGS = {
    # names
    "train.stpes=3": "unknown configuration key train.stpes: did you mean train.steps?",
    "trian.steps=3": "unknown configuration key trian: did you mean train?",
    "optim.bta=0.9": "unknown configuration key optim.bta: did you mean optim.betas?",
    "+optim.bta=0.9": "'bta' is no hyper-parameter of adamw: did you mean betas?",
    "+train.foo=1": "unknown configuration key train.foo: valid names are accumulation, attention",
    "model.nlayer=3": "unknown configuration key model.nlayer: did you mean model.n_layer?",
    "optim.mars.gama=1": "unknown configuration key optim.mars.gama: did you mean optim.mars.gamm",
    "lr=3e-3": "unknown configuration key lr: did you mean optim.lr?",
    "steps=3": "unknown configuration key steps: did you mean train.steps?",
    # choices
    "optim=adamww": "there is no optim=adamww: did you mean optim=adamw?",
    "model=gpt2_smal": "there is no model=gpt2_smal: did you mean model=gpt2_small?",
    "data=wikipedia": "there is no data=wikipedia: expected one of ",
    "optim.rule=adam": "'adam' is no rule: did you mean adamw?",
    "optim.correction=mras": "'mras' is no correction: did you mean mars?",
    "optim.mask=cautius": "'cautius' is no mask: did you mean cautious?",
    "model.name=gpt3": "model.name is 'gpt3': expected one of gpt2",
    "train.precision=fp61": "train.precision is 'fp61': did you mean fp16?",
    "train.precision=double": "train.precision is 'double': expected one of auto, fp32, bf16, fp16",
    "train.accumulation=avg": "train.accumulation is 'avg': expected one of mean, sum",
    "data.tokenizer=byts": "data.tokenizer is 'byts': did you mean bytes?",
    "data.sampling=shufled": "data.sampling is 'shufled': did you mean shuffled?",
    "logging.wandb=onlin": "logging.wandb is 'onlin': did you mean online?",
    "schedule.decay_shape=cosin": "schedule.decay_shape is 'cosin', expected one of cosine, linear",
    "train.device=banana": "train.device is 'banana': expected auto, cpu, cuda or mps",
    # types
    "train.steps=abc": "train.steps: value 'abc' of type 'str' could not be converted to Integer",
    "train.steps=3.5": "train.steps: value '3.5' of type 'float' could not be converted to Integer",
    "seed=x": "seed: value 'x' of type 'str' could not be converted to Integer",
    "model.n_head=two": "model.n_head: value 'two' of type 'str' could not be converted to Integer",
    "optim.lr=fast": "lr must be a number that is not negative, given 'fast'",
    "optim.betas=[0.9]": "betas is (0.9,), expected the like of (0.9, 0.999)",
    "optim.betas=0.9": "betas is 0.9, expected the like of (0.9, 0.999)",
    "data.files=book.txt": "data.files takes a list: write 'data.files=[...]'",
    # ranges
    "train.steps=0": "train.steps must be positive, given 0",
    "seed=-1": "seed must be in [0, 2^63), given -1",
    "seed=99999999999999999999": "seed must be in [0, 2^63), given 99999999999999999999",
    "optim.lr=-1": "lr must be a number that is not negative, given -1",
    "optim.lr=nan": "lr must be a number that is not negative, given nan",
    "optim.betas=[0.9,1.5]": "betas[1] must be in [0, 1), given 1.5",
    "optim.eps=0.0": "eps must be positive, given 0.0",
    "model.dropout=2": "model.dropout is 2.0: expected 0 <= dropout < 1",
    "model.vocab_size=0": "model.vocab_size is 0: expected a positive integer",
    "train.keep_checkpoints=0": "train.keep_checkpoints must be positive, given 0",
    "train.eval_every=-1": "train.eval_every must not be negative, given -1",
    "schedule.decay_steps=0": "schedule.decay_steps must be positive, given 0",
    "data.val_fraction=1.5": "data.val_fraction must be in (0, 1), given 1.5",
    # what does not go together
    "train.micro_batch=3": "train.global_batch=4 is not a multiple of train.micro_batch=3: use a "
    "divisor, such as train.micro_batch=2",
    "schedule.warmup_steps=100": "schedule.warmup_steps is 100, but the schedule has 8 steps: ",
    "model.n_head=3": "model.n_embd 32 is not divisible by model.n_head 3",
    "train.eval_tokens=10": "train.eval_tokens=10 holds no sequence of model.context=32",
    "train.precision=fp16": "train.precision=fp16 needs a GPU: use bf16 or fp32 on a CPU",
    "optim.groups.decay.match=[matrix]": "no optimizer group takes transformer.wte.weight (role "
    "embedding): add the role or a pattern to the match of one of: decay, no_decay",
    "+optim.groups.x.match=[nosuch]": "optimizer group pattern 'nosuch' matches no parameter",
    "+optim.groups.x.lr_scale=2": "optim.groups.x has no match",
    "model.vocab_size=100": "holds ids of the bytes tokenizer, below 257, but the model's "
    "vocabulary is 100: set model.vocab_size to 257 or more, or choose another data.tokenizer",
    # data
    "data.files=[nosuch.txt]": "data.files: nosuch.txt not found (in /",
    "data.files=[]": "data.files is empty: name some, e.g. data.files=[book.txt",
    "data.val_fraction=0.2": "holds a data set of other settings (val_fraction was 0.05, is 0.2): "
    "choose another data.dir, or delete that folder",
    "data.dir=/dev/null/x": "cannot write /dev/null/x",
    # the run's folder
    "run.dir=/dev/null/x": "cannot write the run directory /dev/null/x (Not a directory): choose",
    "paths.runs=/dev/null/x": "cannot write the run directory /dev/null/x (Not a directory)",
    "run.dir=.": "is not empty and holds no run: choose another folder",
    "train.resume=atuo": "train.resume is 'atuo': expected auto, never or an existing path",
    "train.resume=/dev": "train.resume=/dev is neither a run with a checkpoint nor a checkpoint",
    # what a shell or a habit makes of an override
    "train.steps": "cannot read 'train.steps': expected key=value; a value with spaces or",
    "data.files=[my": "cannot read 'data.files=[my': expected key=value; a value with",
    "run.dir=~/mine": "cannot read 'run.dir=~/mine': expected key=value; a value with spaces or",
    "--train.steps=3": "unknown option --train.steps=3: settings have no dashes, write train",
    "optim.lr=1e-3,1e-2": "To sweep over it, add --multirun to your command line",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_wrong_setting(tiny: Command, setting: str) -> None:
    Path("mine.txt").write_text("must stay")
    assert SETTINGS[setting] in here(*tiny, setting).error
    assert [path.name for path in Path().iterdir() if path.name != "runs"] == ["mine.txt"]
    assert not list(Path().glob("runs/*")), "a mistake left an empty run behind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(tiny: Command) -> None:
    error = here(*tiny, "train.device=cuda").error
    assert error == "train.device is 'cuda', which this machine does not have: use auto"


@pytest.mark.parametrize(
    ("settings", "expected"),
    {
        ("optim.correction=mars", "optim.mars.gamma=high"): "mars.gamma",
        ("optim.correction=mars", "optim.mars.exact=maybe"): "mars.exact",
        ("optim.mars=null",): "mars",
        ("+optim.groups.x.match=[wte]",): "earlier group",
        ("optim.groups.decay.match=['wte(']",): "regular expression",
    }.items(),
)
def test_wrong_settings_of_an_optimizer(tiny: Command, settings: Command, expected: str) -> None:
    assert expected in here(*tiny, *settings).error


def test_a_real_shell_sees_one_line(tiny: Command) -> None:
    outcome = wait(shell(*tiny, "optim.lr=fast"))
    assert outcome.out == ""
    assert outcome.error.endswith("given 'fast'")


def test_hydra_full_error_shows_the_traceback(
    tiny: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    outcome = wait(shell(*tiny, "train.steps=0"))
    assert outcome.code == 1
    assert "Traceback" in outcome.err and 'runtime/config.py", line' in outcome.err


def test_a_failed_trial_of_a_sweep_does_not_stop_the_others(tiny: Command) -> None:
    outcome = here("-m", *tiny, "optim.lr=-1,1e-3", "hydra.sweep.dir=sweep")
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1].endswith("given -1")
    assert "optim.lr=-1" in outcome.err.splitlines()[0]  # which trial it was
    assert '"run_dir": "sweep/1", "step": 8' in outcome.out


def test_settings_on_both_sides_of_an_option(tiny: Command) -> None:
    error = here(*tiny, "-m", "seed=1,2").error
    assert "seed=1,2 stands behind an option such as -m" in error


# ---- data ----------------------------------------------------------------------------------------


def own(text: str, *more: str) -> Command:
    Path("own.txt").write_text(text)
    return ("data.files=[own.txt]", "data.dir=own", *more)


@pytest.mark.parametrize(
    ("text", "more", "expected"),
    [
        ("", (), "own.txt is empty"),
        ("x\n", (), "the split has 2 tokens, one window of context=32 needs 33"),
        ("words\n" * 10, (), "one window of context=32 needs 33"),
        ("words\n" * 50, (), "the validation split has"),
        (
            "words\n" * 500,
            ("data.repeat=false", "train.steps=100"),
            "train.steps=100 needs 400 blocks of 32 tokens, the split has 89: lower train.steps",
        ),
    ],
)
def test_too_little_text(tiny: Command, text: str, more: Command, expected: str) -> None:
    assert expected in here(*tiny, *own(text, *more)).error
    assert not list(Path().glob("runs/*"))


def test_damaged_data(tiny: Command) -> None:
    data = own("words\n" * 500)
    here(*tiny, *data)
    shard = Path("own/train_00000.bin")
    shard.write_bytes(shard.read_bytes()[:-7])
    assert re.search(
        r"train_00000.bin is truncated or damaged: \d+ bytes, expected \d+",
        here(*tiny, *data).error,
    )


def test_data_damaged_in_place(tiny: Command) -> None:
    """The sizes are right; an id beyond the vocabulary shows when it is read."""
    data = own("words\n" * 500)
    here(*tiny, *data)
    shard = Path("own/train_00000.bin")
    content = bytearray(shard.read_bytes())
    content[1024:] = b"\xff" * (len(content) - 1024)
    shard.write_bytes(content)
    error = here(*tiny, *data).error
    assert "train_00000.bin: id 65535 at position 0 is outside the bytes vocabulary of 257" in error


# ---- divergence ----------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluate", ["train.eval_every=1", "train.eval_every=0"])
def test_a_diverged_run_stops_and_keeps_its_last_good_checkpoint(
    tiny: Command, evaluate: str
) -> None:
    command = (*tiny, evaluate, "train.checkpoint_every=1", "run.dir=mine", "train.sample_tokens=4")
    diverging = ("optim.lr=1e30", "train.grad_clip=null", "schedule.warmup_steps=4")
    error = here(*command, *diverging).error
    assert re.match(r"the (validation )?loss is nan at step [12]: lower optim.lr", error)
    step = int(error.partition("step ")[2][0])
    kept = checkpoints(Path("mine"))
    assert kept and int(kept[-1].name[5:]) < step
    for path in kept:
        saved = load_file(path / "tensors.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    # and from there on the run can be had with better settings
    again = here(*command, "train.resume=" + str(kept[0]), "optim.lr=1e-3", "run.dir=again")
    assert again.result["step"] == 8


# ---- the disk ------------------------------------------------------------------------------------


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may become larger: a write beyond it fails as on a full disk, with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_does_not_fit(tiny: Command) -> None:
    reference = here(*tiny, "run.dir=reference").dir
    mine = here(*tiny, "run.dir=mine").dir
    shutil.rmtree(checkpoints(mine)[-1])
    (mine / "summary.json").unlink()
    good = tensors(mine)
    with file_size_limit(50_000):
        error = here(*tiny, "run.dir=mine").error
    assert re.match(
        r"cannot write the checkpoint mine/checkpoints/step_00000008 \(.*File too large.*\): make "
        r"room, then the same command continues from the one before",
        error,
    )
    assert [path.name for path in checkpoints(mine)] == ["step_00000004"]
    assert tensors(mine) == good
    assert "continuing at step 4" in here(*tiny, "run.dir=mine").out
    assert_same_run(reference, mine)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that holds a few checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk(tiny: Command, small_disk: Path) -> None:
    command = (*tiny, "train.steps=20", "train.checkpoint_every=1", "train.keep_checkpoints=99")
    reference = here(*command, "run.dir=reference").dir
    mine = small_disk / "mine"
    error = here(*command, f"run.dir={mine}").error
    assert "cannot write the checkpoint" in error and "No space left on device" in error
    kept = checkpoints(mine)
    assert 1 < len(kept) < 20
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    assert f"continuing at step {int(kept[-1].name[5:])}" in here(*command, f"run.dir={mine}").out
    assert_same_run(reference, mine)


def fill(disk: Path) -> Path:
    """Take the last byte."""
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


def test_a_disk_without_a_byte(tiny: Command, small_disk: Path) -> None:
    """Not even the small files fit: at the start of a run, and when one goes on."""
    filler = fill(small_disk)
    mine = small_disk / "mine"
    command = (*tiny, f"run.dir={mine}")
    assert "No space left on device" in here(*command).error
    filler.unlink()
    good = here(*command, "train.steps=4", "schedule.decay_steps=8").dir
    before = tensors(good)
    filler = fill(small_disk)
    longer = (*tiny, "schedule.decay_steps=8", f"train.resume={mine}")
    error = here(*longer).error
    assert "No space left on device; make room, then the same command continues" in error
    filler.unlink()
    assert tensors(good) == before
    assert here(*longer).result["step"] == 8


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_that_cannot_be_written(tiny: Command) -> None:
    mine = here(*tiny, "run.dir=mine", "train.steps=4").dir
    (mine / "log.txt").unlink()
    (mine / "log.txt").symlink_to("/dev/full")
    assert "No space left on device" in here(*tiny, "train.resume=mine").error
