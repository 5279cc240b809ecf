"""A checkpoint of many processes is complete or absent, and serves any number of processes."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import forks
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from workers import run

from optim.sharding import Table
from runtime import checkpoint
from runtime.checkpoint import META, is_whole
from runtime.errors import NonFiniteError
from runtime.processes import Processes
from runtime.sharded_checkpoint import SharedCheckpoints, export, load_into

SHAPES = {"a": (257, 66), "b": (66, 264), "small": (3,), "row": (1, 5), "empty_beyond": (2, 3)}
LAYOUTS = ["whole", "rows"]


def truth() -> dict[str, Tensor]:
    """What a run of any layout holds together."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"model.{n}": torch.randn(s, generator=generator) for n, s in SHAPES.items()}
    tensors |= {
        f"optim.{n}.exp_avg": torch.randn(s, generator=generator) for n, s in SHAPES.items()
    }
    tensors |= {f"optim.{n}.factor": torch.randn(4, 4, generator=generator).double() for n in "ab"}
    tensors["optim.a.bf16"] = torch.randn(9, 2, generator=generator).bfloat16()
    return {**tensors, "optim.a.step": torch.tensor(7.0, dtype=torch.float64)}


def processes() -> Processes:
    import torch.distributed as dist

    if not dist.is_initialized():
        return Processes()
    return Processes(dist.get_rank(), dist.get_world_size(), 0, 60, dist.group.WORLD)


def part(layout: str, full: dict[str, Tensor]) -> dict[str, Tensor]:
    """What this process holds: parameters whole ("whole", DDP) or in rows ("rows", FSDP2), states
    of entries in rows either way, factors with an owner."""
    all_ = processes()
    held: dict[str, Tensor] = {}
    for i, (name, tensor) in enumerate(full.items()):
        if name.endswith("factor"):
            if i % all_.size == all_.rank:
                held[name] = tensor.clone()
        elif tensor.ndim == 0 or all_.size == 1 or (layout == "whole" and name[:5] == "model"):
            held[name] = tensor.clone()
        else:
            held[name] = rows_of(tensor, all_)
    return held


_mesh: dict[int, object] = {}


def rows_of(tensor: Tensor, all_: Processes) -> DTensor:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = _mesh.setdefault(all_.size, init_device_mesh("cpu", (all_.size,)))
    start, stop = Table(1, all_.size, 0, all_.rank).held(len(tensor))
    return DTensor.from_local(
        tensor[start:stop].clone(),
        mesh,  # type: ignore[arg-type]
        [Shard(0)],
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


_shared: dict[Path, SharedCheckpoints] = {}


def checkpoints(folder: Path) -> SharedCheckpoints:
    if folder not in _shared:
        _shared[folder] = SharedCheckpoints(folder, 2, processes())
    return _shared[folder]


def save(folder: Path, layout: str, step: int = 5) -> None:
    own, held = checkpoints(folder), part(layout, truth())
    own.save(step, held, {"scaler": {}, "x": 0.1}, 1.5)
    for tensor in held.values():
        local(tensor).zero_()  # training goes on at once: the copy is what is written
    own.wait()
    own.processes.barrier()


def load(path: Path, layout: str) -> None:
    right, held = part(layout, truth()), part(layout, {n: t * 0 for n, t in truth().items()})
    load_into(path, held, processes())
    for name, tensor in held.items():
        assert torch.equal(local(tensor), local(right[name])), name


@pytest.mark.parametrize(
    ("saved_on", "saved_as", "loaded_on", "loaded_as"),
    [
        (1, "whole", 1, "whole"),
        (1, "whole", 4, "rows"),
        (4, "whole", 2, "rows"),
        (4, "whole", 2, "whole"),
        (2, "whole", 4, "whole"),
        (4, "rows", 2, "rows"),
        (2, "rows", 4, "whole"),
        (4, "rows", 1, "whole"),
        (2, "whole", 1, "whole"),
    ],
)
def test_any_layout_loads_what_any_other_saved(
    tmp_path: Path, saved_on: int, saved_as: str, loaded_on: int, loaded_as: str
) -> None:
    run(saved_on, save, tmp_path, saved_as)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005"]
    path = tmp_path / "step_00000005"
    assert is_whole(path)
    meta = json.loads((path / META).read_text())
    assert (meta["step"], meta["val_loss"], meta["x"]) == (5, 1.5, 0.1)
    run(loaded_on, load, path, loaded_as)
    whole, _ = checkpoint.load(path)
    assert whole.keys() == truth().keys()
    assert all(torch.equal(whole[n], t) and whole[n].dtype == t.dtype for n, t in truth().items())
    export(path, tmp_path / "model.safetensors", "model.")
    assert load_file(tmp_path / "model.safetensors").keys() == {f"model.{n}" for n in SHAPES}


def test_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    own = SharedCheckpoints(tmp_path, 2, Processes())
    for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 4.0)]:
        own.save(step, {"model.w": torch.ones(2)}, {}, loss)
    own.wait()
    assert own.steps() == [2, 4, 5]


