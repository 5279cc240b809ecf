"""A data set is prepared once, is whole or absent, and never mixes two settings."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from preparation import DOCUMENTS, content, small_config, texts

from data import DataConfig, work
from data import preparation as prepare_module
from data.compose import compose_data
from data.preparation import prepare
from data.shards import Manifest, open_split
from data.sources import open_source, split_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return small_config(tmp_path)


# --- content ----------------------------------------------------------------------------------


def expected_texts(val_fraction: float) -> dict[str, str]:
    expected = {"train": "", "val": ""}
    for text in DOCUMENTS:
        expected[split_of(hashlib.sha256(text.encode()).digest(), val_fraction)] += text + "|"
    return expected


def test_every_document_lands_in_the_split_of_its_hash(config: DataConfig) -> None:
    expected = expected_texts(0.1)
    assert texts(prepare(config)) == expected
    assert 8 <= expected["val"].count("|") <= 35


def test_split_fraction_is_kept_and_grows_by_inclusion() -> None:
    digests = [hashlib.sha256(f"text {i}".encode()).digest() for i in range(10_000)]
    small = {digest for digest in digests if split_of(digest, 0.05) == "val"}
    large = {digest for digest in digests if split_of(digest, 0.2) == "val"}
    assert abs(len(small) - 500) < 5 * 22 and abs(len(large) - 2000) < 5 * 40
    assert small < large


def test_shards_have_their_size(config: DataConfig) -> None:
    folder = prepare(config)
    sizes = [shard.tokens for shard in open_split(folder, "train").shards]
    assert len(sizes) > 2 and set(sizes[:-1]) == {500}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch", [1, 100, 1 << 19])
@pytest.mark.parametrize("part", [1, 300, 1 << 26])
def test_files_do_not_depend_on_how_the_work_is_cut(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch, threads: int, batch: int, part: int
) -> None:
    monkeypatch.setattr(work, "BATCH_BYTES", batch)
    monkeypatch.setattr(work, "PART_BYTES", part)
    folder = prepare(replace(config, threads=threads))
    assert texts(folder) == expected_texts(0.1)
    sizes = [shard.tokens for shard in open_split(folder, "train").shards]
    assert set(sizes[:-1]) == {500}


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i}a\ud800b"}) + "\n" for i in range(50)))
    config = DataConfig(source="text", files=[str(path)], val_fraction=0.3, cache=str(tmp_path))
    decoded = "".join(texts(prepare(config)).values())
    assert decoded.count("a?b|") == 50


def test_a_long_text_passes_through_little_memory(tmp_path: Path) -> None:
    """64 MB of text in one file, in a process that may not grow by as much."""
    path = tmp_path / "long.txt"
    with open(path, "w") as file:
        for i in range(64):
            file.write(f"{i} some words in a line of text\n" * 30_000)
    script = (
        "import resource, sys, tqdm\n"
        "from data import DataConfig; from data.preparation import prepare\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "prepare(DataConfig(source='text', files=[sys.argv[1]], cache=sys.argv[2], threads=2))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(path), str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    # kB.  Two bytes per id: one shard of 64 M ids would be 128 MB.
    assert int(run.stdout) < 60_000


# --- once -------------------------------------------------------------------------------------


def test_a_second_time_nothing_is_written(config: DataConfig) -> None:
    folder = prepare(config)
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}
    assert prepare(config) == folder
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]} == before
    assert list(folder.parent.iterdir()) == [folder]  # no locks or half-finished folders remain


@pytest.mark.parametrize(
    "change",
    [
        {"val_fraction": 0.2}, {"shard_tokens": 400}, {"tokenizer": "gpt2"}, {"text_field": "id"},
        {"dedup": True},
    ],
)  # fmt: skip
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
    for change in ({"repeat": False}, {"prefetch": 1}, {"threads": 1}, {"processes": 2}):
        folders.add(prepare(replace(config, **change)))  # type: ignore[arg-type]
    assert len(folders) == 2


def test_a_changed_file_is_a_changed_setting(config: DataConfig) -> None:
    first = prepare(config)
    (Path(config.files[0]) / "d.jsonl").write_text('{"text": "one more"}\n')
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


# --- room on the disk, and other mistakes -----------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "stdlb"}, "data.source=stdlb: .*did you mean stdlib"),
        ({"tokenizer": "gpt3"}, "data.tokenizer is 'gpt3': did you mean gpt2"),
        ({"val_fraction": 0.0}, "data.val_fraction=0.0"),
        ({"val_fraction": 1.0}, "data.val_fraction=1.0"),
        ({"shard_tokens": 0}, "data.shard_tokens=0"),
        ({"threads": 0}, "data.threads=0"),
        ({"processes": 0}, "data.processes=0"),
        ({"split_by": "title"}, "data.split_by=title: expected one of hash, permutation"),
        ({"split_by": "permutation"}, "permutation needs data.source=huggingface"),
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


@pytest.mark.parametrize("rows", [["a"], ["", ""]])
def test_an_empty_split_is_refused(config: DataConfig, tmp_path: Path, rows: list[str]) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"the (train|val) split is empty.*data\.val_fraction"):
        prepare(replace(config, files=[str(path)]))
    assert not list(Path(config.cache).glob("text*"))


def test_a_disk_too_small_is_noticed_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 MB of text as bytes of two bytes each: 6 MB, and as much again while files are joined."""
    path = tmp_path / "book.txt"
    path.write_text("a line of text\n" * 200_000)
    config = DataConfig(source="text", files=[str(path)], cache=str(tmp_path / "cache"))
    usage = type("usage", (), {"free": 11_000_000})
    monkeypatch.setattr(prepare_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"needs about 12 MB of disk, 11 MB are free: make room"):
        prepare(config)
    assert not list((tmp_path / "cache").glob("text*"))
    assert prepare(replace(config, check=False)).is_dir()


