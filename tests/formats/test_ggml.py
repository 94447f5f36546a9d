"""ggml's types and its quantisers, held against the gguf package and against the library's own functions."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from dsv4convert.errors import DeviceError
from dsv4convert.formats import ggml
from dsv4convert.formats.ggml import Quantiser, find_quantiser
from dsv4convert.formats.ggml_decode import dequantise
from dsv4convert.formats.ggml_types import BY_NAME, FALLBACK, GGML_TYPES, QUANTISED, fitting_type

ROWS, COLUMNS = 6, 512
# The gguf package does not know q2_0, and has another q8_1 than ggml: its two scales are float16.
NOT_IN_GGUF = {42: (64, 18)}
OTHER_IN_GGUF = {9: (32, 36)}


@pytest.fixture(scope="module")
def quantiser() -> Quantiser:
    pytest.importorskip("llama_cpp")
    return find_quantiser()


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return np.random.default_rng(7).standard_normal((ROWS, COLUMNS), dtype=np.float32)


def quantised(quantiser: Quantiser, name: str, values: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    rows, columns = values.shape
    out = np.full((rows, BY_NAME[name].row_bytes(columns)), 0xA5, np.uint8)
    quantiser.quantise(name, values, out, importance)
    return out


def test_every_type_has_the_sizes_of_the_gguf_package() -> None:
    theirs = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()} | OTHER_IN_GGUF
    ours = {number: (kind.elements, kind.nbytes) for number, kind in GGML_TYPES.items()}
    assert ours == theirs | NOT_IN_GGUF
    assert {kind.name for kind in GGML_TYPES.values()} == {
        *(kind.name.lower() for kind in gguf.GGML_QUANT_SIZES),
        "q2_0",
    }
    assert all(number == kind.number for number, kind in GGML_TYPES.items())


def test_every_type_is_the_librarys(quantiser: Quantiser) -> None:
    """Numbers that the library has and the table has not are retired ones, whose blocks have no elements."""
    library = ggml.ctypes.CDLL(quantiser.path)
    library.ggml_type_name.restype = ggml.ctypes.c_char_p
    library.ggml_blck_size.restype = ggml.ctypes.c_int64
    library.ggml_type_size.restype = ggml.ctypes.c_size_t
    for number in range(max(GGML_TYPES) + 1):
        elements, nbytes = library.ggml_blck_size(number), library.ggml_type_size(number)
        if number not in GGML_TYPES:
            assert elements == 0, number
            continue
        kind = GGML_TYPES[number]
        assert library.ggml_type_name(number).decode().lower() == kind.name
        assert (elements, nbytes) == (kind.elements, kind.nbytes)
        if kind.name in QUANTISED:
            quantiser.check(kind.name)


def test_a_library_without_a_type_is_refused_by_name(quantiser: Quantiser, monkeypatch: pytest.MonkeyPatch) -> None:
    """As releases before the type was added: bytes after the table of types, which are no sizes."""
    other = Quantiser(quantiser.path)
    monkeypatch.setattr(other, "_size", lambda number: 0)
    with pytest.raises(DeviceError, match=r"does not have q2_0 .* expected 18 bytes for 64 elements, got 0 for 64;"):
        other.quantise("q2_0", np.zeros((1, 64), np.float32), np.zeros((1, 18), np.uint8))


@pytest.mark.parametrize("name", QUANTISED)
def test_fallbacks_fit_rows_of_a_multiple_of_32(name: str) -> None:
    kind = BY_NAME[name]
    assert fitting_type(kind, 4096) is kind
    assert 96 % fitting_type(kind, 96).elements == 0
    assert fitting_type(kind, 97).name == "f16"
    if name in FALLBACK:
        assert fitting_type(kind, 96).name == FALLBACK[name]


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_rows_decode_near_what_they_were(name: str, quantiser: Quantiser, values: np.ndarray) -> None:
    importance = np.ones(COLUMNS, np.float32)
    decoded = dequantise(name, quantised(quantiser, name, values, importance))
    error = np.sqrt(((decoded - values) ** 2).mean() / (values**2).mean())
    bits = BY_NAME[name].nbytes * 8 / BY_NAME[name].elements
    # A uniform quantiser's error halves with each bit; ternary types are coarser than their bits say.
    assert error < (1.0 if name.startswith("tq") or name == "q2_0" else 2.6 * 2.0**-bits + 0.02), (error, bits)
    assert error > 0


@pytest.mark.parametrize("name", QUANTISED)
def test_rows_are_quantised_by_themselves(name: str, quantiser: Quantiser, values: np.ndarray) -> None:
    importance = np.random.default_rng(3).random(COLUMNS, dtype=np.float32)
    whole = quantised(quantiser, name, values, importance)
    parts = [quantised(quantiser, name, values[at : at + 2].copy(), importance) for at in range(0, ROWS, 2)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_importance_changes_the_codes_and_helps_the_columns_that_it_names(
    quantiser: Quantiser, values: np.ndarray
) -> None:
    importance = np.where(np.arange(COLUMNS) % 32 < 4, 100.0, 0.01).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q2_K
    plain, weighted = (
        gguf.quants.dequantize(quantised(quantiser, "q2_k", values, weights), kind) - values
        for weights in (None, importance)
    )
    named = np.arange(COLUMNS) % 32 < 4
    assert (weighted[:, named] ** 2).sum() < (plain[:, named] ** 2).sum()


def test_threads_quantise_side_by_side(quantiser: Quantiser, values: np.ndarray) -> None:
    expected = {name: quantised(quantiser, name, values, np.ones(COLUMNS, np.float32)) for name in QUANTISED}
    fresh = Quantiser(quantiser.path)
    wrong: list[str] = []

    def work(names: Iterator[str]) -> None:
        for name in names:
            if not np.array_equal(quantised(fresh, name, values, np.ones(COLUMNS, np.float32)), expected[name]):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(iter(QUANTISED),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("shape", "out", "importance"),
    [
        pytest.param((2, 128), (2, 72), None, id="half a block"),
        pytest.param((2, 256), (2, 143), None, id="a short output"),
        pytest.param((2, 256), (2, 144), 128, id="too few weights of importance"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(
    quantiser: Quantiser, shape: tuple[int, int], out: tuple[int, int], importance: int | None
) -> None:
    weights = None if importance is None else np.ones(importance, np.float32)
    with pytest.raises(ValueError, match="q4_k"):
        quantiser.quantise("q4_k", np.zeros(shape, np.float32), np.zeros(out, np.uint8), weights)


def test_a_missing_library_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(DeviceError, match=r"; run pip install 'dsv4convert\[lowbit\]', or pass --ggml-lib PATH"):
        find_quantiser()


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="no such library"):
        find_quantiser(tmp_path / "libggml-base.so")
    fake = tmp_path / "libggml-base.so"
    fake.write_bytes(b"not a library")
    for path in (fake, tmp_path):
        with pytest.raises(DeviceError, match="cannot be used"):
            find_quantiser(path)


def test_a_pipe_is_no_library(tmp_path: Path) -> None:
    """Nobody waits for one; this one has bytes, for a program that reads it."""
    pipe = tmp_path / "libggml-base.so"
    os.mkfifo(pipe)
    with open(os.open(pipe, os.O_RDWR), "r+b", buffering=0) as end:
        end.write(bytes(4096))
        with pytest.raises(DeviceError, match="no such library"):
            find_quantiser(pipe)


def test_a_library_of_something_else_is_refused() -> None:
    libc = ggml.ctypes.util.find_library("c")
    assert libc is not None
    with pytest.raises(DeviceError, match="cannot be used"):
        Quantiser(libc)


def test_the_module_loads_no_library_by_itself() -> None:
    program = "import sys, dsv4convert.formats.ggml; print('llama_cpp' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
