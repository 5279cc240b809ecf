"""A data set is prepared once, is whole or absent, and never mixes two settings."""

from __future__ import annotations

import errno
import gzip
import json
import lzma
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data import DataConfig, sources
from data import prepare as prepare_module
from data.prepare import prepare, split_of
from data.shards import MANIFEST, Manifest, ShardWriter, open_split
from data.sources import open_source
from data.tokenizer import get_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def texts(folder: Path) -> dict[str, str]:
    """What the splits of a `bytes` data set say, with | for the end of a document."""
    decoded = {}
    for name in ("train", "val"):
        split = open_split(folder, name)
        ids = split.read(0, len(split))
        assert split.bytes == int((ids != 256).sum())
        assert split.documents == int((ids == 256).sum())
        ids[ids == 256] = ord("|")
        decoded[name] = bytes(ids.tolist()).decode()
    return decoded


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    """200 documents in three files of three kinds."""
    rows = [json.dumps({"text": f"document {i} é", "id": i}) for i in range(200)]
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(rows[:100]) + "\n")
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(rows[100:150]))
    with lzma.open(folder / "c.jsonl.xz", "wt") as file:
        file.write("\n\n".join(rows[150:]) + "\n")
    return [str(folder)]


@pytest.fixture
def config(tmp_path: Path, corpus: list[str]) -> DataConfig:
    return DataConfig(
        source="text", files=corpus, val_fraction=0.1, shard_tokens=500, cache=str(tmp_path / "c")
    )


# --- content ----------------------------------------------------------------------------------


def test_every_document_lands_in_the_split_of_its_hash(config: DataConfig) -> None:
    documents = [f"document {i} é" for i in range(200)]
    expected = {"train": "", "val": ""}
    for text in documents:
        expected[split_of(text.encode(), 0.1)] += text + "|"
    assert texts(prepare(config)) == expected
    assert 8 <= expected["val"].count("|") <= 35


def test_split_fraction_is_kept_and_grows_by_inclusion() -> None:
    documents = [f"text {i}".encode() for i in range(10_000)]
    small = {text for text in documents if split_of(text, 0.05) == "val"}
    large = {text for text in documents if split_of(text, 0.2) == "val"}
    assert abs(len(small) - 500) < 5 * 22 and abs(len(large) - 2000) < 5 * 40
    assert small < large


def test_shards_have_their_size(config: DataConfig) -> None:
    folder = prepare(config)
    sizes = [shard.tokens for shard in open_split(folder, "train").shards]
    assert len(sizes) > 2 and set(sizes[:-1]) == {500}


def test_byte_identical_in_two_folders(config: DataConfig, tmp_path: Path) -> None:
    first = prepare(replace(config, dir=str(tmp_path / "one")))
    second = prepare(replace(config, dir=str(tmp_path / "two" / "deep")))
    assert content(first) == content(second)


def test_plain_text_is_split_at_a_line_break_near_its_end(tmp_path: Path) -> None:
    lines = [f"line {i:03d}\n" for i in range(100)]
    (tmp_path / "book.txt").write_text("".join(lines))
    with gzip.open(tmp_path / "book.md.gz", "wt") as file:
        file.write("".join(lines))
    for name in ("book.txt", "book.md.gz"):
        config = DataConfig(
            source="text", files=[str(tmp_path / name)], val_fraction=0.095, cache=str(tmp_path)
        )
        expected = {"train": "".join(lines[:91]) + "|", "val": "".join(lines[91:]) + "|"}
        assert texts(prepare(config)) == expected


@pytest.mark.parametrize("text", ["x" * 1000, "x" * 1000 + "\n", "é" * 501, "\n" * 99 + "ab"])
def test_text_without_line_breaks_is_split_between_characters(tmp_path: Path, text: str) -> None:
    (tmp_path / "one.txt").write_text(text)
    for fraction in (0.01, 0.0501, 0.5):
        config = DataConfig(
            source="text", files=[str(tmp_path / "one.txt")], val_fraction=fraction,
            cache=str(tmp_path),
        )  # fmt: skip
        split = texts(prepare(config))
        assert split["train"][:-1] + split["val"][:-1] == text


@pytest.mark.parametrize("part", [16, 64, 1000])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n", " "])
def test_reading_in_parts_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int, newline: str
) -> None:
    text = newline.join("é" * (i % 7) + f" word{i}" for i in range(300))
    path = tmp_path / "long.txt"
    path.write_bytes(text.encode())
    monkeypatch.setattr(sources, "PART_BYTES", part)
    config = DataConfig(source="text", files=[str(path)], val_fraction=0.2, cache=str(tmp_path))
    split = texts(prepare(config))
    assert split["train"].count("|") == split["val"].count("|") == 1
    assert split["train"][:-1] + split["val"][:-1] == text