def test_a_bad_place_is_named(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write .*file.*[\d,]+ MB free.*set data\.dir"):
        prepare(replace(config, cache=str(tmp_path / "file" / "cache")))


def test_after_a_full_disk_it_goes_on(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk; both fail in write()."""
    (tmp_path / "book.txt").write_text("a line of text\n" * 200_000)
    script = (
        "import resource, signal, sys\n"
        "from data import DataConfig, work; from data.preparation import prepare\n"
        "work.PART_BYTES = 1 << 18\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))\n"
        "config = DataConfig(source='text', files=[sys.argv[1]], cache=sys.argv[2])\n"
        "try: print(prepare(config))\n"
        "except OSError as error: print(error)"
    )
    cache = tmp_path / "cache"
    outputs = []
    for limit in (2**18, 2**22, 2**30):
        command = [sys.executable, "-c", script, str(tmp_path / "book.txt"), str(cache), str(limit)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        outputs.append(run.stdout)
    for output in outputs[:2]:
        assert f"cannot write {cache}" in output and os.strerror(errno.EFBIG) in output
        assert "make room and the same command goes on" in output
    text = texts(Path(outputs[2].strip()))
    assert text["train"][:-1] + text["val"][:-1] == "a line of text\n" * 200_000


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
    pieces = open_source(DataConfig()).open({}).pieces
    names = [document.name for piece in pieces for document in piece.documents()]
    assert names == sorted(names) and len(set(names)) == len(names)
    assert {"os.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")[:-1]}
    assert not parts & {"site-packages", "test", "tests", "idle_test", "__pycache__"}


def test_manifest_tells_what_was_prepared(stdlib: tuple[Path, float, int]) -> None:
    manifest = Manifest.load(stdlib[0])
    assert (manifest.name, manifest.tokenizer, manifest.vocab_size) == ("stdlib", "bytes", 257)
    assert manifest.settings["python"] == ".".join(map(str, sys.version_info[:3]))
    split = manifest.splits["train"]
    assert split.tokens == (split.bytes or 0) + (split.documents or 0)


# --- configuration ----------------------------------------------------------------------------


def test_the_shared_settings_are_the_dataclass() -> None:
    """data_defaults.yaml has all fields and no other, with the dataclass's defaults."""
    group = OmegaConf.load(ROOT / "configs" / "data_defaults.yaml")
    whole = OmegaConf.create({"paths": {"cache": "cache"}, "data": group})
    values = OmegaConf.to_container(whole, resolve=True)["data"]  # type: ignore[index,call-overload]
    assert set(values) == set(DataConfig.__dataclass_fields__)
    typed = OmegaConf.merge(OmegaConf.structured(DataConfig), values)
    assert OmegaConf.to_object(typed) == DataConfig()


FILES = sorted((ROOT / "configs" / "data").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_source_composes_and_changes_only_what_exists(file: Path) -> None:
    written = set(OmegaConf.load(file)) - {"defaults"}
    assert written <= set(DataConfig.__dataclass_fields__)
    config = compose_data([f"data={file.stem}"])
    assert {key: getattr(config, key) for key in written} == {
        key: value for key, value in OmegaConf.load(file).items() if key in written
    }
