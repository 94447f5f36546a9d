"""Importance matrices in both forms: read as llama.cpp reads them, and refused where they are damaged."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from dsv4convert.checkpoint import open_folder
from dsv4convert.containers.imatrix import Imatrix, importance, read_imatrix, without_importance
from dsv4convert.errors import Dsv4Error, FileFormatError, InputMissingError
from dsv4convert.formats.ggml_types import BY_NAME
from dsv4convert.targets.low_bit import LowBitMaker

from ..checkpoints import MakeCheckpoint
from ..low_bit import write_imatrix

DENSE, EXPERTS = "blk.0.attn_q_a.weight", "blk.0.ffn_up_exps.weight"
SUMS = {
    DENSE: np.arange(8, dtype=np.float32).reshape(1, 8) + 0.5,
    EXPERTS: np.arange(12, dtype=np.float32).reshape(3, 4) * 3 + 1,
}
COUNTS = {DENSE: np.array([4]), EXPERTS: np.array([7, 0, 3])}


def legacy(
    entries: dict[str, tuple[int, np.ndarray]], tail: bytes = b"", name_length: Callable[[bytes], int] = len
) -> bytes:
    parts = [struct.pack("<i", len(entries))]
    for name, (calls, values) in entries.items():
        data = name.encode()
        parts += [struct.pack("<i", name_length(data)), data, struct.pack("<ii", calls, values.size)]
        parts.append(values.astype("<f4").tobytes())
    return b"".join(parts) + tail


def weights(imatrix: Imatrix, name: str) -> np.ndarray:
    """Return the weights of a tensor [experts, columns], from where its entry says that they lie."""
    entry = imatrix.entries[name]
    with entry.file.open("rb") as file:
        file.seek(entry.offset)
        sums = np.frombuffer(file.read(entry.values * 4), "<f4").reshape(len(entry.counts), entry.columns)
    return np.stack([importance(row, count, entry.is_legacy) for row, count in zip(sums, entry.counts, strict=True)])


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, SUMS, COUNTS, datasets=["wiki.txt"], chunks=9, chunk_size=512)
    return path


def test_what_is_written_is_read_back(written: Path) -> None:
    imatrix = read_imatrix(written)
    assert (imatrix.datasets, imatrix.chunks) == (("wiki.txt",), 9)
    assert list(imatrix.entries) == [DENSE, EXPERTS]
    assert np.array_equal(weights(imatrix, DENSE), SUMS[DENSE] / np.float32(4))
    read = weights(imatrix, EXPERTS)
    assert np.array_equal(read[0], SUMS[EXPERTS][0] / np.float32(7))
    assert np.array_equal(read[1], np.ones(4))  # an expert that no token met
    assert np.array_equal(read[2], SUMS[EXPERTS][2] / np.float32(3))


def test_the_gguf_package_reads_what_is_written(written: Path) -> None:
    reader = GGUFReader(written)
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.datasets").contents() == ["wiki.txt"]
    assert reader.get_field("imatrix.chunk_count").contents() == 9
    assert reader.get_field("imatrix.chunk_size").contents() == 512
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert np.array_equal(tensors[EXPERTS + ".in_sum2"], SUMS[EXPERTS])
    assert np.array_equal(tensors[EXPERTS + ".counts"].reshape(-1), COUNTS[EXPERTS])


def test_the_legacy_form_divides_by_its_calls(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    tail = struct.pack("<ii", 33, 8) + b"calib.tx"
    path.write_bytes(legacy({DENSE: (4, SUMS[DENSE]), EXPERTS: (0, SUMS[EXPERTS])}, tail))
    imatrix = read_imatrix(path)
    assert (imatrix.datasets, imatrix.chunks) == (("calib.tx",), 33)
    assert np.array_equal(weights(imatrix, DENSE), SUMS[DENSE] / np.float32(4))
    assert np.array_equal(weights(imatrix, EXPERTS).reshape(3, 4), SUMS[EXPERTS])  # no call: as it stands


@pytest.mark.parametrize(
    "tail", [b"", struct.pack("<i", 5), struct.pack("<ii", 5, 0)], ids=["none", "chunks", "no name"]
)
def test_the_legacy_tail_may_be_missing(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy({DENSE: (1, SUMS[DENSE])}, tail))
    imatrix = read_imatrix(path)
    assert imatrix.datasets == ()
    assert imatrix.chunks == (5 if tail else 0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"", "extends past the end of the file", id="empty"),
        pytest.param(struct.pack("<i", -3), "the number of entries", id="negative count"),
        pytest.param(struct.pack("<i", 2**30), "the number of entries", id="absurd count"),
        pytest.param(b"\x89PNG\r\n\x1a\n" * 4, "the number of entries", id="another file"),
        pytest.param(legacy({DENSE: (1, SUMS[DENSE])}, name_length=lambda _: 2**30), "length of the name", id="name"),
        pytest.param(legacy({DENSE: (-1, SUMS[DENSE])}), "calls and values", id="negative calls"),
        pytest.param(legacy({DENSE: (1, SUMS[DENSE])})[:-1], "extends past the end of the file", id="truncated"),
        pytest.param(legacy({DENSE: (1, np.array([1, np.nan]))}), "value 1 is not a sum", id="NaN"),
        pytest.param(legacy({DENSE: (1, np.array([np.inf]))}), "value 0 is not a sum", id="infinite"),
        pytest.param(legacy({DENSE: (1, np.array([-1.0]))}), "value 0 is not a sum", id="negative"),
    ],
)
def test_damaged_legacy_files_are_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=says) as error:
        read_imatrix(path)
    assert "imatrix.dat" in str(error.value)
    assert "\n" not in str(error.value)


def make_gguf(path: Path, **changes: object) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.kv_data[0].clear()  # no architecture: it is no model
    if (kind := changes.get("kind", "imatrix")) is not None:
        writer.add_string("general.type", str(kind))
    if changes.get("datasets", True):
        writer.add_array("imatrix.datasets", ["d"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    tensors = {DENSE + ".in_sum2": SUMS[DENSE], DENSE + ".counts": np.array([[4]], np.float32)}
    tensors |= changes.get("tensors", {})  # type: ignore[arg-type]
    for name, values in tensors.items():
        if values is not None:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_of_the_gguf_package_is_read(tmp_path: Path) -> None:
    imatrix = read_imatrix(make_gguf(tmp_path / "i.gguf"))
    assert np.array_equal(weights(imatrix, DENSE), SUMS[DENSE] / np.float32(4))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param({"kind": "model"}, "not an importance matrix", id="a model"),
        pytest.param({"kind": None}, "not an importance matrix", id="no kind"),
        pytest.param({"datasets": False}, "imatrix.datasets is missing", id="no data sets"),
        pytest.param({"tensors": {DENSE + ".counts": None}}, r"counts' is missing", id="no counts"),
        pytest.param({"tensors": {DENSE + ".in_sum2": None}}, r"in_sum2' is missing", id="no sums"),
        pytest.param({"tensors": {"other": SUMS[DENSE]}}, "unknown", id="another tensor"),
        pytest.param({"tensors": {DENSE + ".in_sum2": SUMS[DENSE].astype(np.float16)}}, "another type", id="f16"),
        pytest.param({"tensors": {DENSE + ".counts": np.ones((3, 1), np.float32)}}, "do not belong", id="3 counts"),
        pytest.param({"tensors": {DENSE + ".counts": np.array([[-1]], np.float32)}}, "not counts", id="count -1"),
        pytest.param({"tensors": {DENSE + ".counts": np.array([[np.nan]], np.float32)}}, "not counts", id="count NaN"),
        pytest.param({"tensors": {DENSE + ".in_sum2": -SUMS[DENSE]}}, "is not a sum of squares", id="negative sum"),
    ],
)
def test_damaged_gguf_files_are_refused(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    with pytest.raises(FileFormatError, match=says):
        read_imatrix(make_gguf(tmp_path / "i.gguf", **changes))


@pytest.mark.parametrize(
    ("sums", "count", "is_legacy"),
    [([0, 0], 5, True), ([0, 0], 0, True), ([0, 0], 5, False), ([0, 1e-45], 5, True)],
    ids=["legacy", "legacy without calls", "gguf", "too small"],
)
def test_columns_without_any_importance_count_alike(sums: list[float], count: int, is_legacy: bool) -> None:
    assert importance(np.float32(sums), count, is_legacy).tolist() == [1, 1]
    assert importance(np.float32([0, 3]), count, is_legacy=True).tolist() == [0, np.float32(3) / max(1, count)]


def test_matrices_without_any_importance_are_named(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    name = "blk.0.ffn_down_exps.weight"
    sums = np.ones((3, 64), np.float32)
    sums[1] = 0
    path = tmp_path / "i.dat"
    path.write_bytes(legacy({name: (4, sums.reshape(-1)), DENSE: (4, np.ones(8, np.float32))}))
    matrix = read_imatrix(path)
    assert matrix.with_zeros == {name}
    assert without_importance(matrix.entries[name], 3) == [1]
    source = make_checkpoint(layers=1, experts=3, overrides={"moe_intermediate_size": 64})
    experts = [w for w in open_folder(source).weights.values() if w.expert is not None and w.row.name == "w2.weight"]
    maker = LowBitMaker(imatrix_file=str(path))
    maker.__dict__["quantiser"] = SimpleNamespace(check=lambda name: None, path=path)
    maker.segments(name, name, [weight for weight in experts if not weight.is_draft], BY_NAME["q4_0"])
    what = "importance of 0 for all columns of 1 matrix, which count alike"
    assert maker.notes()[0] == f"{what}: {name}, expert 1"


def test_missing_files_folders_and_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("none", ".", "pipe"):
        with pytest.raises(InputMissingError):
            read_imatrix(tmp_path / name)


@pytest.mark.parametrize("seed", range(40))
def test_mutated_files_end_in_one_line(tmp_path: Path, written: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    content = bytearray(
        written.read_bytes() if seed % 2 else legacy({DENSE: (4, SUMS[DENSE])}, struct.pack("<ii", 1, 0))
    )
    for _ in range(3):
        content[generator.integers(len(content))] = generator.integers(256)
    path = tmp_path / "mutated"
    path.write_bytes(bytes(content[: generator.integers(1, len(content) + 1)]))
    caught = None
    try:
        read_imatrix(path)
    except Dsv4Error as error:
        caught = error
    assert "\n" not in str(caught)
