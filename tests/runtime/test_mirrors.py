"""A mirror shows what metrics.jsonl says and can neither stop nor delay training."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import runtime.mirrors as mirrors_module
from runtime.metrics import MetricsLog, read_metrics
from runtime.mirrors import BackgroundMirror, WandbMirror, open_mirrors

ROOT = Path(__file__).resolve().parents[2]


def record(step: int) -> dict[str, Any]:
    return {"step": step, "tokens": 10 * step, "time_s": 0.5 * step, "train/loss": 1 / (step + 1)}


def train(log: MetricsLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.log(step, 10 * step, 0.5 * step, {"train/loss": 1 / (step + 1)})


# ---------------------------------------------------------------- the thread around a mirror


class Moody:
    """A mirror with a temper: raises at one step, or takes its time."""

    def __init__(self, fail_at: int = -1, sleep: float = 0.0) -> None:
        self.fail_at, self.sleep, self.steps = fail_at, sleep, list[int]()

    def write(self, record: Mapping[str, Any]) -> None:
        if record["step"] == self.fail_at:
            raise ConnectionError("server\nsaid no")
        time.sleep(self.sleep)
        self.steps.append(record["step"])

    def close(self) -> None:
        self.steps.append(-1)


def test_everything_arrives_in_order_before_close_returns() -> None:
    inner, said = Moody(), list[str]()
    mirror = BackgroundMirror("x", lambda: inner, said.append)
    for step in range(100):
        mirror.write(record(step))
    mirror.close()
    assert inner.steps == [*range(100), -1] and said == []


def test_a_failing_write_is_reported_once_and_ends_the_mirror() -> None:
    inner, said = Moody(fail_at=3), list[str]()
    mirror = BackgroundMirror("x", lambda: inner, said.append)
    for step in range(10):
        mirror.write(record(step))
    mirror.close()
    assert inner.steps == [0, 1, 2]
    assert len(said) == 1 and "ConnectionError: server said no" in said[0]


def test_a_mirror_that_cannot_open_is_reported_once() -> None:
    def refuse() -> Moody:
        raise OSError("no such place")

    said = list[str]()
    mirror = BackgroundMirror("x", refuse, said.append)
    mirror.write(record(0))
    mirror.close()
    assert len(said) == 1 and "no such place" in said[0]


def test_a_hanging_mirror_delays_neither_write_nor_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors_module, "CLOSE_TIMEOUT", 0.2)
    said = list[str]()
    mirror = BackgroundMirror("x", lambda: Moody(sleep=5.0), said.append)
    start = time.monotonic()
    for step in range(1000):
        mirror.write(record(step))
    assert time.monotonic() - start < 0.1
    mirror.close()
    assert time.monotonic() - start < 1.0
    assert len(said) == 1 and "left behind" in said[0]


# ---------------------------------------------------------------- choosing mirrors


def test_disabled_is_no_mirror_and_no_import(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from runtime.mirrors import open_mirrors;"
        f"assert open_mirrors(Path({str(tmp_path)!r}), 'disabled', 'p', False, {{}}, None, print)"
        " == []; assert not {'wandb', 'tensorboard', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert list(tmp_path.iterdir()) == []


def test_unknown_mode_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"logging\.wandb=ofline.*did you mean offline"):
        open_mirrors(tmp_path, "ofline", "p", False, {}, None, print)


def test_a_missing_package_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"logging\.tensorboard needs .* pip install tensorboard"):
        open_mirrors(tmp_path, "disabled", "p", True, {}, None, print)


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_across_a_resume(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resume_step, first, last in ((None, 0, 7), (4, 5, 9)):
        said = list[str]()
        mirrors = open_mirrors(tmp_path, "disabled", "p", True, {}, resume_step, said.append)
        log = MetricsLog(tmp_path, mirrors, resume_step)
        train(log, first, last)
        log.close()
        assert said == []
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = events.Scalars("train/loss")
    assert [scalar.step for scalar in scalars] == list(range(10))
    assert scalars[9].value == pytest.approx(1 / 10)


# ---------------------------------------------------------------- wandb, without a network


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a key nor a server can be found, whatever this machine is logged in to."""
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))


def history(directory: Path) -> list[dict[str, Any]]:
    """The logged records of a wandb offline directory (LevelDB log format around protobuf)."""
    from wandb.proto import wandb_internal_pb2 as pb

    (file,) = directory.glob("*.wandb")
    data, position, payload, found = file.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:  # a header is never split over two blocks
            position += room
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        payload += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a full record, or the last part of one
            entry = pb.Record.FromString(payload)
            payload = b""
            if entry.WhichOneof("record_type") == "history":
                items = entry.history.item
                found.append(
                    {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items}
                )
    return found


