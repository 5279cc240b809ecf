"""Reading ahead changes when tokens are read, never which."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from test_shards import write

from data.loader import Loader, read_windows
from data.order import Order, create_order
from data.shards import Split, open_split

CONTEXT = 8


@pytest.fixture
def split(tmp_path: Path) -> Split:
    return open_split(write(tmp_path, np.arange(1000) % 251, shard_tokens=170), "train")


@pytest.fixture
def order(split: Split) -> Order:
    return create_order("shuffled", tokens=len(split), context=CONTEXT, global_batch=6, seed=3)


@pytest.fixture
def loader(split: Split, order: Order) -> Iterator[Loader]:
    with Loader(split, order, prefetch=3) as loader:
        yield loader


def direct(split: Split, order: Order, step: int) -> torch.Tensor:
    rows = [split.read(offset, CONTEXT + 1) for offset in order.offsets(step).tolist()]
    return torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize(
    "steps",
    [
        range(60),  # in order, over several epochs
        [s + ahead for s in range(20) for ahead in (0, 1)],  # exact MARS: this batch and the next
        [s - back for s in range(1, 20) for back in (0, 1)],
        [7, 7, 7, 0, 1000, 3, 4, 2, 10**9, 0],
    ],
    ids=["in order", "one ahead", "one behind", "anywhere"],
)
def test_any_sequence_of_steps(
    loader: Loader, split: Split, order: Order, steps: list[int]
) -> None:
    for step in steps:
        batch = loader.batch(step)
        assert batch.shape == (6, CONTEXT + 1) and batch.dtype == torch.int64
        assert torch.equal(batch, direct(split, order, step))


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_processes_share_the_global_batch(split: Split, order: Order, world: int) -> None:
    rows = 6 // world
    parts = []
    for rank in range(world):
        with Loader(split, order, rows=slice(rank * rows, (rank + 1) * rows)) as loader:
            parts.append(loader.batch(11))
    assert torch.equal(torch.cat(parts), direct(split, order, 11))


def _wait(condition: object, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


class Recording:
    """A split that notes which thread read and how often, and fails where it is told to."""

    def __init__(self, split: Split) -> None:
        self.split, self.reads, self.announced, self.threads = split, 0, 0, set[str]()
        self.broken = False

    def announce(self, offsets: np.ndarray, n: int) -> None:
        self.announced += len(offsets)
        self.split.announce(offsets, n)

    def read_rows(self, offsets: np.ndarray, out: np.ndarray) -> None:
        self.reads += len(offsets)
        self.threads.add(threading.current_thread().name)
        if self.broken:
            raise OSError("the disk is gone")
        self.split.read_rows(offsets, out)


def test_reads_ahead_in_its_thread_and_no_further(split: Split, order: Order) -> None:
    recording = Recording(split)
    with Loader(recording, order, prefetch=3) as loader:  # type: ignore[arg-type]
        loader.batch(0)
        _wait(lambda: recording.reads == 4 * 6)  # the step and three more
        time.sleep(0.05)
        assert recording.reads == 4 * 6
        loader.batch(0)
        loader.batch(1)  # moves the window by one
        _wait(lambda: recording.reads == 5 * 6)
        loader.batch(0)  # one behind is still here
        time.sleep(0.05)
        assert recording.reads == 5 * 6
        assert recording.announced == 8 * 6  # each once, three steps before it is read
    assert recording.threads == {"data loader"}


def test_failure_reaches_the_step_that_needs_it(split: Split, order: Order) -> None:
    recording = Recording(split)
    with Loader(recording, order, prefetch=1) as loader:  # type: ignore[arg-type]
        loader.batch(0)
        _wait(lambda: recording.reads == 2 * 6)
        recording.broken = True
        loader.batch(1)  # read before the disk failed
        with pytest.raises(OSError, match="the disk is gone"):
            loader.batch(2)
        recording.broken = False
        deadline = time.monotonic() + 10
        while True:  # what failed is tried again when it is asked for again
            try:
                batch = loader.batch(2)
                break
            except OSError:
                assert time.monotonic() < deadline
        assert torch.equal(batch, direct(split, order, 2))


def test_close_stops_the_thread(split: Split, order: Order) -> None:
    loader = Loader(split, order)
    loader.batch(0)
    thread = loader._thread
    loader.close()
    loader.close()
    assert not thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        loader.batch(1)


def test_context_ends_the_thread_after_an_error(split: Split, order: Order) -> None:
    with pytest.raises(KeyError), Loader(split, order) as loader:
        loader.batch(0)
        raise KeyError
    assert not loader._thread.is_alive()


def test_prefetch_must_be_positive(split: Split, order: Order) -> None:
    with pytest.raises(ValueError, match=r"data\.prefetch=0"):
        Loader(split, order, prefetch=0)


SCRIPT = """
import sys
from data.loader import Loader
from data.order import create_order
from data.shards import open_split
split = open_split(sys.argv[1], "train")
order = create_order("shuffled", tokens=len(split), context=8, global_batch=2, seed=0)
loader = Loader(split, order)
loader.batch(0)
print("batch", flush=True)
if sys.argv[2] == "raise":
    raise RuntimeError("on purpose")
"""


@pytest.mark.parametrize(("ending", "code"), [("return", 0), ("raise", 1)])
def test_an_open_loader_does_not_keep_the_process(tmp_path: Path, ending: str, code: int) -> None:
    write(tmp_path, np.arange(1000) % 251)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), ending],
        cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (code, "batch\n")
    assert ("on purpose" in run.stderr) == (ending == "raise")
    assert "Fatal" not in run.stderr


MEMORY = """
import json, sys
from pathlib import Path
import numpy as np
from data.loader import Loader
from data.order import create_order
from data.shards import open_split
split = open_split(sys.argv[1], "train")
order = create_order(sys.argv[2], tokens=len(split), context=256, global_batch=32, seed=0)
def megabytes(kind):
    text = Path("/proc/self/status").read_text()
    return int(text.split(kind)[1].split()[0]) / 1024
found = []
with Loader(split, order) as loader:
    epoch = order.n_blocks // 32 + 1
    for step in range(6 * epoch):
        loader.batch(step)
        if step % epoch == epoch - 1:
            found.append((megabytes("RssAnon:"), megabytes("VmRSS:")))
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["shuffled", "random_crops"])
def test_memory_is_flat_over_epochs(tmp_path: Path, sampling: str) -> None:
    """After the first two epochs, by which every page of the file has been seen."""
    write(tmp_path, np.arange(4_000_000) % 257, shard_tokens=1_000_000)
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), sampling],
        cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    anonymous, resident = np.array(json.loads(run.stdout))[1:].T
    assert np.ptp(anonymous) < 1.0  # MB; a batch alone is 0.07 MB, an epoch 32 MB
    assert np.ptp(resident) < 1.0


@pytest.mark.gpu
def test_pinned_batches(split: Split, order: Order) -> None:
    with Loader(split, order, pin_memory=True) as loader:
        batch = loader.batch(0)
        assert batch.is_pinned()
        assert torch.equal(batch, direct(split, order, 0))


def test_windows_across_shards(split: Split) -> None:
    windows = read_windows(split, np.array([165, 0, 991]), CONTEXT)
    expected = (torch.tensor([165, 0, 991])[:, None] + torch.arange(CONTEXT + 1)) % 251
    assert torch.equal(windows, expected)
