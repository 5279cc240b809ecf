"""However often it is killed, and whoever does the work, the files are those of one quiet run."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from preparation import content, small_config

from data import DataConfig, textfiles, work
from data import preparation as prepare_module
from data.plan import plan
from data.preparation import merge, prepare, prepare_share
from data.shards import MANIFEST
from data.work import Journal

ROOT = Path(__file__).resolve().parents[2]
FORK = multiprocessing.get_context("fork")  # a child has the parent's patches, and starts at once


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """A corpus of many small pieces, parts and shards, so that there is much to interrupt."""
    monkeypatch.setattr(textfiles, "PIECE_BYTES", 1000)
    monkeypatch.setattr(work, "PART_BYTES", 400)
    monkeypatch.setattr(work, "BATCH_BYTES", 100)
    return replace(small_config(tmp_path), shard_tokens=97, threads=2)


@pytest.fixture
def reference(config: DataConfig, tmp_path: Path) -> dict[str, bytes]:
    return content(prepare(replace(config, dir=str(tmp_path / "reference"))))


def done_parts(config: DataConfig) -> int:
    """Parts in the journals of an unfinished preparation."""
    parts = plan(config).work / "parts"
    if not parts.is_dir():
        return 0
    pieces = len(plan(config).source.open({}).pieces)
    return sum(len(Journal.load(parts, piece).parts) for piece in range(pieces))


def in_child(function: Callable[..., object], *arguments: Any) -> multiprocessing.Process:
    process = FORK.Process(target=function, args=arguments)
    process.start()
    return process  # type: ignore[return-value]


def nothing_but(folder: Path) -> bool:
    return [path for path in folder.parent.iterdir() if "reference" not in path.name] == [folder]


@pytest.mark.parametrize("dedup", [False, True])
def test_killed_at_random_moments(config: DataConfig, tmp_path: Path, dedup: bool) -> None:
    """SIGKILL twelve times or more; nothing that was finished is done again."""
    config = replace(config, dedup=dedup)
    reference = content(prepare(replace(config, dir=str(tmp_path / "reference"))))
    rng = random.Random(1)
    kills = parts = 0
    while kills < 12:
        process = in_child(prepare, config)
        time.sleep(rng.uniform(0.01, 0.1))
        folder = plan(config).folder
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
            kills += 1
        process.join()
        if folder.exists():  # it was faster: once more from the start
            assert content(folder) == reference
            shutil.rmtree(folder)
            parts = 0
        else:
            assert done_parts(config) >= parts
            parts = done_parts(config)
    folder = prepare(config)
    assert content(folder) == reference
    assert nothing_but(folder)


def _dies_at_replacement(number: int, after: bool, config: DataConfig) -> None:
    """In a child: SIGKILL's like before or after its `number`-th os.replace."""
    real, left = os.replace, [number]

    def counting(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            if after:
                real(*arguments)
            os._exit(9)
        real(*arguments)

    os.replace = counting  # type: ignore[assignment]
    (prepare if config.worker is None else prepare_share)(config)


def test_killed_at_every_change_of_a_name(config: DataConfig, tmp_path: Path) -> None:
    """Each process dies right before or after one of its next five, until one has none left."""
    config = replace(config, shard_tokens=900)
    reference = content(prepare(replace(config, dir=str(tmp_path / "reference"))))
    for turn in range(200):
        process = in_child(_dies_at_replacement, 1 + turn % 5, turn % 2 == 1, config)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == 9
    assert turn > 15
    assert content(plan(config).folder) == reference
    assert nothing_but(plan(config).folder)


def test_goes_on_where_it_stopped(
    config: DataConfig, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error half-way costs only the part under way."""
    encode, seen = work.encode, []

    def broken(documents: list[Any], recipe: Any) -> Any:
        if len(seen) >= 80:
            raise OSError("the network is gone")
        seen.extend(document.text for document in documents)
        return encode(documents, recipe)

    monkeypatch.setattr(work, "encode", broken)
    monkeypatch.setattr(prepare_module, "_check_space", lambda *arguments: None)
    with pytest.raises(OSError, match="the network is gone"):
        prepare(replace(config, threads=1))
    before = done_parts(config)
    assert before > 0
    again: list[str] = []
    monkeypatch.setattr(
        work, "encode", lambda d, r: (again.extend(x.text for x in d), encode(d, r))[1]
    )
    assert content(prepare(config)) == reference
    assert 0 < len(again) < 200


def test_changed_settings_begin_anew_and_leave_the_old_work(config: DataConfig) -> None:
    process = in_child(_dies_at_replacement, 4, True, replace(config, dir=config.cache + "/mine"))
    process.join()
    before = sorted(Path(config.cache).iterdir())
    assert any(path.suffix == ".work" for path in before)
    other = replace(config, dir=config.cache + "/mine", val_fraction=0.2)
    folder = prepare(other)
    assert content(folder) == content(prepare(replace(other, dir=config.cache + "/fresh")))
    assert {path for path in before if path.suffix == ".work"} <= set(Path(config.cache).iterdir())


@pytest.mark.parametrize("damage", [b"", b"\0\0"])
def test_a_damaged_part_is_noticed(config: DataConfig, damage: bytes) -> None:
    prepare_share(replace(config, worker="1/2"))
    part = next((plan(config).work / "parts").glob("*_train"))
    part.write_bytes(damage + part.read_bytes()[len(damage) or 2 :])
    with pytest.raises(ValueError, match=rf"{part.name} is not what was written"):
        prepare(config)


# --- several processes ------------------------------------------------------------------------


def _prepare_slowly(config: DataConfig) -> Path:
    real = os.replace

    def slow(*arguments: Any) -> None:
        time.sleep(0.003)
        real(*arguments)

    os.replace = slow  # type: ignore[assignment]
    return prepare(config)


def test_processes_at_once_prepare_one(config: DataConfig, reference: dict[str, bytes]) -> None:
    """The second waits for the first and writes nothing of its own."""
    with FORK.Pool(3) as pool:
        folders = pool.map(_prepare_slowly, [config] * 3, chunksize=1)
    assert len(set(folders)) == 1
    assert content(folders[0]) == reference
    assert nothing_but(folders[0])


def test_without_locks_the_first_one_wins(
    config: DataConfig, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without locks, another process finishes while this one is at work."""
    monkeypatch.setattr("data.plan._acquire", lambda *arguments: False)
    finish = prepare_module._finish

    def overtaken(*arguments: Any) -> None:
        monkeypatch.setattr(prepare_module, "_finish", finish)
        prepare(config)
        finish(*arguments)

    monkeypatch.setattr(prepare_module, "_finish", overtaken)
    folder = prepare(config)
    assert content(folder) == reference
    assert nothing_but(folder)


def test_processes_share_the_pieces(tmp_path: Path) -> None:
    """data.processes, with the real sizes, as spawned processes have no patches."""
    config = small_config(tmp_path)
    alone = prepare(replace(config, dir=str(tmp_path / "alone")))
    shared = prepare(replace(config, dir=str(tmp_path / "shared"), processes=2))
    assert content(shared) == content(alone)


@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_workers_make_the_same_files(
    config: DataConfig, reference: dict[str, bytes], count: int
) -> None:
    """Also where there are more workers than pieces; the last one assembles."""
    order = list(range(1, count + 1))
    random.Random(count).shuffle(order)
    folders = [prepare_share(replace(config, worker=f"{i}/{count}")) for i in order]
    finished = [folder for folder in folders if folder is not None]
    assert finished and content(finished[0]) == reference
    assert nothing_but(finished[0])


def test_workers_at_once(config: DataConfig, reference: dict[str, bytes]) -> None:
    workers = [in_child(prepare_share, replace(config, worker=f"{i}/4")) for i in range(1, 5)]
    for process in workers:
        process.join()
        assert process.exitcode == 0
    assert content(plan(config).folder) == reference
    assert nothing_but(plan(config).folder)


def test_a_worker_that_died_is_replaced(config: DataConfig, reference: dict[str, bytes]) -> None:
    """By itself, by the plain command, or by workers of another division."""
    in_child(_dies_at_replacement, 6, False, replace(config, worker="1/2")).join()
    assert prepare_share(replace(config, worker="2/2")) is None
    with pytest.raises(ValueError, match=r"of \d pieces are not prepared yet \(pieces \d"):
        merge(config)
    assert content(prepare(config)) == reference


def test_merge_where_there_are_no_locks(
    config: DataConfig, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.plan._acquire", lambda *arguments: False)
    with pytest.raises(ValueError, match="no worker has prepared anything yet"):
        merge(config)
    assert [prepare_share(replace(config, worker=f"{i}/2")) for i in (1, 2)] == [None, None]
    assert content(merge(config)) == reference


@pytest.mark.parametrize("worker", ["0/2", "3/2", "1", "a/b", "1/", "-1/2", "1/2/3"])
def test_unusable_shares(config: DataConfig, worker: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.worker={worker}: expected i/n"):
        prepare_share(replace(config, worker=worker))


# --- the whole command, killed ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_killed_at_random(tmp_path: Path, shared: Path, processes: int) -> None:
    """Real text and real sizes of parts, the whole group of processes killed again and again."""
    names = ("techdocs", "openwebtext_sample")
    files = [str(shared / "data" / f"{name}.jsonl.xz") for name in names]
    command = [
        sys.executable, "-m", "data.prepare", "data=text", f"data.files=[{','.join(files)}]",
        "data.tokenizer=bytes", "data.shard_tokens=5000000", f"data.processes={processes}",
    ]  # fmt: skip
    subprocess.run([*command, f"data.dir={tmp_path}/quiet"], cwd=ROOT, check=True)
    rng = random.Random(processes)
    kills = 0
    while not (tmp_path / "killed" / MANIFEST).is_file():
        process = subprocess.Popen(
            [*command, f"data.dir={tmp_path}/killed"], cwd=ROOT, start_new_session=True
        )
        try:
            process.wait(rng.uniform(0.4, 0.9) if kills < 15 else 120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    assert content(tmp_path / "killed") == content(tmp_path / "quiet")
    assert kills >= 2
