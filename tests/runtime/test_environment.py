"""environment.json says what made a run, quickly and without secrets."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch

from runtime.environment import environment
from runtime.files import atomic_path, atomic_write_text, write_json


def test_it_describes_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = environment()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"]["version"] == torch.__version__
    assert found["torch"]["threads"] == torch.get_num_threads()
    assert len(found["torch"]["gpus"]) == torch.cuda.device_count()
    assert found["packages"]["numpy"] == numpy.__version__
    assert found["cpu"]["cores"] == os.cpu_count() and found["cpu"]["model"]
    assert found["variables"]["OMP_NUM_THREADS"] == "3"
    assert shlex.split(found["command"])[0] == sys.orig_argv[0]


def test_secrets_stay_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "TORCH_AUTH", "NCCL_SECRET_KEY", "SLURM_JWT"):
        monkeypatch.setenv(name, "hush-hush")
    monkeypatch.setattr(sys, "orig_argv", ["python", "x.py", "hub.token=hush-hush", "tokens=5"])
    found = environment()
    assert "hush-hush" not in json.dumps(found)
    assert "hub.token=***" in found["command"] and "tokens=5" in found["command"]


def test_it_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import torch, sys, time; from runtime.environment import environment;"
        "before = set(sys.modules); start = time.perf_counter(); environment();"
        "print(time.perf_counter() - start);"
        "heavy = {'transformers', 'datasets', 'wandb', 'hydra', 'tiktoken', 'matplotlib'};"
        "assert not heavy & (set(sys.modules) - before)"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert float(result.stdout) < 2.0  # 0.03 s on a quiet machine


def test_git_commit_and_dirt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("init")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    source = tmp_path / "runtime" / "environment.py"
    source.parent.mkdir()
    monkeypatch.setattr("runtime.environment.__file__", str(source))
    assert environment()["git"] is None  # no commit yet
    source.write_text("1")
    git("add", ".")
    git("commit", "-m", "x")
    (tmp_path / "untracked").write_text("does not count")
    assert environment()["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    source.write_text("2")
    assert environment()["git"]["dirty"] is True
    inner = tmp_path / "site-packages" / "runtime" / "environment.py"  # inside somebody else's
    monkeypatch.setattr("runtime.environment.__file__", str(inner))
    inner.parent.mkdir(parents=True)
    assert environment()["git"] is None
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("runtime.environment.__file__", str(source))
    assert environment()["git"] is None  # no git


def test_atomic_write_keeps_the_old_content_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic_write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    atomic_write_text(path, "néw\n")
    assert path.read_bytes() == "néw\n".encode()


def test_write_json_is_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, float("nan")], "b": (float("-inf"), 0.1), "c": Path("x/y")})
    assert json.loads(path.read_text()) == {"a": [1, None], "b": [None, 0.1], "c": "x/y"}


def test_date_is_utc() -> None:
    stamp = environment()["date_utc"]
    assert stamp.endswith("+00:00")
    assert stamp[:10] == time.strftime("%Y-%m-%d", time.gmtime())
