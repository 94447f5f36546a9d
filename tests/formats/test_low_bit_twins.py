"""The quantisers in C (``low_bit.c``) make the bytes of ggml's library, at every level of processor."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from dsv4convert.formats import ggml
from dsv4convert.formats.compiled.library import FOLDER, Function
from dsv4convert.formats.e2m1 import VALUES
from dsv4convert.formats.e4m3 import decode_table
from dsv4convert.formats.ggml import Quantiser, find_quantiser, sample
from dsv4convert.formats.ggml_types import BY_NAME, QUANTISED

from . import emulated
from .test_compiled import EMULATED, LEVELS, needs_library

Array = np.ndarray[Any, Any]

# The types that are made here, and how many equal steps lie between their lowest and their highest value.
STEPS = {"q4_0": 16, "q4_1": 15, "q5_0": 32, "q5_1": 31, "tq1_0": 2, "tq2_0": 2, "q2_0": 2, "q1_0": 1}
WITH_IMPORTANCE = ("tq1_0", "tq2_0", "q1_0", "q2_0")
COLUMNS = 1280  # of all types some blocks, and of the largest an odd number


@pytest.fixture(scope="module")
def quantiser() -> Quantiser:
    pytest.importorskip("llama_cpp")
    return find_quantiser()


@pytest.fixture(scope="module", params=LEVELS or [pytest.param("", marks=needs_library)])
def twin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Function]:
    name, parameters = "quantise_here", "n f4 u1 n n n n"
    if request.param != EMULATED:
        yield Function(ctypes.CDLL(str(FOLDER / f"codecs-{request.param}.so")), name, parameters)
        return
    emulator = emulated.Emulator([name], tmp_path_factory.mktemp("emulated"))
    yield emulated.EmulatedFunction(emulator, name, parameters)  # type: ignore[arg-type]
    emulator.close()


def made_here(twin: Function, name: str, values: Array, weights: int = 0) -> Array | None:
    """Return rows in a type as the twin makes them, None where it does not."""
    rows, columns = values.shape
    out = np.full((rows, BY_NAME[name].row_bytes(columns)), 0xA5, np.uint8)
    nbytes = twin(BY_NAME[name].number, values, out, 0, rows, columns, weights)
    assert nbytes in (0, out.nbytes)
    return out if nbytes else None


def check(twin: Function, quantiser: Quantiser, name: str, values: Array) -> None:
    """Check that the twin makes the library's bytes."""
    wanted = np.empty((len(values), BY_NAME[name].row_bytes(values.shape[1])), np.uint8)
    quantiser.quantise(name, values, wanted)
    made = made_here(twin, name, values)
    assert made is not None
    block = BY_NAME[name].nbytes
    wrong = np.flatnonzero((made != wanted).reshape(-1, block).any(axis=1))
    assert not len(wrong), (len(wrong), values.reshape(made.size // block, -1)[wrong[0]].tolist())


def in_blocks(name: str, blocks: Array) -> Array:
    """Return rows of the blocks of 32, whose values fill the larger blocks of a type in turn."""
    repeats = BY_NAME[name].elements // blocks.shape[1]
    return np.ascontiguousarray(np.tile(blocks, (1, repeats)), np.float32)


def normal(scale: float) -> Callable[[np.random.Generator], Array]:
    return lambda random: random.standard_normal((64, COLUMNS)) * scale


def spread(random: np.random.Generator) -> Array:
    """Every block of 32 has a scale of its own, down to where float16 has no bits left."""
    return random.standard_normal((64, COLUMNS)) * np.repeat(2.0 ** random.integers(-30, 8, (64, COLUMNS // 32)), 32, 1)


def sparse(random: np.random.Generator) -> Array:
    """Mostly zeros of both signs, in blocks and rows of nothing else, too."""
    values = np.where(random.random((64, COLUMNS)) < 0.02, random.standard_normal((64, COLUMNS)), 0.0)
    values[:8] = 0
    return values * random.choice([-1.0, 1.0], values.shape)


def one_sided(random: np.random.Generator) -> Array:
    values = np.abs(random.standard_normal((64, COLUMNS)))
    return np.concatenate([values, -values, values + 1, -values - 1])


def subnormal(random: np.random.Generator) -> Array:
    """Each block of 32 has one ordinary value."""
    values = random.integers(-(2**23), 2**23, (64, COLUMNS)) * 2.0**-149
    values[:, ::32] = random.standard_normal((64, COLUMNS // 32))
    return values


DATA = {
    "normal": normal(0.02),
    "large": normal(1000.0),
    "at the end of float16": normal(2.0**-24),
    "below float16": normal(2.0**-60),
    "small integers": lambda random: random.integers(-40, 41, (64, COLUMNS)),
    "two values": lambda random: random.choice([-0.75, 0.75], (64, COLUMNS)),
    "heavy tails": lambda random: np.clip(random.standard_cauchy((64, COLUMNS)), -3e4, 3e4),
    "spread": spread,
    "sparse": sparse,
    "one-sided": one_sided,
    "subnormal": subnormal,
    "alike": lambda random: np.repeat(random.standard_normal((64, 1)), COLUMNS, axis=1),
    "the sample": lambda random: sample(),
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", STEPS)
def test_rows_have_the_librarys_bytes(name: str, data: str, twin: Function, quantiser: Quantiser) -> None:
    values = np.asarray(DATA[data](np.random.default_rng(1)), np.float32)
    check(twin, quantiser, name, values)


@pytest.mark.parametrize("name", STEPS)
def test_all_fp4_triples_have_the_librarys_bytes(name: str, twin: Function, quantiser: Quantiser) -> None:
    """Whichever comes first of several largest magnitudes, or of zeros."""
    triples = np.stack(np.meshgrid(VALUES, VALUES, VALUES), axis=-1).reshape(-1, 3).astype(np.float32)
    check(twin, quantiser, name, in_blocks(name, np.tile(triples, 11)[:, :32]))


@pytest.mark.parametrize("name", STEPS)
def test_all_fp8_pairs_have_the_librarys_bytes(name: str, twin: Function, quantiser: Quantiser) -> None:
    values = decode_table().astype(np.float32)
    values = values[np.isfinite(values)]
    pairs = np.stack(np.meshgrid(values, values), axis=-1).reshape(-1, 2)
    check(twin, quantiser, name, in_blocks(name, np.tile(pairs, 16)))


@pytest.mark.parametrize("name", STEPS)
def test_ties_and_their_neighbours_have_the_librarys_bytes(name: str, twin: Function, quantiser: Quantiser) -> None:
    """Between lowest and highest value, every place halfway between two codes, and up to three floats around it."""
    random = np.random.default_rng(3)
    low, high = (np.float32(sign) * random.uniform(0.5, 2, 2048).astype(np.float32) for sign in (-1, 1))
    high = np.where(random.random(2048) < 0.5, -low, high)
    blocks = np.empty((2048, 32), np.float32)
    for number in range(STEPS[name]):
        step = (high - low) / STEPS[name]
        tie = (low + (np.float32(number) + np.float32(0.5)) * step).astype(np.float32)
        near = tie[:, None] * (1 + random.integers(-3, 4, (2048, 32)) * 2.0**-23)
        blocks[...] = near
        blocks[:, 5], blocks[:, 9] = low, high
        check(twin, quantiser, name, in_blocks(name, blocks))
        blocks[:, 5], blocks[:, 9] = high, low
        check(twin, quantiser, name, in_blocks(name, blocks))


@pytest.mark.parametrize("largest", [32 * 65520.0, 3e38, 2.0**-130], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_blocks_that_are_not_ordinary_are_the_librarys(name: str, largest: float, twin: Function) -> None:
    """Scales that float16 does not hold; a scale without a finite inverse, which Q1_0 does not want."""
    values = np.ones((2, COLUMNS), np.float32)
    values[1, -256:] = np.linspace(-largest, largest, 256)
    assert (made_here(twin, name, values) is None) == (largest > 1 or name != "q1_0")


def test_other_types_and_weights_that_count_are_the_librarys(twin: Function) -> None:
    values = np.ones((1, 256), np.float32)
    assert {name for name in QUANTISED if made_here(twin, name, values) is not None} == set(STEPS)
    assert {name for name in QUANTISED if made_here(twin, name, values, weights=1) is not None} == set(WITH_IMPORTANCE)


def test_no_rows_are_no_bytes(twin: Function) -> None:
    for name in STEPS:
        assert made_here(twin, name, np.empty((0, COLUMNS), np.float32)) is None


# --- which of both is called ------------------------------------------------------------------------------

CHUNK = ctypes.CFUNCTYPE(ctypes.c_size_t, *ggml.PARAMETERS)


def address_of(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize("name", QUANTISED)
def test_the_twin_is_called_for_what_it_makes(name: str, weighted: bool, quantiser: Quantiser) -> None:
    segments = pytest.importorskip("dsv4convert.formats.compiled.segments")
    if not LEVELS or LEVELS == [EMULATED]:
        pytest.skip("the compiled codecs are not built for this machine")
    twin = segments.low_bit_twin()
    made = name in (WITH_IMPORTANCE if weighted else STEPS)
    assert (quantiser.address(name, twin, weighted=weighted) == address_of(twin)) == made
    assert quantiser.address(name) != address_of(twin)


def test_a_library_with_other_bytes_is_called_itself(quantiser: Quantiser) -> None:
    """A single code of the sample differs; as does one that goes by weights where they did not count."""

    @CHUNK
    def other(kind: int, values: Any, out: int, first: int, rows: int, columns: int, weights: Any) -> int:
        made: int = quantiser._chunk(kind, values, out, first, rows, columns, weights)
        if weights or kind == BY_NAME["tq2_0"].number:
            ctypes.memset(out + made // 2, 0, 1)
        return made

    for name, weighted in (("tq2_0", False), ("tq1_0", True)):
        assert quantiser.address(name, other, weighted=weighted) == quantiser.address(name)
    assert quantiser.address("tq1_0", other) == address_of(other)


def test_a_twin_is_compared_once(quantiser: Quantiser) -> None:
    """An address is asked for with every expert that has an importance of its own."""
    calls: list[bool] = []

    @CHUNK
    def twin(kind: int, values: Any, out: int, first: int, rows: int, columns: int, weights: Any) -> int:
        calls.append(bool(weights))
        return 0

    for weighted in (True, False, True, False):
        assert quantiser.address("tq1_0", twin, weighted=weighted) == quantiser.address("tq1_0")
    assert calls == [True, False]
