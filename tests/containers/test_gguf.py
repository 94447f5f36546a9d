"""The GGUF header reader: what it gives, and that no malformed header gets past it or costs memory."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4convert.containers.gguf import GGML_TYPES, MAX_ELEMENTS, MAX_TENSORS, is_gguf, open_gguf, read_gguf_part
from dsv4convert.errors import Dsv4Error, FileFormatError, InputMissingError, UsageError

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, data: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + data


def info(name: str | bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """A tensor info; ``dims`` fastest first, as in the file."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def build(
    keys: list[bytes] = (),  # type: ignore[assignment]
    infos: list[bytes] = (),  # type: ignore[assignment]
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_keys: int | None = None,
    n_infos: int | None = None,
    alignment: int = 32,
) -> bytes:
    head = magic + struct.pack(
        "<IQQ", version, len(infos) if n_infos is None else n_infos, len(keys) if n_keys is None else n_keys
    )
    head += b"".join(keys) + b"".join(infos)
    return head.ljust(-(-len(head) // alignment) * alignment, b"\0") + data


ARCHITECTURE = key("general.architecture", STRING, text("deepseek4"))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(content: bytes, name: str = "model.gguf") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


Write = Callable[..., Path]


def test_every_value_type_and_the_tensors_are_read(write: Write) -> None:
    keys = [
        ARCHITECTURE,
        key("a.u8", U8, b"\xff"),
        key("a.i8", I8, b"\xff"),
        key("a.u16", U16, struct.pack("<H", 65535)),
        key("a.i16", I16, struct.pack("<h", -3)),
        key("a.u32", U32, struct.pack("<I", 2**32 - 1)),
        key("a.i32", I32, struct.pack("<i", -5)),
        key("a.f32", F32, struct.pack("<f", 0.1)),
        key("a.bool", BOOL, b"\x01"),
        key("a.u64", U64, struct.pack("<Q", 2**64 - 1)),
        key("a.i64", I64, struct.pack("<q", -7)),
        key("a.f64", F64, struct.pack("<d", 0.1)),
        key("a.texts", ARRAY, array(STRING, 3, text("") + text("Ġa") + text("x" * 300))),
        key("a.numbers", ARRAY, array(I32, 3, struct.pack("<3i", 4, -128, 0))),
        key("a.truths", ARRAY, array(BOOL, 2, b"\0\x01")),
        key("a.none", ARRAY, array(F32, 0, b"")),
    ]
    infos = [info("one", (5,), 0), info("two", (64, 3, 2), 39, 32), info("three", (1,), 26, 32 + 2 * 3 * 2 * 17 + 20)]
    data = bytes(32 + 2 * 3 * 2 * 17 + 20 + 32)
    model = open_gguf(write(build(keys, infos, data)))
    assert model.architecture == "deepseek4"
    assert model.metadata == {
        "general.architecture": "deepseek4",
        "a.u8": 255,
        "a.i8": -1,
        "a.u16": 65535,
        "a.i16": -3,
        "a.u32": 2**32 - 1,
        "a.i32": -5,
        "a.f32": float(np.float32(0.1)),
        "a.bool": True,
        "a.u64": 2**64 - 1,
        "a.i64": -7,
        "a.f64": 0.1,
        "a.texts": ["", "Ġa", "x" * 300],
        "a.numbers": [4, -128, 0],
        "a.truths": [False, True],
        "a.none": [],
    }
    assert [model.types[k] for k in ("a.f32", "a.texts", "a.none", "a.bool")] == ["f32", "[str]", "[f32]", "bool"]
    part = model.parts[0]
    two = model.tensors["two"]
    assert (two.type, two.shape, two.nbytes, two.offset) == ("mxfp4", (2, 3, 64), 2 * 3 * 2 * 17, part.data_start + 32)
    assert model.tensors["three"].offset + 4 == part.data_end
    assert model.files == (part.path,)


def test_types_and_sizes_are_those_of_the_gguf_package() -> None:
    theirs = {int(t): (t.name.lower(), *sizes) for t, sizes in GGML_QUANT_SIZES.items()}
    ours = {code: (kind.name, kind.elements, kind.nbytes) for code, kind in GGML_TYPES.items()}
    # ggml's block of Q8_1 has two halves beside its bytes since long; the package still has two floats.
    q8_1 = int(gguf.GGMLQuantizationType.Q8_1)
    assert (ours.pop(q8_1), theirs.pop(q8_1)) == (("q8_1", 32, 36), ("q8_1", 32, 40))
    assert {code: ours[code] for code in ours if code in theirs} == {c: theirs[c] for c in theirs if c in ours}
    assert {"f32", "f16", "bf16", "q8_0", "mxfp4", "i32"} <= {kind.name for kind in GGML_TYPES.values()}


def test_a_file_of_the_gguf_package_is_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "deepseek4")
    writer.add_uint32("deepseek4.block_count", 3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bb", "ccc"])
    values = np.arange(1, 4 * 33 + 1, dtype=np.float32).reshape(4, 33)
    writer.add_tensor("x.weight", values)
    writer.add_tensor("y.weight", values[:1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = open_gguf(path)
    assert model.metadata["tokenizer.ggml.tokens"] == ["a", "bb", "ccc"]
    tensor = model.tensors["x.weight"]
    stored = np.fromfile(path, np.float32, count=values.size, offset=tensor.offset).reshape(tensor.shape)
    assert np.array_equal(stored, values)


def test_gaps_are_all_bytes_outside_header_and_tensors(write: Write) -> None:
    content = build([ARCHITECTURE], [info("a", (3,), 0), info("b", (8,), 0, 32)], bytes(64 + 5))
    part = read_gguf_part(write(content))
    covered = part.header_end + sum(t.nbytes for t in part.tensors.values())
    assert covered + sum(end - start for start, end in part.gaps()) == len(content)
    assert list(part.gaps())[1] == (part.data_start + 12, part.data_start + 32)


F32_4 = [info("a", (4,), 0)]

# What is wrong, the file, and a part of the message.
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "magic extends past the end of the file"),
    "another_magic": (build(magic=b"GGML"), "not a GGUF file"),
    "version_1": (build(version=1), "unsupported version"),
    "big_endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "cut_in_the_counts": (b"GGUF\x03\0\0\0\0\0", "extends past the end of the file"),
    "more_keys_than_bytes": (build([ARCHITECTURE], n_keys=2), "has no name"),
    "2_63_keys": (build([ARCHITECTURE], n_keys=2**63), "number of keys"),
    "2_64_minus_1_tensors": (build([ARCHITECTURE], n_infos=2**64 - 1), "number of tensors"),
    "too_many_tensors": (build([ARCHITECTURE], n_infos=MAX_TENSORS + 1), "number of tensors"),
    "key_of_2_63_bytes": (build([struct.pack("<Q", 2**63)]), "too long"),
    "key_longer_than_the_file": (build([struct.pack("<Q", 60000) + b"abc"]), "extends past the end of the file"),
    "key_not_utf8": (build([key(b"a\xff", U8, b"\0")]), "not UTF-8"),
    "key_twice": (build([key("a", U8, b"\0"), key("a", U8, b"\0")]), "duplicate key 'a'"),
    "text_of_2_64_bytes": (build([key("a", STRING, struct.pack("<Q", 2**64 - 1))]), "extends past the end of the file"),
    "text_not_utf8": (build([key("a", STRING, text(b"\xc3\x28"))]), "not UTF-8"),
    "unknown_value_type": (build([key("a", 13, b"\0")]), "unknown value type"),
    "bool_of_2": (build([key("a", BOOL, b"\x02")]), "not a boolean"),
    "array_of_arrays": (build([key("a", ARRAY, array(ARRAY, 1, array(U8, 1, b"\0")))]), "nested arrays"),
    "array_of_unknown_type": (build([key("a", ARRAY, array(99, 1, b"\0"))]), "unknown value type"),
    "array_of_2_61_numbers": (build([key("a", ARRAY, array(U64, 2**61, b""))]), "more elements than the file"),
    "array_whose_bytes_overflow": (build([key("a", ARRAY, array(U64, 2**64 - 1, b""))]), "more elements"),
    "array_of_2_60_texts": (build([key("a", ARRAY, array(STRING, 2**60, b""))]), "more elements than the file"),
    "text_in_an_array_too_long": (
        build([key("a", ARRAY, array(STRING, 1, struct.pack("<Q", 2**62)))]),
        "element 0 extends past the end of the file",
    ),
    "text_in_an_array_not_utf8": (
        build([key("a", ARRAY, array(STRING, 2, text("x") + text(b"\xff")))]),
        "element 1: not UTF-8",
    ),
    "alignment_0": (build([key("general.alignment", U32, bytes(4))]), "power of two"),
    "alignment_48": (build([key("general.alignment", U32, struct.pack("<I", 48))]), "power of two"),
    "alignment_2_31": (build([key("general.alignment", U32, struct.pack("<I", 2**31))]), "power of two"),
    "alignment_text": (build([key("general.alignment", STRING, text("32"))]), "power of two"),
    "alignment_array": (build([key("general.alignment", ARRAY, array(U32, 1, bytes(4)))]), "power of two"),
    "tensor_name_too_long": (build([ARCHITECTURE], [info("n" * 64, (4,))], bytes(32)), "too long"),
    "tensor_name_not_utf8": (build([ARCHITECTURE], [info(b"\x80", (4,))], bytes(32)), "not UTF-8"),
    "tensor_twice": (build([], [info("a", (8,)), info("a", (8,), 0, 32)], bytes(64)), "duplicate tensor 'a'"),
    "no_dimension": (build([], [info("a", ())], bytes(32)), "number of dimensions"),
    "five_dimensions": (build([], [info("a", (1,) * 5)], bytes(32)), "number of dimensions"),
    "2_32_dimensions": (build([], [text("a") + struct.pack("<I", 2**32 - 1)]), "number of dimensions"),
    "dimension_0": (build([], [info("a", (4, 0))], bytes(32)), "dimensions"),
    "dimensions_that_overflow": (build([], [info("a", (2**32, 2**32))], bytes(32)), "within 63 bits"),
    "dimensions_that_overflow_to_0": (build([], [info("a", (2**63, 2))], bytes(32)), "within 63 bits"),
    "retired_type": (build([], [info("a", (32,), 4)], bytes(64)), "unknown type"),
    "unknown_type": (build([], [info("a", (32,), 2**31)], bytes(64)), "unknown type"),
    "row_that_is_no_multiple_of_the_block": (build([], [info("a", (33, 32), 8)], bytes(4096)), "row length"),
    "tensor_beyond_the_file": (build([], [info("a", (9,))], bytes(32)), "extends past the end of the file"),
    "billion_elements": (build([], [info("a", (10**9,))], bytes(32)), "extends past the end of the file"),
    "offset_beyond_the_file": (build([], [info("a", (8,), 0, 2**40)], bytes(32)), "gap or overlap before"),
    "offset_that_overflows": (build([], [info("a", (8,), 0, 2**64 - 32)], bytes(32)), "gap or overlap before"),
    "misaligned_offset": (build([], [info("a", (4,)), info("b", (4,), 0, 16)], bytes(64)), "gap or overlap before"),
    "overlap": (build([], [info("a", (16,)), info("b", (4,), 0, 32)], bytes(96)), "gap or overlap before"),
    "hole": (build([], [info("a", (4,)), info("b", (4,), 0, 64)], bytes(96)), "gap or overlap before"),
    "no_data": (build([ARCHITECTURE], F32_4), "extends past the end of the file"),
}


@pytest.mark.parametrize(("content", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_file_is_one_line(content: bytes, message: str, write: Write) -> None:
    path = write(content)
    with pytest.raises(FileFormatError) as caught:
        open_gguf(path)
    line = str(caught.value)
    assert message in line
    assert str(path) in line
    assert "\n" not in line
    assert len(line) < 1000


def test_names_with_control_characters_are_escaped_in_errors(write: Write) -> None:
    path = write(build([], [info("a\n\x1b[2J", (0,))], bytes(32)))
    with pytest.raises(FileFormatError) as caught:
        open_gguf(path)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match=r"none\.gguf"):
        open_gguf(tmp_path / "none.gguf")


def test_every_truncation_of_a_file_is_an_error(write: Write) -> None:
    content = build(
        [ARCHITECTURE, key("t", ARRAY, array(STRING, 2, text("ab") + text("cd")))],
        [info("a", (4, 2)), info("b", (32,), 8, 32)],
        bytes(32 + 34),
    )
    open_gguf(write(content))
    for length in range(len(content)):
        with pytest.raises(FileFormatError):
            open_gguf(write(content[:length]))


def test_a_vocabulary_of_130000_tokens_takes_a_second_at_most(write: Write) -> None:
    tokens = [f"tok{i}" for i in range(129_280)]
    merges = [f"a{i} b{i}" for i in range(127_000)]
    content = build(
        [
            ARCHITECTURE,
            key("tokens", ARRAY, array(STRING, len(tokens), b"".join(map(text, tokens)))),
            key("types", ARRAY, array(I32, len(tokens), struct.pack(f"<{len(tokens)}i", *range(len(tokens))))),
            key("merges", ARRAY, array(STRING, len(merges), b"".join(map(text, merges)))),
        ]
    )
    path = write(content)
    started = time.process_time()
    model = open_gguf(path)
    assert time.process_time() - started < 1.0
    assert model.metadata["tokens"] == tokens
    assert model.metadata["merges"] == merges


def test_crafted_lengths_in_a_large_sparse_file_cost_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    heads = {
        "text": build([key("a", STRING, struct.pack("<Q", 2**35))])[:64],
        "array": build([key("a", ARRAY, array(U8, 2**35, b""))])[:64],
        "elements": build([key("a", ARRAY, array(STRING, MAX_ELEMENTS + 1, b""))])[:64],
    }
    for head in heads.values():
        with path.open("wb") as file:
            file.write(head)
            file.truncate(2**40)
        tracemalloc.start()
        with pytest.raises(FileFormatError):
            open_gguf(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 64 * 2**20


def split_keys(number: int, count: int, tensors: int) -> list[bytes]:
    return [
        key("split.no", U16, struct.pack("<H", number)),
        key("split.count", U16, struct.pack("<H", count)),
        key("split.tensors.count", I32, struct.pack("<i", tensors)),
    ]


def write_split(write: Write, **changes: Any) -> list[Path]:
    """A model of three files with two tensors each."""
    paths = []
    for number in range(3):
        keys = split_keys(
            changes.get(f"no{number}", number), changes.get(f"count{number}", 3), changes.get("tensors", 6)
        )
        keys = [*([ARCHITECTURE] if number == 0 else []), *keys]
        infos = [info(changes.get(f"name{number}", f"t{number}.a"), (8,)), info(f"t{number}.b", (8,), 0, 32)]
        paths.append(write(build(keys, infos, bytes(64)), f"m-{number + 1:05d}-of-00003.gguf"))
    return paths


@pytest.mark.parametrize("given", [0, 1, 2, "folder"], ids=["first", "second", "third", "folder"])
def test_a_split_model_is_found_from_any_of_its_files(given: int | str, write: Write) -> None:
    paths = write_split(write)
    model = open_gguf(paths[given] if isinstance(given, int) else paths[0].parent)
    assert model.files == tuple(paths)
    assert list(model.tensors) == ["t0.a", "t0.b", "t1.a", "t1.b", "t2.a", "t2.b"]
    assert model.tensors["t1.b"].file == paths[1]
    assert model.architecture == "deepseek4"


def test_a_missing_split_is_named(write: Write) -> None:
    paths = write_split(write)
    paths[1].unlink()
    with pytest.raises(InputMissingError, match="m-00002-of-00003"):
        open_gguf(paths[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no1": 2}, "split.no contradicts the file name"),
        ({"count2": 4}, "split.count contradicts the file name"),
        ({"tensors": 7}, "contradicts the number of tensors"),
        ({"name2": "t0.a"}, "duplicate tensor 't0.a'"),
    ],
    ids=["number", "count", "tensors", "duplicate"],
)
def test_splits_that_disagree_are_refused(changes: dict[str, Any], message: str, write: Write) -> None:
    with pytest.raises(FileFormatError, match=message):
        open_gguf(write_split(write, **changes)[0])


def test_a_split_under_another_name_says_which_name_it_should_have(write: Write) -> None:
    paths = write_split(write)
    renamed = paths[0].rename(paths[0].with_name("renamed.gguf"))
    with pytest.raises(FileFormatError, match=r"of-00003\.gguf"):
        open_gguf(renamed)


def test_a_folder_with_two_models_asks_for_a_file(write: Write, tmp_path: Path) -> None:
    write(build([ARCHITECTURE]), "one.gguf")
    write(build([ARCHITECTURE]), "mtp-one.gguf")
    with pytest.raises(UsageError, match=r"mtp-one\.gguf, one\.gguf"):
        open_gguf(tmp_path)


def test_gguf_is_told_by_magic_or_name(write: Write, tmp_path: Path) -> None:
    assert is_gguf(write(build(), "model.bin"))
    assert is_gguf(tmp_path / "not-there.gguf")
    assert not is_gguf(write(b"{}", "config.json"))
    assert not is_gguf(tmp_path)


GOOD = build(
    [ARCHITECTURE, key("n", U32, bytes(4)), key("t", ARRAY, array(STRING, 3, text("a") + text("b") + text("c")))],
    [info("a.weight", (32, 4), 39), info("b.weight", (4,), 0, 96)],
    bytes(96 + 32),
)


@settings(max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_headers_end_in_success_or_one_of_our_errors(data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["byte", "u64", "cut", "insert"]))
        if kind == "byte":
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "u64":
            content[at : at + 8] = struct.pack("<Q", data.draw(st.sampled_from([0, 1, 2**31, 2**32, 2**63, 2**64 - 1])))
        elif kind == "cut":
            del content[at : at + data.draw(st.integers(1, 40))]
            content = content or bytearray(b"G")
        else:
            content[at:at] = data.draw(st.binary(min_size=1, max_size=40))
    path = tmp_path / "mutated.gguf"
    path.write_bytes(content)
    part = None
    with suppress(Dsv4Error):
        part = read_gguf_part(path)
    if part is not None:
        assert all(tensor.offset + tensor.nbytes <= len(content) for tensor in part.tensors.values())
