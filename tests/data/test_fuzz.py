"""Whatever happened to the files, the answer is the tokens that were written or one clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_formats import build_nanogpt, modded, nanogpt
from test_shards import write

from data import DataConfig
from data.corpus import open_corpus
from data.formats import FORMATS, Ids, read_layout
from data.shards import MANIFEST, Manifest, open_split

IDS = np.random.default_rng(0).integers(0, 257, 37)
fuzz = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("own"), IDS)


def with_content(path: Path, content: bytes, check: Callable[[], None]) -> None:
    """Run a check while a file has another content."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        check()
    finally:
        path.write_bytes(before)


def whole_or_refused(folder: Path, path: Path) -> None:
    """Either every token is as written, or an error names the file, in one line."""
    try:
        split = open_split(folder, "train")
        tokens = split.read(0, len(split))
    except (ValueError, OSError) as error:
        assert path.name in str(error) and "\n" not in str(error)
    else:
        np.testing.assert_array_equal(tokens, IDS)


def damaged(raw: bytes, kind: str, data: st.DataObject, within: int) -> bytes:
    """`raw` with one thing done to its first `within` bytes."""
    place = data.draw(st.integers(0, within - 1))
    if kind == "flip":
        bit = 1 << data.draw(st.integers(0, 7))
        return raw[:place] + bytes([raw[place] ^ bit]) + raw[place + 1 :]
    if kind == "cut":
        return raw[:place]
    if kind == "insert":
        return raw[:place] + data.draw(st.binary(min_size=1, max_size=9)) + raw[place:]
    return data.draw(st.binary(max_size=within)) + raw[within:]  # "overwrite"


KINDS = ["flip", "cut", "insert", "overwrite"]


@pytest.mark.parametrize("kind", KINDS)
@fuzz
@given(data=st.data())
def test_header(folder: Path, kind: str, data: st.DataObject) -> None:
    path = folder / "train_00001.bin"
    content = damaged(path.read_bytes(), kind, data, within=1024)
    with_content(path, content, lambda: whole_or_refused(folder, path))


@pytest.mark.parametrize("kind", KINDS)
@fuzz
@given(data=st.data())
def test_manifest(folder: Path, kind: str, data: st.DataObject) -> None:
    path = folder / MANIFEST
    raw = path.read_bytes()
    content = damaged(raw, kind, data, within=len(raw))
    with_content(path, content, lambda: whole_or_refused(folder, path))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@fuzz
@given(data=st.data(), value=json_values)
def test_manifest_with_a_value_of_another_kind(
    folder: Path, data: st.DataObject, value: object
) -> None:
    """Valid JSON, its checksum left out as the first manifests had none, one value replaced."""
    path = folder / MANIFEST
    fields = json.loads(path.read_bytes())
    del fields["checksum"]
    split = fields["splits"]["train"]
    holders = [fields, fields["splits"], split, split["shards"][1]]
    holder = data.draw(st.sampled_from(holders))
    key = data.draw(st.sampled_from(sorted(holder)))
    holder[key] = value
    content = json.dumps(fields).encode()

    def check() -> None:
        try:
            Manifest.load(folder)
        except ValueError as error:
            assert str(path) in str(error)
        whole_or_refused_naming_any(folder)

    with_content(path, content, check)


def whole_or_refused_naming_any(folder: Path) -> None:
    """Counts that nothing contradicts (text bytes, documents) may be wrong; tokens may not."""
    try:
        split = open_split(folder, "train")
        tokens = split.read(0, len(split))
    except (ValueError, OSError) as error:
        assert str(folder) in str(error)
    else:
        np.testing.assert_array_equal(tokens, IDS)


@fuzz
@given(st.binary(max_size=3000), st.sampled_from(sorted(FORMATS)))
def test_random_bytes_in_any_format(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, format: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.bin"
    path.write_bytes(raw)
    try:
        layout = read_layout(path, format, np.dtype("<u2"))
        ids = Ids(path, layout).ids
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert raw[layout.offset :] == ids.tobytes()


@pytest.fixture(scope="module", params=[modded, build_nanogpt], ids=["llmc", "npy"])
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    ids = np.random.default_rng(1).integers(0, 50257, 3000)
    request.param(folder, ids)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@fuzz
@given(data=st.data())
def test_foreign_header(foreign: Path, kind: str, data: st.DataObject) -> None:
    config = DataConfig(source="shards", dir=str(foreign), tokenizer="gpt2")
    expected = open_corpus(config).train
    path = expected.files[1].path
    raw = path.read_bytes()
    content = damaged(raw, kind, data, within=12 if path.suffix == ".bin" else 128)
    assume(content != raw)

    def check() -> None:
        try:
            train = open_corpus(config).train
        except (ValueError, OSError) as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:  # only what no reader looks at was changed
            assert [file.layout for file in train.files] == [file.layout for file in expected.files]
            assert raw[-100:] == content[-100:]

    with_content(path, content, check)


@fuzz
@given(raw=st.binary(min_size=64, max_size=3000))
def test_random_bytes_as_a_raw_file(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    """Of 32 random ids hardly a set stays below the vocabulary; what does are ids, unchanged."""
    folder = tmp_path_factory.mktemp("raw")
    nanogpt(folder, np.random.default_rng(1).integers(0, 50257, 3000))
    (folder / "train.bin").write_bytes(raw)
    try:
        train = open_corpus(DataConfig(source="shards", dir=str(folder), tokenizer="gpt2")).train
    except ValueError as error:
        assert str(folder / "train.bin") in str(error)
    else:
        assert train.read(0, len(train)).astype("<u2").tobytes() == raw
