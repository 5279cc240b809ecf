"""Files of other programs are read where they lie; what they are not is refused by name."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from test_shards import write

from data import DataConfig
from data.corpus import Corpus, open_corpus
from data.formats import FORMATS, read_layout, recognize, token_dtype
from data.shards import Manifest
from data.tokenizer import get_tokenizer

EOT = 50256
U2 = np.dtype("<u2")


@pytest.fixture
def ids() -> np.ndarray:
    """Like text: no id is rare enough to be missing, a document ends now and then."""
    ids = np.random.default_rng(0).integers(0, EOT, 3000)
    ids[::100] = EOT
    return ids


def llmc(path: Path, ids: np.ndarray, magic: int = 20240520, version: int = 1) -> None:
    header = struct.pack("<iii", magic, version, len(ids)).ljust(1024, b"\0")
    path.write_bytes(header + ids.astype("<u2" if version == 1 else "<u4").tobytes())


def nanogpt(folder: Path, ids: np.ndarray) -> None:
    ids.astype("<u2").tofile(folder / "train.bin")
    ids[::-1].astype("<u2").tofile(folder / "val.bin")


def modded(folder: Path, ids: np.ndarray) -> None:
    for number, part in enumerate(np.array_split(ids, 11), start=1):
        llmc(folder / f"fineweb_train_{number:06d}.bin", part)
    llmc(folder / "fineweb_val_000000.bin", ids[::-1])


def build_nanogpt(folder: Path, ids: np.ndarray) -> None:
    for number, part in enumerate(np.array_split(ids, 3), start=1):
        np.save(folder / f"edufineweb_train_{number:06d}.npy", part.astype(np.uint16))
    np.save(folder / "edufineweb_val_000000.npy", ids[::-1].astype(np.uint16))


def read(folder: Path, tokenizer: str = "gpt2") -> Corpus:
    return open_corpus(DataConfig(source="shards", dir=str(folder), tokenizer=tokenizer))


@pytest.mark.parametrize("make", [nanogpt, modded, build_nanogpt])
def test_read_in_place(tmp_path: Path, ids: np.ndarray, make: object) -> None:
    make(tmp_path, ids)  # type: ignore[operator]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    corpus = read(tmp_path)
    np.testing.assert_array_equal(corpus.train.read(0, 3000), ids)
    np.testing.assert_array_equal(corpus.val.read(0, 3000), ids[::-1])
    assert (corpus.train.eot, corpus.train.vocab_size) == (EOT, 50257)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before  # nothing added


def test_without_text_bytes_there_are_no_bits_per_byte(tmp_path: Path, ids: np.ndarray) -> None:
    nanogpt(tmp_path, ids)
    corpus = read(tmp_path)
    assert corpus.val.bytes is corpus.val.documents is corpus.val.bytes_per_token is None
    assert corpus.bigram_bits_per_byte() is None


def test_our_own_folder_without_its_text(tmp_path: Path) -> None:
    write(tmp_path, np.arange(1000) % 257)
    manifest = Manifest.load(tmp_path)
    bytes_tokenizer = get_tokenizer("bytes")
    Manifest(
        **{**vars(manifest), "tokenizer_fingerprint": bytes_tokenizer.fingerprint}
    ).save(tmp_path)  # fmt: skip
    assert len(read(tmp_path, "bytes").train) == 1000
    with pytest.raises(ValueError, match=r"manifest\.json: .*tokenizer bytes .*tokenizer=gpt2"):
        read(tmp_path)


def test_ids_of_32_bits(tmp_path: Path) -> None:
    """llm.c's Llama 3 files say so; a raw file's ids are as wide as the vocabulary needs."""
    ids = np.array([1, 70_000, 127_999])
    llmc(tmp_path / "a.bin", ids, magic=20240801, version=7)
    layout = read_layout(tmp_path / "a.bin", recognize(tmp_path / "a.bin"), U2)
    assert (layout.dtype, layout.tokens) == (np.dtype("<u4"), 3)
    ids.astype("<u4").tofile(tmp_path / "b.bin")
    assert read_layout(tmp_path / "b.bin", "nanogpt", token_dtype(128_256)).tokens == 3


def test_a_series_is_read_by_its_numbers(tmp_path: Path) -> None:
    for number in range(1, 13):
        llmc(tmp_path / f"x_train_{number}.bin", np.full(10, number))
    llmc(tmp_path / "x_val_0.bin", np.full(10, 7))
    assert read(tmp_path).train.read(0, 120)[::10].tolist() == list(range(1, 13))


def test_test_files_are_left_alone(tmp_path: Path, ids: np.ndarray) -> None:
    nanogpt(tmp_path, ids)
    (tmp_path / "test.bin").write_bytes(b"?")
    (tmp_path / "notes.txt").write_bytes(b"?")
    read(tmp_path)


def test_fingerprint_tells_data_apart_and_not_places(tmp_path: Path, ids: np.ndarray) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        nanogpt(tmp_path / name, ids if name != "c" else np.roll(ids, 1))
    a, b, c = (read(tmp_path / name).fingerprint for name in ("a", "b", "c"))
    assert a == b != c


# --- refusals -------------------------------------------------------------------------------------


def refused(folder: Path, *complaint: str, tokenizer: str = "gpt2") -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read(folder, tokenizer)
    for part in complaint:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_no_folder_named() -> None:
    with pytest.raises(ValueError, match=r"needs data\.dir"):
        open_corpus(DataConfig(source="shards", tokenizer="bytes"))


def test_missing_folder_split_or_file(tmp_path: Path, ids: np.ndarray) -> None:
    refused(tmp_path / "nowhere", "nowhere not found")
    refused(tmp_path, "holds no train file", "train.bin", "fineweb_train_000001.bin")
    modded(tmp_path, ids)
    (tmp_path / "fineweb_val_000000.bin").rename(tmp_path / "kept")
    refused(tmp_path, "holds no val file")
    (tmp_path / "kept").rename(tmp_path / "fineweb_val_000000.bin")
    (tmp_path / "fineweb_train_000004.bin").unlink()
    (tmp_path / "fineweb_train_000009.bin").unlink()
    refused(
        tmp_path, "fineweb_train_000004.bin not found, one of 2 missing before fineweb_train_000011"
    )


def test_a_file_of_no_split(tmp_path: Path, ids: np.ndarray) -> None:
    nanogpt(tmp_path, ids)
    (tmp_path / "pytorch_model.bin").write_bytes(b"1234")
    refused(tmp_path, "pytorch_model.bin: its name tells no split")


@pytest.mark.parametrize("where", [0, 1234, 2999])
@pytest.mark.parametrize("make", [nanogpt, modded, build_nanogpt])
def test_id_beyond_the_vocabulary(
    tmp_path: Path, ids: np.ndarray, make: object, where: int
) -> None:
    ids[where] = 50257
    make(tmp_path, ids)  # type: ignore[operator]
    refused(tmp_path, str(tmp_path), "train", "id 50257 at position", "data.tokenizer=gpt2")


def test_another_tokenizer(tmp_path: Path, ids: np.ndarray) -> None:
    nanogpt(tmp_path, ids)
    refused(tmp_path, "train.bin: id 50256", "data.tokenizer=bytes, 257 ids", tokenizer="bytes")


def test_model_with_a_smaller_vocabulary(tmp_path: Path, ids: np.ndarray) -> None:
    nanogpt(tmp_path, ids)
    corpus = read(tmp_path)
    corpus.check_vocab(50304)
    with pytest.raises(ValueError, match="below 50257, but the model's vocabulary is 50000"):
        corpus.check_vocab(50000)


@pytest.mark.parametrize("size", [0, 4, 1023, 1024, 1025, 1026, 1500])
def test_truncated(tmp_path: Path, ids: np.ndarray, size: int) -> None:
    modded(tmp_path, ids)
    path = tmp_path / "fineweb_train_000003.bin"
    path.write_bytes(path.read_bytes()[:size])
    refused(tmp_path, str(path))


def test_truncated_raw(tmp_path: Path, ids: np.ndarray) -> None:
    nanogpt(tmp_path, ids)
    path = tmp_path / "val.bin"
    path.write_bytes(path.read_bytes()[:-1])
    refused(tmp_path, f"{path} is truncated or damaged: 5999 bytes, expected 5998")
    path.write_bytes(b"")
    refused(tmp_path, f"{path} holds 0 ids")


@pytest.mark.parametrize(
    ("magic", "version", "complaint"),
    [
        (20240520, 2, "version 2"),
        (20240801, 1, "20240801 with version 7"),
        (20240521, 1, "header of llmc"),
    ],
)
def test_foreign_header(
    tmp_path: Path, ids: np.ndarray, magic: int, version: int, complaint: str
) -> None:
    modded(tmp_path, ids)
    path = tmp_path / "fineweb_val_000000.bin"
    path.write_bytes(struct.pack("<ii", magic, version) + path.read_bytes()[8:])
    refused(tmp_path, str(path), complaint)


def test_a_lone_damaged_header(tmp_path: Path, ids: np.ndarray) -> None:
    """No file beside it tells what it was; its zeros do."""
    nanogpt(tmp_path, ids)
    path = tmp_path / "train.bin"
    for magic in (20240522, 0):
        llmc(path, ids, magic=magic)
        refused(tmp_path, f"{path} begins with a damaged header")


def test_numpy_of_another_kind(tmp_path: Path, ids: np.ndarray) -> None:
    build_nanogpt(tmp_path, ids)
    path = tmp_path / "edufineweb_train_000002.npy"
    for wrong in (ids, ids.astype(np.uint16).reshape(-1, 2), ids.astype(">u2")):
        np.save(path, wrong)
        refused(tmp_path, str(path), "expected version 1.0, one dimension, uint16 or uint32")
    np.save(path, np.array([{"a": 1}]), allow_pickle=True)
    refused(tmp_path, str(path), "uint16 or uint32")


def test_what_a_raw_file_may_be_instead(tmp_path: Path, ids: np.ndarray) -> None:
    nanogpt(tmp_path, ids)
    path = tmp_path / "train.bin"
    for text in ("It is text, after all. " * 100, "Ein Stück Text, größer als nötig. " * 100):
        path.write_bytes(text.encode())
        refused(tmp_path, f"{path} holds text, not token ids")
    ids.astype("<u4").tofile(path)
    refused(tmp_path, f"{path} holds 32-bit ids")
    nanogpt(tmp_path, ids)
    (tmp_path / "meta.pkl").write_bytes(b"")
    refused(tmp_path, "meta.pkl", "data=text")


def test_large_folder_is_looked_at_in_places(
    tmp_path: Path, ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ends are always seen; an id that is not seen is refused when it is read."""
    monkeypatch.setattr("data.foreign.LOOK_AT", 1000)
    monkeypatch.setattr("data.foreign.STRETCH", 10)
    monkeypatch.setattr("data.foreign.STRETCHES", 10)
    for where in (0, 2999):
        wrong = ids.copy()
        wrong[where] = 60_000
        nanogpt(tmp_path, wrong)
        refused(tmp_path, f"train.bin: id 60000 at position {where}")
    wrong = ids.copy()
    wrong[101] = 60_000
    nanogpt(tmp_path, wrong)
    split = read(tmp_path).train
    with pytest.raises(ValueError, match=r"train\.bin: id 60000 at position 101 is outside"):
        split.read(90, 20)


def test_a_hundred_billion_ids_of_nanogpt(tmp_path: Path) -> None:
    for name, size in (("train", 2 * 10**11), ("val", 10**6)):
        with open(tmp_path / f"{name}.bin", "wb") as file:
            file.truncate(size)
    corpus = read(tmp_path)
    assert len(corpus.train) == 10**11
    order = corpus.order(1024, 8, 0)
    assert not corpus.train.read(int(order.offsets(10**6).max()), 1025).any()


def test_every_format_has_a_reader_by_its_first_bytes(tmp_path: Path) -> None:
    for name, form in FORMATS.items():
        if form.header is not None:
            path = tmp_path / f"{name}.bin"
            path.write_bytes(form.header(2, U2) + b"\1\0\2\0")
            assert recognize(path) == name
            assert read_layout(path, name, U2).tokens == 2