def settled_history(directory: Path, count: int) -> list[dict[str, Any]]:
    """`history` once it has `count` records: wandb's own process writes them a moment after
    `finish` has returned (0.1 s was seen); the end of our process waits for it, a test does not.
    """
    for _ in range(100):
        if len(history(directory)) >= count:
            break
        time.sleep(0.05)
    return history(directory)


def test_wandb_offline_records_the_whole_run_after_a_resume(
    tmp_path: Path, no_network: None
) -> None:
    run_dir, said, ids = tmp_path / "run", list[str](), set[str]()
    for resume_step, first, last in ((None, 0, 7), (4, 5, 9)):
        mirrors = open_mirrors(run_dir, "offline", "p", False, {"lr": 1}, resume_step, said.append)
        log = MetricsLog(run_dir, mirrors, resume_step)
        train(log, first, last)
        log.log(last + 1, 0, 0.0, {"train/loss": float("nan"), "lr": 0.5})
        log.close()
        ids.add(json.loads((run_dir / "wandb.json").read_text())["id"])
        newest = max((run_dir / "wandb").glob("offline-run-*"), key=lambda d: d.stat().st_mtime_ns)
        expected = read_metrics(run_dir / "metrics.jsonl")
        rows = settled_history(newest, len(expected))
        shown = [{k: v for k, v in row.items() if k[0] != "_"} for row in rows]
        assert shown == [{k: v for k, v in row.items() if v is not None} for row in expected]
        assert [row["step"] for row in shown] == list(range(last + 2))
        time.sleep(1.1)  # wandb names the directory by the second
    assert len(ids) == 1
    assert len(said) == 2 and all("wandb sync" in line for line in said)


def test_wandb_without_a_key_records_offline(
    tmp_path: Path, no_network: None, capfd: pytest.CaptureFixture[str]
) -> None:
    said = list[str]()
    start = time.monotonic()
    (mirror,) = open_mirrors(tmp_path / "run", "online", "p", False, {}, None, said.append)
    mirror.write(record(1))
    mirror.close()
    assert time.monotonic() - start < 8
    assert len(said) == 1 and "API key" in said[0] and "recording offline" in said[0]
    (directory,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert [row["step"] for row in settled_history(directory, 1)] == [1]
    assert capfd.readouterr() == ("", "")  # not a word from wandb itself


def test_online_bookkeeping_skips_what_was_sent_and_catches_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no server to test against: wandb's own run is replaced by a list, after `_open`."""
    sent = list[int]()

    class FakeRun:
        def define_metric(self, *args: Any, **kwargs: Any) -> None: ...

        def log(self, values: Mapping[str, Any]) -> None:
            sent.append(values["step"])

        def finish(self) -> None: ...

    online = [True, False, True]
    monkeypatch.setattr(WandbMirror, "_open", lambda *_: (FakeRun(), online.pop(0)))
    steps = []
    for resume_step, first, last in ((None, 0, 7), (4, 5, 9), (8, 9, 12)):
        mirrors = open_mirrors(tmp_path, "online", "p", False, {}, resume_step, print)
        log = MetricsLog(tmp_path, mirrors, resume_step)
        train(log, first, last)
        log.close()
        steps.append(sent.copy())
        sent.clear()
    assert steps[0] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert steps[1] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]  # offline: the whole run
    assert steps[2] == [8, 9, 10, 11, 12]  # online again: 8 was never sent, 0 to 7 were
    assert json.loads((tmp_path / "wandb.json").read_text())["step"] == 12


UNREACHABLE = """
import sys, time
from pathlib import Path
from runtime.metrics import MetricsLog
from runtime.mirrors import open_mirrors
run_dir, steps = Path(sys.argv[1]), int(sys.argv[2])
mirrors = open_mirrors(run_dir, "online", "p", False, {}, None, print)
log = MetricsLog(run_dir, mirrors, None)
start = time.monotonic()
for step in range(steps):
    log.log(step, step, 0.0, {"train/loss": 1.0})
print("trained in", time.monotonic() - start)
log.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("silent_server", [False, True], ids=["refused", "never answers"])
def test_unreachable_server_costs_less_than_30_s_in_all(
    tmp_path: Path, no_network: None, monkeypatch: pytest.MonkeyPatch, silent_server: bool
) -> None:
    monkeypatch.delenv("WANDB_ERROR_REPORTING")  # as a user's environment is
    monkeypatch.delenv("WANDB_SILENT")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        if silent_server:  # connects, since the kernel accepts, but nobody answers
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.monotonic()
        result = subprocess.run(
            [sys.executable, "-c", UNREACHABLE, str(tmp_path / "run"), "500"],
            cwd=ROOT, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        seconds = time.monotonic() - start
    assert result.returncode == 0, result.stderr
    assert seconds < 30
    assert result.stderr == ""
    trained, wandb = result.stdout.splitlines()
    assert float(trained.split()[-1]) < 2  # the loop itself never waited
    assert "recording offline" in wandb
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 500
    (directory,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert len(history(directory)) == 500
