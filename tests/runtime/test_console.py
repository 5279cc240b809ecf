"""Lines in a file, a bar on a terminal, and training goes on when nobody listens."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from runtime.console import Console

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import sys, time
from pathlib import Path
from runtime.console import Console
console = Console(Path(sys.argv[1]), total_steps=40)
console.say("model: 124M")
for step in range(21, 41):
    console.progress(step, loss=2.5, lr=6e-4, tokens_per_s=12000.0)
    time.sleep(0.02)
    if step == 30:
        console.say("step 30: val 2.4")
console.close()
print("the end", flush=True)
Path(sys.argv[1]).with_suffix(".done").touch()
"""


def test_plain_lines_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(tmp_path / "log.txt", total_steps=800)
    console.say("hello")
    console.progress(119, loss=2.4)
    time.sleep(0.05)
    console.progress(120, loss=2.34564, lr=6e-4, tokens_per_s=12000.0, queue=3.0)
    console.close()
    console.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["hello", "step 119/800  loss 2.4000"]
    pattern = r"step 120/800  loss 2\.3456  lr 6\.0e-04  1\.2e\+04 tok/s  queue 3  left \d+:\d\d"
    assert re.fullmatch(pattern, lines[2])
    assert (tmp_path / "log.txt").read_text() == "hello\n"


def test_time_left_counts_the_steps_of_this_process_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    console = Console(None, total_steps=1000)
    for step, at in ((500, 1000.0), (510, 1020.0), (1000, 3000.0)):
        now = at
        console.progress(step)
    assert [line.partition("left ")[2] for line in capsys.readouterr().out.splitlines()] == [
        "",
        "16:20",  # 490 steps at 2 s
        "0:00",
    ]
    now, console = 0.0, Console(None, total_steps=10_000)
    console.progress(0)
    now = 100.0
    console.progress(100)
    assert "left 2:45:00" in capsys.readouterr().out


def test_a_resumed_run_continues_its_log(tmp_path: Path) -> None:
    for text in ("first", "second"):
        console = Console(tmp_path / "log.txt", total_steps=1, quiet=True)
        console.say(text)
        console.close()
    assert (tmp_path / "log.txt").read_text() == "first\nsecond\n"


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(None, total_steps=10, quiet=True)
    console.say("x")
    console.progress(1, loss=1.0)
    console.close()
    assert capsys.readouterr() == ("", "")


def test_say_from_many_threads_keeps_lines_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(tmp_path / "log.txt", total_steps=1)
    threads = [
        threading.Thread(target=lambda: [console.say("abc" * 50) for _ in range(50)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    console.close()
    for text in ((tmp_path / "log.txt").read_text(), capsys.readouterr().out):
        assert text.splitlines() == ["abc" * 50] * 200


def test_closed_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    console = Console(tmp_path / "log.txt", total_steps=2)
    stdout.close()
    console.say("still logged")
    console.progress(1)
    console.progress(2)
    console.close()
    assert (tmp_path / "log.txt").read_text() == "still logged\n"


def test_broken_pipe_does_not_end_the_process(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    log = tmp_path / "log.txt"
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(log)], cwd=ROOT, stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (result.returncode, result.stderr) == (0, b"")
    assert log.with_suffix(".done").exists()
    assert log.read_text() == "model: 124M\nstep 30: val 2.4\n"


def run_on_terminal(log: Path, hang_up: bool = False) -> tuple[int, str]:
    """SCRIPT with a pseudo-terminal of 100 columns as stdout: (exit status, what it showed)."""
    pty = pytest.importorskip("pty")
    termios = pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (30, 100))
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(log)], cwd=ROOT, stdout=theirs, stderr=subprocess.PIPE
    )
    os.close(theirs)
    shown = b""
    while not hang_up or b"21/40" not in shown:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux's way to say that the other end is closed
            break
        shown += part
        if not part:
            break
    os.close(ours)
    _, errors = process.communicate(timeout=30)
    assert errors == b""
    return process.returncode, shown.decode()


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    status, shown = run_on_terminal(tmp_path / "log.txt")
    assert status == 0
    assert "model: 124M\r\n" in shown
    assert "step 30: val 2.4" in shown and "the end\r\n" in shown
    bars = re.findall(r"(\d+)/40 \|[^|]*\| loss 2\.5000  lr 6\.0e-04  1\.2e\+04 tok/s  left", shown)
    assert bars[0] == "21" and bars[-1] == "40"
    assert len(bars) < 20 + 10  # throttled, not one line per step
    assert (tmp_path / "log.txt").read_text() == "model: 124M\nstep 30: val 2.4\n"


def test_a_terminal_that_goes_away(tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    status, _ = run_on_terminal(tmp_path / "log.txt", hang_up=True)
    assert status == 0 and (tmp_path / "log.done").exists()
    assert "step 30: val 2.4" in (tmp_path / "log.txt").read_text()