def load_changed(path: Path, change: str) -> str:
    held = part("rows", truth())
    if change == "missing":
        held["optim.a.more"] = torch.zeros(2)
    if change == "left over":
        held = {name: t for name, t in held.items() if name != "optim.b.factor"}
    if change == "shape":
        held["optim.a.bf16"] = torch.zeros(3, 2).bfloat16()
    if change == "dtype":
        held["optim.a.step"] = torch.zeros(())
    before = {name: local(t).clone() for name, t in held.items()}
    with pytest.raises(ValueError, match="step_00000005") as error:
        load_into(path, held, processes())
    assert all(torch.equal(local(t), before[name]) for name, t in held.items())  # nothing touched
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"another optimizer's: 1 missing \['optim.a.more'\], 0 left over"),
        ("left over", r"another optimizer's: 0 missing \[\], 1 left over \['optim.b.factor'\]"),
        ("shape", r"a.bf16: saved torch.bfloat16 \(9, 2\), expected torch.bfloat16 \(3, 2\)"),
        ("dtype", r"a.step: saved torch.float64 \(\), expected torch.float32 \(\)"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, change: str, message: str) -> None:
    run(2, save, tmp_path, "rows")
    for said in run(2, load_changed, tmp_path / "step_00000005", change):
        assert re.search(message, said)


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    own = SharedCheckpoints(tmp_path, 1, Processes())
    with pytest.raises(NonFiniteError, match=r"model\.w is not finite after step 2"):
        own.save(2, {"model.v": torch.ones(1), "model.w": torch.tensor([1.0, torch.nan])}, {}, None)
    assert own.steps() == []


def test_a_full_disk_is_an_error_of_the_next_call(tmp_path: Path) -> None:
    own = SharedCheckpoints(tmp_path, 1, Processes())
    own.save(1, {"model.w": torch.ones(1)}, {}, None)
    own.wait()
    own.save(2, {"model.w": torch.ones(1)}, {(1, 2): 3}, None)  # type: ignore[dict-item]
    with pytest.raises(OSError, match="make room"):
        own.wait()
    assert own.steps() == [1]


def save_where_one_cannot(folder: Path) -> str:
    own, all_ = checkpoints(folder), processes()
    own.save(1, {}, {}, None)
    own.wait()
    own.save(2, {f"optim.{all_.rank}": Unwritable() if all_.rank else torch.ones(2)}, {}, None)
    with pytest.raises(OSError, match="make room") as error:
        own.wait()
    return str(error.value)


class Unwritable(torch.Tensor):
    """What fails on its way to the disk, on this process alone."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_the_rank_that_cannot_write_is_named_in_a_line(tmp_path: Path) -> None:
    for said in run(2, save_where_one_cannot, tmp_path):
        assert "(rank 1: OSError: [Errno 28] No space left on device)" in said
        assert len(said) < 300
        assert "\n" not in said


def save_without_the_other(folder: Path) -> str:
    """Rank 1 hangs where it should write."""
    all_ = replace(processes(), timeout=1.0)
    own, held = SharedCheckpoints(folder, 2, all_), {"model.w": torch.ones(3)}
    if all_.rank:
        own._start = lambda *_: lambda: time.sleep(5)  # type: ignore[method-assign]
    own.save(1, held, {}, None)
    with pytest.raises((RuntimeError, OSError)) as error:
        own.wait()
    return f"{type(error.value).__name__}: {error.value}"


def test_a_hang_while_writing_ends_in_time(tmp_path: Path) -> None:
    start = time.monotonic()
    waiting, hanging = run(2, save_without_the_other, tmp_path)
    assert time.monotonic() - start < 30
    assert re.search("RuntimeError.*imed out", waiting)
    assert "still being written after 2 s of waiting" in hanging
    assert not list(tmp_path.glob("step_*[0-9]"))


def write_forever(rank: int, size: int, store: str, folder: Path) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    own, step = SharedCheckpoints(folder, 3, processes()), 0
    while True:
        step += 1
        tensors = {f"optim.{rank}.{i}": torch.full((200_000,), float(step)) for i in range(20)}
        own.save(step, tensors, {}, None)


@pytest.mark.slow
def test_a_kill_while_writing_leaves_whole_checkpoints(tmp_path: Path) -> None:
    delays = random.Random(0)
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        args = [(rank, 2, str(tmp_path / f"store{attempt}"), folder) for rank in range(2)]
        writers = [forks.start(write_forever, *a, daemon=True) for a in args]
        end = time.monotonic() + 60
        while len(list(folder.glob("step_*[0-9]"))) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(delays.uniform(0, 0.5))
        for writer in writers:
            writer.kill()
        for writer in writers:
            writer.join()
        found = SharedCheckpoints(folder, 3, Processes())
        assert found.steps()
        for step in found.steps():
            tensors, _ = checkpoint.load(found.path(step))
            assert len(tensors) == 40
            assert all((t == step).all() for t in tensors.values())
        found.clean()
        assert not list(folder.glob("*.tmp"))