def test_parts_are_tokenized_as_the_whole(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cuts lie where GPT-2's pattern cuts anyway: Shakespeare in 100 parts has the same ids."""
    try:
        gpt2 = get_tokenizer("gpt2")
    except FileNotFoundError as error:
        pytest.skip(f"no GPT-2 vocabulary on this machine: {error}")
    monkeypatch.setattr(sources, "PART_BYTES", 10_000)
    path = shared / "data" / "tinyshakespeare.txt"
    config = DataConfig(
        source="text", files=[str(path)], tokenizer="gpt2", val_fraction=0.1, cache=str(tmp_path)
    )
    folder = prepare(config)
    ids = [open_split(folder, name).read(0, len(open_split(folder, name)) - 1)
           for name in ("train", "val")]  # fmt: skip
    np.testing.assert_array_equal(np.concatenate(ids), gpt2.encode(path.read_text("utf-8")))
    assert sum(map(len, ids)) == 338_025


def test_a_long_text_passes_through_little_memory(tmp_path: Path) -> None:
    """64 MB of text in one file, in a process that may not grow by as much."""
    path = tmp_path / "long.txt"
    with open(path, "w") as file:
        for i in range(64):
            file.write(f"{i} some words in a line of text\n" * 30_000)
    script = (
        "import resource, sys, tqdm\n"
        "from data import DataConfig; from data.prepare import prepare\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "prepare(DataConfig(source='text', files=[sys.argv[1]], cache=sys.argv[2]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(path), str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(run.stdout) < 30_000  # kB


# --- once -------------------------------------------------------------------------------------


def test_a_second_time_nothing_is_written(config: DataConfig) -> None:
    folder = prepare(config)
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}
    assert prepare(config) == folder
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]} == before
    assert list(folder.parent.iterdir()) == [folder]  # no locks or half-finished folders remain


@pytest.mark.parametrize(
    "change",
    [{"val_fraction": 0.2}, {"shard_tokens": 400}, {"tokenizer": "gpt2"}, {"text_field": "id"}],
)
def test_changed_settings_are_refused_in_the_same_folder(
    config: DataConfig, tmp_path: Path, change: dict[str, object]
) -> None:
    config = replace(config, dir=str(tmp_path / "mine"))
    before = content(prepare(config))
    key = next(iter(change))
    with pytest.raises(ValueError, match=rf"mine holds a data set of other settings \(.*{key} was"):
        prepare(replace(config, **change))  # type: ignore[arg-type]
    assert content(tmp_path / "mine") == before


def test_changed_settings_get_their_own_folder_in_the_cache(config: DataConfig) -> None:
    folders = {prepare(config), prepare(replace(config, val_fraction=0.2))}
    assert len(folders) == 2
    for setting in ("repeat", "prefetch", "sampling"):  # how it is read is no matter
        folders.add(prepare(replace(config, **{setting: type(getattr(config, setting))(1)})))
    assert len(folders) == 2


def test_a_changed_file_is_a_changed_setting(config: DataConfig, corpus: list[str]) -> None:
    first = prepare(config)
    (Path(corpus[0]) / "d.jsonl").write_text('{"text": "one more"}\n')
    assert prepare(config) != first
    with pytest.raises(ValueError, match=r"files was .*d\.jsonl \(21 bytes\)"):
        prepare(replace(config, dir=str(first)))


def test_a_folder_with_other_things_is_left_alone(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="home holds files but no data set"):
        prepare(replace(config, dir=str(tmp_path / "home")))
    assert content(tmp_path / "home") == {"thesis.tex": b"years"}


def test_an_empty_folder_may_be_given(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert prepare(replace(config, dir=str(tmp_path / "empty"))) == tmp_path / "empty"


def test_a_damaged_data_set_is_refused_by_file(config: DataConfig) -> None:
    shard = prepare(config) / "train_00001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"train_00001\.bin"):
        prepare(config)


# --- interrupted, and several at once ---------------------------------------------------------


def test_what_a_killed_process_left_is_removed(config: DataConfig) -> None:
    expected = content(prepare(config))
    folder = prepare(config)
    leftover = folder.with_name(f"{folder.name}.deadbeef.tmp")
    folder.rename(leftover)
    (leftover / MANIFEST).unlink()
    other = folder.with_name("other.deadbeef.tmp")
    other.mkdir()
    assert content(prepare(config)) == expected
    assert sorted(folder.parent.iterdir()) == sorted([folder, other])  # not another's


def test_killed_anywhere_it_starts_anew(config: DataConfig) -> None:
    """SIGKILL at growing delays: the name never holds half a data set, the end is identical."""
    config = replace(config, shard_tokens=7)
    reference = content(prepare(replace(config, cache=config.cache + "-reference")))
    killed = 0
    for delay in (0.0, 0.01, 0.03, 0.1):
        before = set(Path(config.cache).glob("*.tmp"))
        process = _spawn().Process(target=_prepare_slowly, args=(config,))
        process.start()
        _wait_for(lambda known=before: set(Path(config.cache).glob("*.tmp")) - known)
        time.sleep(delay)
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
            killed += 1
        process.join()
        for folder in Path(config.cache).glob("text-bytes-*"):
            assert folder.suffix == ".tmp"
    assert killed == 4
    folder = prepare(config)
    assert content(folder) == reference
    assert list(folder.parent.iterdir()) == [folder]


def test_processes_at_once_prepare_one(config: DataConfig) -> None:
    """The second waits for the first and writes nothing of its own."""
    with _spawn().Pool(3) as pool:
        folders = pool.map(_prepare_slowly, [config] * 3, chunksize=1)
    assert len(set(folders)) == 1
    assert content(folders[0]) == content(prepare(replace(config, dir=config.cache + "-alone")))
    assert list(folders[0].parent.iterdir()) == [folders[0]]


def test_without_locks_the_first_one_wins(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without locks, another process finishes while this one is at work."""
    monkeypatch.setattr(prepare_module, "_acquire", lambda file, folder: False)
    fill = prepare_module._fill
    winner: list[dict[str, bytes]] = []

    def overtaken(*arguments: object) -> None:
        monkeypatch.setattr(prepare_module, "_fill", fill)
        winner.append(content(prepare(config)))
        fill(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(prepare_module, "_fill", overtaken)
    folder = prepare(config)
    assert [content(folder)] == winner
    assert list(folder.parent.iterdir()) == [folder]


def _spawn() -> multiprocessing.context.SpawnContext:
    return multiprocessing.get_context("spawn")


def _prepare_slowly(config: DataConfig) -> Path:
    """In another process: two seconds instead of milliseconds."""
    append = ShardWriter.append

    def slow(self: ShardWriter, ids: np.ndarray) -> None:
        time.sleep(0.005)
        append(self, ids)

    ShardWriter.append = slow  # type: ignore[method-assign]
    return prepare(config)


def _wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


# --- what users get wrong ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "stdlb"}, "data.source=stdlb: .*did you mean stdlib"),
        ({"tokenizer": "gpt3"}, "data.tokenizer=gpt3: .*did you mean gpt2"),
        ({"val_fraction": 0.0}, "data.val_fraction=0.0"),
        ({"val_fraction": 1.0}, "data.val_fraction=1.0"),
        ({"shard_tokens": 0}, "data.shard_tokens=0"),
        ({"files": []}, "data.files is empty"),
        ({"source": "stdlib"}, "data.files=.* is not read by data.source=stdlib"),
        (
            {"text_field": "body"},
            r"a\.jsonl line 1 has no text at data.text_field=body; .*text, id",
        ),
        ({"text_field": "id"}, r"a\.jsonl line 1 has no text at data.text_field=id"),
    ],
)
def test_unusable_settings(config: DataConfig, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(replace(config, **change))  # type: ignore[arg-type]
    cache = Path(config.cache)
    assert not cache.exists() or not list(cache.glob("text*"))  # nothing half-finished


BROKEN: dict[str, bytes] = {
    "empty.txt": b"",
    "latin1.txt": "caf\xe9 ".encode("latin-1") * 100,
    "latin1.jsonl": b'{"text": "caf\xe9"}\n',
    "not.jsonl": b'{"text": "a"}\n{"text": \n',
    "list.jsonl": b'["a", "b"]\n',
    "null.jsonl": b'{"text": null}\n',
    "short.txt.gz": gzip.compress(os.urandom(5000))[:3000],
    "plain.txt.gz": b"this was never compressed",
    "plain.jsonl.xz": b"neither was this",
    "short.jsonl.xz": lzma.compress(b'{"text": "a"}\n' * 5000)[:-40],
    "table.csv": b"a,b\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_unusable_files_are_named(config: DataConfig, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(BROKEN[name])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
        prepare(replace(config, files=[str(path)]))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("entry", ["missing.txt", "*.nothing", "empty_folder"])
def test_missing_files_are_named(config: DataConfig, tmp_path: Path, entry: str) -> None:
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(FileNotFoundError, match=entry.replace("*", r"\*")):
        prepare(replace(config, files=[str(tmp_path / entry)]))


@pytest.mark.parametrize("rows", [["a"], ["", ""]])
def test_an_empty_split_is_refused(config: DataConfig, tmp_path: Path, rows: list[str]) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"the (train|val) split is empty.*data\.val_fraction"):
        prepare(replace(config, files=[str(path)]))


def test_folders_patterns_and_repetitions(config: DataConfig, corpus: list[str]) -> None:
    """All ways to name the three files give the same documents, each once."""
    reference = texts(prepare(config))
    folder = Path(corpus[0])
    (folder / "README.pdf").write_bytes(b"not text")
    os.symlink(folder / "a.jsonl", folder.parent / "link.jsonl")
    for files in (
        [f"{folder}/*.jsonl*"],
        [f"{folder}/a.jsonl", f"{folder}/b.*", f"{folder}/?.jsonl.xz", str(folder)],
        [str(folder.parent / "link.jsonl"), str(folder)],
    ):
        assert texts(prepare(replace(config, files=files))) == reference


def test_a_bad_place_says_how_much_room_is_needed(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        OSError, match=r"cannot write .*file.*needed, [\d,]+ MB free; set data\.dir"
    ):
        prepare(replace(config, cache=str(tmp_path / "file" / "cache")))


def test_a_full_disk_says_how_much_room_is_needed(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk; both fail in write()."""
    (tmp_path / "book.txt").write_text("a line of text\n" * 200_000)
    script = (
        "import resource, signal, sys\n"
        "from data import DataConfig; from data.prepare import prepare\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
        "try: prepare(DataConfig(source='text', files=[sys.argv[1]], cache=sys.argv[2]))\n"
        "except OSError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "book.txt"), str(tmp_path / "cache")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"cannot write {tmp_path / 'cache'}" in run.stdout
    assert os.strerror(errno.EFBIG) in run.stdout and "up to 6 MB needed" in run.stdout
    assert not list((tmp_path / "cache").glob("text*"))


# --- the standard library ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, int]:
    """(folder, seconds, growth of the process in kB)"""
    import tqdm  # noqa: F401  (its import is no cost of preparing)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    folder = prepare(DataConfig(cache=str(tmp_path_factory.mktemp("cache"))))
    seconds = time.monotonic() - start
    return folder, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def test_stdlib_is_quick_and_flat(stdlib: tuple[Path, float, int]) -> None:
    folder, seconds, growth = stdlib
    assert seconds < 15
    assert growth < 60_000
    train, val = open_split(folder, "train"), open_split(folder, "val")
    assert len(train) > 5_000_000
    assert 0.005 < len(val) / len(train) < 0.2
    assert folder.name.startswith("stdlib-bytes-")


def test_stdlib_holds_modules_but_no_tests_and_no_packages() -> None:
    names = [document.name for document in open_source(DataConfig()).documents()]
    assert names == sorted(names) and len(set(names)) == len(names)
    assert {"os.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")[:-1]}
    assert not parts & {"site-packages", "test", "tests", "idle_test", "__pycache__"}


def test_manifest_tells_what_was_prepared(stdlib: tuple[Path, float, int]) -> None:
    manifest = Manifest.load(stdlib[0])
    assert (manifest.name, manifest.tokenizer, manifest.vocab_size) == ("stdlib", "bytes", 257)
    assert manifest.settings["python"] == ".".join(map(str, sys.version_info[:3]))
    split = manifest.splits["train"]
    assert split.tokens == split.bytes + split.documents


def test_config_files_and_dataclass_agree() -> None:
    """Both YAMLs have all fields and no other; stdlib's values are the dataclass's defaults."""
    from omegaconf import OmegaConf

    for name in ("stdlib", "text"):
        group = OmegaConf.load(ROOT / "configs" / "data" / f"{name}.yaml")
        whole = OmegaConf.create({"paths": {"cache": "cache"}, "data": group})
        values = OmegaConf.to_container(whole, resolve=True)["data"]  # type: ignore[index,call-overload]
        typed = OmegaConf.merge(OmegaConf.structured(DataConfig), values)
        assert set(values) == set(DataConfig.__dataclass_fields__)
        assert typed.source == name
        if name == "stdlib":
            assert OmegaConf.to_object(typed) == DataConfig()


def test_command_line(config: DataConfig, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "data.prepare", "data=text", f"data.files=[{config.files[0]}]",
        "data.tokenizer=bytes", "data.val_fraction=0.1",
    ]  # fmt: skip
    good = subprocess.run(
        [*command, f"data.dir={tmp_path / 'out'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert good.returncode == 0, good.stderr
    result = json.loads(good.stdout.splitlines()[-1])
    assert result["dir"] == str(tmp_path / "out")
    assert result["train_tokens"] == len(open_split(tmp_path / "out", "train"))
    assert result["val_tokens"] == len(open_split(tmp_path / "out", "val"))
    assert good.stderr == ""  # no progress bar where there is no terminal
    bad = subprocess.run(
        [*command, f"data.dir={tmp_path / 'corpus'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert bad.returncode == 1
    assert bad.stderr.startswith("error: data.dir=") and len(bad.stderr.splitlines()) == 1
