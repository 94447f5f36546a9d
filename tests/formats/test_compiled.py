"""The codecs in C: each level's library against numpy on every ordinary input, its choice, and what calls refuse."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import xxhash

from dsv4convert.errors import DeviceError, LossyError
from dsv4convert.formats import e2m1, e4m3, mxfp4, q8_0
from dsv4convert.formats.backend import CODEC_NAMES, compiled_codecs, numpy_codecs
from dsv4convert.formats.base import GROUP, Scratch, Tally
from dsv4convert.formats.compiled import library
from dsv4convert.formats.compiled.library import FOLDER, Function, library_path, processor_levels
from dsv4convert.formats.not_finite import MAGNITUDES

from . import emulated
from .test_backend import tile

NUMPY = numpy_codecs()
BUILT = [level for level in processor_levels() if (FOLDER / f"codecs-{level}.so").is_file()]

needs_library = pytest.mark.skipif(not BUILT, reason="the compiled codecs are not built for this machine")


def twins_of(loaded: object, function: type[Function] = Function) -> ModuleType:
    """Return the twins bound to a library, or to what takes its place."""
    spec = importlib.util.find_spec("dsv4convert.formats.compiled.twins")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load_library", lambda: loaded)
        patch.setattr(library, "Function", function)
        spec.loader.exec_module(module)
    return module


EMULATED = "aarch64, emulated"
LEVELS = [*BUILT, *([EMULATED] if emulated.available() else [])]


@pytest.fixture(scope="module", params=LEVELS or [pytest.param("", marks=needs_library)])
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The twins of each level that this processor can run, and of AArch64 where QEMU is installed."""
    if request.param != EMULATED:
        yield twins_of(ctypes.CDLL(str(FOLDER / f"codecs-{request.param}.so")))
        return
    emulator = emulated.Emulator([*TWIN_NAMES, *SCANS], tmp_path_factory.mktemp("emulated"))
    yield twins_of(emulator, emulated.EmulatedFunction)
    emulator.close()


Result = tuple[list[bytes], Tally]


def result_of(codec: Callable[..., None], inputs: list, outputs: list[np.ndarray]) -> Result:
    """Return the bytes and the counts that a codec makes in memory that held something else."""
    made, tally = [np.full_like(out, 9) for out in outputs], Tally()
    codec(*inputs, *made, Scratch(), tally)
    return [out.tobytes() for out in made], tally


class Comparison:
    """Runs a twin and the numpy codec on the same input and compares bytes and counts; notes what fell back."""

    def __init__(self, twins: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fallbacks = 0
        self._numpy = getattr(NUMPY, name)
        self._twin = getattr(twins, name)
        module = sys.modules[self._numpy.__module__]

        def counted(*arguments: object) -> None:
            self.fallbacks += 1
            self._numpy(*arguments)

        monkeypatch.setattr(module, name, counted)

    def __call__(
        self, inputs: list, outputs: list[np.ndarray], what: object = "", expected: Result | None = None
    ) -> bool:
        """Compare with ``expected``, or with what numpy makes; return whether the C code did the tile itself."""
        before = self.fallbacks
        expected = expected or result_of(self._numpy, inputs, outputs)
        assert result_of(self._twin, inputs, outputs) == expected, what
        return self.fallbacks == before


@pytest.fixture
def comparison(twins: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Comparison]:
    return lambda name: Comparison(twins, name, monkeypatch)


# --- every ordinary input, and where fallbacks begin -------------------------------------------------------

FP8_CODES = np.array([code for code in range(256) if code & 0x7F != 0x7F] + [0, 0x80], np.uint8).reshape(2, 128)
FP4_BYTES = np.arange(256, dtype=np.uint8).reshape(2, 128)


@pytest.mark.parametrize(
    ("name", "dtype", "first", "last"),
    [
        # From the scale at which the smallest product, 2^-9 times it, is a normal float32.
        ("fp8_to_f32", np.float32, 127 - 126 + 9, e4m3.F32_LAST_SAFE_BYTE),
        ("fp8_to_bf16", np.uint16, 127 - 126 + 9, e4m3.F32_LAST_SAFE_BYTE),
        ("fp8_to_f16", np.float16, e4m3.F16_FIRST_EXACT_BYTE, e4m3.F16_LAST_SAFE_BYTE),
    ],
)
def test_every_fp8_code_at_every_scale(comparison, name: str, dtype: type, first: int, last: int) -> None:
    compare = comparison(name)
    ordinary = [
        byte
        for byte in range(256)
        if compare([FP8_CODES, np.full((1, 1), byte, np.uint8), (128, 128)], [np.empty((2, 128), dtype)], byte)
    ]
    assert ordinary == list(range(first, last + 1))


@pytest.mark.parametrize(
    ("name", "dtype", "first", "last"),
    [
        ("fp4_to_f32", np.float32, 1, e2m1.F32_LAST_SAFE_BYTE),
        ("fp4_to_bf16", np.uint16, 1, e2m1.F32_LAST_SAFE_BYTE),
        ("fp4_to_f16", np.float16, e2m1.F16_FIRST_EXACT_BYTE, e2m1.F16_LAST_SAFE_BYTE),
    ],
)
def test_every_fp4_byte_at_every_scale(comparison, name: str, dtype: type, first: int, last: int) -> None:
    compare = comparison(name)
    ordinary = [
        byte
        for byte in range(256)
        if compare([FP4_BYTES, np.full((2, 8), byte, np.uint8), (1, GROUP)], [np.empty((2, 256), dtype)], byte)
    ]
    assert ordinary == list(range(first, last + 1))


@pytest.mark.parametrize("name", ["fp8_to_f32", "fp8_to_bf16", "fp8_to_f16", "fp8_to_q8_0", "fp8_to_mxfp4"])
@pytest.mark.parametrize("nan", [0x7F, 0xFF])
def test_a_nan_code_anywhere_is_for_numpy(comparison, name: str, nan: int) -> None:
    compare = comparison(name)
    inputs, outputs = tile(name, 3, 160, seed=1)
    inputs[1][...] = 120
    assert compare(inputs, outputs)
    for place in (0, 31, 32, 159, 160, 479):
        weight = inputs[0].copy()
        weight.reshape(-1)[place] = nan
        assert not compare([weight, *inputs[1:]], outputs, place) or name == "fp8_to_q8_0"


def scales_with_a_finite_d(largest: np.ndarray) -> list[int]:
    """Return the scale bytes at which d neither vanishes nor is infinite, whichever magnitude is a block's largest."""
    with np.errstate(over="ignore"):
        d = [(largest.astype(np.float64) * 2.0 ** (byte - 127) / 127).astype(np.float16) for byte in range(255)]
    return [byte for byte, values in enumerate(d) if (values > 0).all() and np.isfinite(values).all()]


@cache
def pairs_of_fp8_codes() -> np.ndarray:
    """Return codes [127, 256]: row r's largest is r; column c holds c where that is no larger, with either sign."""
    largest = np.arange(0x7F, dtype=np.uint8)[:, None]
    column = np.arange(128, dtype=np.uint8)[None, :]
    weight = np.minimum(column, largest).repeat(2, axis=1)
    weight[:, 1::2] |= 0x80
    weight[:, ::GROUP] = largest
    return weight


# Codes with a largest that has an e2m1 scale among e4m3's normal numbers, 2^-6 and more, or with none.
MXFP4_LARGEST = [0, *range(0x15, 0x7F)]


@cache
def mxfp4_of_a_row(largest: int, byte: int) -> tuple[list, list[np.ndarray], Result]:
    """Return a row of codes up to ``largest`` at a scale, memory for its MXFP4, and what numpy makes of it, once."""
    row, out = pairs_of_fp8_codes()[largest], np.empty((1, 8 * mxfp4.BLOCK_BYTES), np.uint8)
    inputs = [row[None], np.full((1, 2), byte, np.uint8), (128, 128)]
    return inputs, [out], result_of(NUMPY.fp8_to_mxfp4, inputs, [out])


def test_fp8_to_mxfp4_of_every_pair_of_codes_at_every_scale(comparison) -> None:
    compare = comparison("fp8_to_mxfp4")
    for largest in range(0x7F):
        for byte in range(256):
            inputs, outputs, expected = mxfp4_of_a_row(largest, byte)
            done = compare(inputs, outputs, (largest, byte), expected)
            to = byte + max((largest >> 3) - 2 + (largest & 7 > 4), 1) - 7
            assert done == (largest in MXFP4_LARGEST and 10 <= byte <= 246 and (to >= 2 or largest == 0))


def test_fp8_to_mxfp4_of_every_value_of_a_block_with_a_six(comparison) -> None:
    """Blocks whose codes all have a half at twice the scale take that scale; one other code forbids it."""
    compare = comparison("fp8_to_mxfp4")
    scale, out = np.full((1, 1), 120, np.uint8), np.empty((1, mxfp4.BLOCK_BYTES), np.uint8)
    doubled = 0
    for largest in range(0x1C, 0x7F, 8):
        of_six = np.float32([0, 1, 2, 3, 4, 6]) / 6 * e4m3.decode_table()[largest]
        has_half = [code for code in range(largest + 1) if e4m3.decode_table()[code] in of_six]
        for code in range(largest + 1):
            weight = np.resize(np.array([*has_half, code | 0x80], np.uint8), (1, GROUP))
            assert compare([weight, scale, (1, GROUP)], [out], (largest, code))
            made = np.empty_like(out)
            mxfp4.fp8_to_mxfp4(weight, scale, (1, GROUP), made, Scratch(), Tally())
            assert (made[0, 0] == 120 + (largest >> 3) - 2 - 7 + 1) == (code in has_half)
            doubled += code in has_half
    assert doubled == 6 * 13


def test_fp8_to_q8_0_of_every_pair_of_codes_at_every_scale(comparison) -> None:
    weight = pairs_of_fp8_codes()
    compare = comparison("fp8_to_q8_0")
    out = np.empty((weight.shape[0], weight.shape[1] // GROUP * q8_0.BLOCK_BYTES), np.uint8)
    done = [byte for byte in range(256) if compare([weight, np.full((1, 2), byte, np.uint8), (128, 128)], [out], byte)]
    assert done == scales_with_a_finite_d(e4m3.decode_table()[1:0x7F])


def test_fp4_to_q8_0_of_every_pair_of_codes_at_every_scale(comparison) -> None:
    codes = np.minimum(np.arange(16) & 7, np.arange(8)[:, None]).astype(np.uint8)
    codes |= (np.arange(16) & 8).astype(np.uint8)
    codes = np.concatenate([codes, codes[:, ::-1]], axis=1)
    codes[:, 0] = np.arange(8)
    compare = comparison("fp4_to_q8_0")
    out = np.empty((8, q8_0.BLOCK_BYTES), np.uint8)
    done = [
        byte
        for byte in range(256)
        if compare([e2m1.pack_e2m1(codes), np.full((8, 1), byte, np.uint8), (1, GROUP)], [out], byte)
    ]
    assert done == scales_with_a_finite_d(e2m1.VALUES[1:8])


def test_fp4_to_mxfp4_of_every_byte_at_every_scale(comparison) -> None:
    compare = comparison("fp4_to_mxfp4")
    for byte in range(256):
        assert compare([FP4_BYTES, np.full((2, 8), byte, np.uint8)], [np.empty((2, 8 * 17), np.uint8)], byte)


def test_fp4_to_fp8_of_every_byte_at_every_pair_of_scales(comparison) -> None:
    """One group gives the tile its scale; the others lie below it by up to 20 powers of two."""
    compare = comparison("fp4_to_fp8")
    outputs = [np.empty((2, 256), np.uint8), np.empty((1, 2), np.uint8)]
    for top in range(256):
        for below in range(min(top, 20) + 1):
            scale = np.full((2, 8), top - below, np.uint8)
            scale[0, ::4] = top
            lift = top - below - max(top - 6, 0)
            assert compare([FP4_BYTES, scale], outputs, (top, below)) == (top < 255 and lift >= -5)


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (129, 5), (257, 1023)])
def test_fp8_scales_of_fp4_scales(comparison, shape: tuple[int, int]) -> None:
    compare = comparison("fp4_to_fp8_scales")
    scale = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    tiles = np.empty((-(-shape[0] // 128), -(-shape[1] // 4)), np.uint8)
    assert compare([scale], [tiles])
    scale[-1, -1] = 255
    assert not compare([scale], [tiles])


def exponents(bits: int, mantissa_bits: int) -> np.ndarray:
    """Every value of a 16-bit float, [sign and exponent, mantissa]."""
    values = np.arange(1 << bits, dtype=np.uint16)
    return values.reshape(-1, 1 << mantissa_bits)


@pytest.mark.parametrize("name", ["bf16_to_f32", "bf16_to_f16"])
def test_every_bf16(comparison, name: str) -> None:
    compare = comparison(name)
    dtype = np.float16 if name.endswith("f16") else np.float32
    # The rows of one exponent: whole tiles of ordinary values and of others.
    done = [compare([row[None]], [np.empty((1, 128), dtype)], row[0]) for row in exponents(16, 7)]
    last = 127 + 15 if name == "bf16_to_f16" else 254
    assert [number & 0xFF for number, ordinary in enumerate(done) if ordinary] == [
        exponent for _ in range(2) for exponent in range(last + 1)
    ]


@pytest.mark.parametrize(("name", "dtype"), [("f16_to_f32", np.float32), ("f16_to_bf16", np.uint16)])
def test_every_f16(comparison, name: str, dtype: type) -> None:
    compare = comparison(name)
    done = [compare([row[None].view(np.float16)], [np.empty((1, 1 << 10), dtype)], row[0]) for row in exponents(16, 10)]
    assert [number & 0x1F for number, ordinary in enumerate(done) if ordinary] == [*range(31), *range(31)]
    # Infinity alone is ordinary.
    assert compare([np.array([[np.inf, -np.inf]], np.float16)], [np.empty((1, 2), dtype)])


def near(mantissa_bits: int) -> np.ndarray:
    """Mantissas of a float32 about every rounding boundary of a shorter one, and some between."""
    step = 1 << (23 - mantissa_bits)
    kept = np.arange(1 << mantissa_bits, dtype=np.uint32) * step
    parts = [kept + offset for offset in (0, 1, step // 2 - 1, step // 2, step // 2 + 1, step - 1)]
    return np.concatenate(parts)


@pytest.mark.parametrize(("name", "kept", "dtype"), [("f32_to_bf16", 7, np.uint16), ("f32_to_f16", 10, np.float16)])
def test_f32_about_every_rounding_boundary(comparison, name: str, kept: int, dtype: type) -> None:
    compare = comparison(name)
    mantissas = near(kept)
    done = []
    for exponent in range(256):
        bits = mantissas | np.uint32(exponent << 23)
        values = np.concatenate([bits, bits | np.uint32(1 << 31)])[None].view(np.float32)
        done.append(compare([values], [np.empty(values.shape, dtype)], exponent))
    # The largest exponent of the output holds values that round to infinity.
    last = 253 if name == "f32_to_bf16" else 127 + 14
    assert [exponent for exponent, ordinary in enumerate(done) if ordinary] == list(range(last + 1))


@pytest.mark.parametrize("among", [0x3F800001, 0x00000001, 0x7F7F7FFF], ids=["ordinary", "subnormal", "largest"])
@pytest.mark.parametrize("sign", [0, 1 << 31], ids=["+", "-"])
def test_the_first_magnitude_that_rounds_to_infinity(comparison, among: int, sign: int) -> None:
    compare = comparison("f32_to_bf16")
    for bits, ordinary in ((0x7F7F7FFF, True), (0x7F7F8000, False), (0x7F800001, False)):
        values = np.full((5, 8001), among, np.uint32)
        values[-1, -1] = sign | bits
        assert compare([values.view(np.float32)], [np.empty(values.shape, np.uint16)], hex(bits)) == ordinary


@pytest.mark.parametrize("name", ["f32_to_f16", "bf16_to_f16"])
def test_subnormal_halves(comparison, name: str) -> None:
    """Every float16 below the normal ones, the halves of their steps, and what lies just beside those."""
    steps = np.arange(0, 1 << 12, dtype=np.float32) * np.float32(2.0**-26)
    bits = steps.view(np.uint32)
    values = np.concatenate([bits, bits + 1, np.maximum(bits, 1) - 1]).view(np.float32)[None]
    if name.startswith("bf16"):
        inputs = (values.view(np.uint32) >> 16).astype(np.uint16)
    else:
        inputs = np.concatenate([values, -values], axis=1)
    assert comparison(name)([inputs], [np.empty(inputs.shape, np.float16)])


def groups_of_exponent(exponent: int, rows: int, below: int, *, short: int, rng: np.random.Generator) -> np.ndarray:
    """Return the bits of float32 groups whose largest value has an exponent, the others up to so many below.

    Every other row has mantissas of the bits ``short`` only.
    """
    less = rng.integers(0, below, (rows, GROUP)).astype(np.int64)
    less[:, 0] = 0
    mantissa = rng.integers(0, 1 << 23, (rows, GROUP), dtype=np.uint32)
    mantissa[::2] &= np.uint32(short)
    bits = (np.maximum(exponent - less, 0).astype(np.uint32) << np.uint32(23)) | mantissa
    return bits | rng.integers(0, 2, (rows, GROUP), dtype=np.uint32) << np.uint32(31)


@pytest.mark.parametrize("target", ["q8_0", "mxfp4"])
@pytest.mark.parametrize("source", ["f32", "bf16"])
def test_blocks_of_floats_of_every_exponent(comparison, source: str, target: str) -> None:
    compare = comparison(f"{source}_to_{target}")
    rng = np.random.default_rng(0)
    block_bytes = {"q8_0": 34, "mxfp4": 17}[target]
    done = []
    for exponent in range(256):
        bits = groups_of_exponent(exponent, 32, 12, short=0x700000, rng=rng)
        values = bits.view(np.float32) if source == "f32" else (bits >> np.uint32(16)).astype(np.uint16)
        done.append(compare([values], [np.empty((32, block_bytes), np.uint8)], exponent))
    ordinary = [exponent for exponent, c in enumerate(done) if c]
    # d = amax / 127 must not vanish in float16 nor overflow; a scale lies between 2^-125 and 1.
    first, last = {"q8_0": (109, 148), "mxfp4": (4, 128)}[target]
    assert ordinary[0] in (first - 1, first)
    assert ordinary[-1] in (last, last + 1)
    assert ordinary == list(range(ordinary[0], ordinary[-1] + 1))


@pytest.mark.parametrize("target", ["fp8", "fp8_scales", "fp4", "fp4_scales"])
@pytest.mark.parametrize("source", ["f32", "bf16"])
def test_blocks_with_scales_of_every_exponent(comparison, source: str, target: str) -> None:
    name = f"{source}_to_{target}"
    compare = comparison(name)
    rng = np.random.default_rng(0)
    is_fp8 = "fp8" in target
    shape = {"fp8": (64, GROUP), "fp8_scales": (8, 2), "fp4": (64, 16)}.get(target, (64, 1))
    done = []
    for exponent in range(256):
        bits = groups_of_exponent(exponent, 64, 20, short=0x7C0000, rng=rng)
        values = bits.view(np.float32) if source == "f32" else (bits >> np.uint32(16)).astype(np.uint16)
        inputs = [values, *([(8, 16)] if is_fp8 else [])]
        if exponent == 255:
            with pytest.raises(LossyError, match="a NaN or infinite value cannot be quantised"):
                compare(inputs, [np.empty(shape, np.uint8)])
            continue
        done.append(compare(inputs, [np.empty(shape, np.uint8)], exponent))
    # Past a scale of 1, what is divided by FP4's may vanish.
    assert done == [name != "f32_to_fp4" or exponent <= 128 for exponent in range(255)]


@pytest.mark.parametrize("target", ["fp8", "fp4"])
def test_every_bf16_at_every_scale(comparison, target: str) -> None:
    """Every magnitude up to the largest that a scale is for, with either sign; FP4 in groups with that one in each."""
    compare = comparison(f"bf16_to_{target}")
    exponents, largest = {"fp8": (range(-22, 120), 448.0), "fp4": (range(-126, 126), 6.0)}[target]
    for exponent in exponents:
        bound = int(np.array(largest * 2.0**exponent, np.float32).view(np.uint32) >> 16)
        bits = np.arange(bound + 1, dtype=np.uint16)
        bits[::2] |= 0x8000
        if target == "fp8":
            inputs, outputs = [bits[None], (1, bits.size)], [np.empty((1, bits.size), np.uint8)]
        else:
            groups = np.full((-(-bits.size // (GROUP - 1)), GROUP), bound, np.uint16)
            groups[:, 1:].flat[: bits.size] = bits
            inputs, outputs = [groups], [np.empty((len(groups), GROUP // 2), np.uint8)]
        assert compare(inputs, outputs, exponent)


def test_bf16_blocks_of_more_elements_than_a_counter_holds_count_all(comparison) -> None:
    """Of 2^21 elements and more in a block, all are rounded, or are too small."""
    values = np.full((3, 2**20), 0x3F81, np.uint16)
    values[0, 0] = 0x4480
    assert comparison("bf16_to_fp8")([values, values.shape], [np.empty(values.shape, np.uint8)])
    assert comparison("bf16_to_fp4")([values], [np.empty((3, 2**19), np.uint8)])


def test_fp8_about_every_rounding_boundary(comparison) -> None:
    """Values about the boundaries of every e4m3 code, and the halves of subnormal steps, at scales of 1 and 2^-22."""
    compare = comparison("f32_to_fp8")
    codes = e4m3.decode_table()[:0x7F]
    between = (codes[1:].astype(np.float64) + codes[:-1]) / 2
    points = np.concatenate([codes, between]).astype(np.float32)
    points = np.concatenate([points, np.nextafter(points, np.float32(1e9)), np.nextafter(points, np.float32(-1))])
    points = points[(points >= 0) & (points <= 448)]
    for scale in (1.0, 2.0**-22, 2.0**40):
        values = np.concatenate([points, -points])[None] * np.float32(scale)
        assert compare([values, (1, values.size)], [np.empty(values.shape, np.uint8)], scale)


@pytest.mark.parametrize("shape", [(1, 32), (131, 352), (256, 96), (3, 160)])
@pytest.mark.parametrize("block", [(128, 128), (32, 32), (3, 64), (5, 40)])
def test_ragged_blocks_of_fp8(comparison, shape: tuple[int, int], block: tuple[int, int]) -> None:
    values = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    scales = np.empty((-(-shape[0] // block[0]), -(-shape[1] // block[1])), np.uint8)
    for source, elements in (("f32", values), ("bf16", (values.view(np.uint32) >> 16).astype(np.uint16))):
        assert comparison(f"{source}_to_fp8")([elements, block], [np.empty(shape, np.uint8)])
        assert comparison(f"{source}_to_fp8_scales")([elements, block], [scales])


@pytest.mark.parametrize("source", ["f32", "bf16"])
def test_every_block_of_few_codes_to_mxfp4(comparison, source: str) -> None:
    """Blocks of exact codes with every subset of magnitudes: the scale that is chosen, and its twice."""
    compare = comparison(f"{source}_to_mxfp4")
    subsets = np.arange(1 << 8)
    rows = []
    for subset in subsets:
        present = [code for code in range(8) if subset >> code & 1] or [0]
        rows.append(np.resize(e2m1.VALUES[np.array(present)], GROUP))
    values = np.array(rows, np.float32)
    values[:, ::3] *= -1
    for power in (-20, 0, 3):
        x = values * np.float32(2.0**power)
        inputs = x if source == "f32" else (x.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        done = compare([inputs], [np.empty((256, 17), np.uint8)], power)
        assert done == (power <= 0)


@pytest.mark.parametrize("name", ["f32_to_q8_0", "bf16_to_q8_0", "f32_to_mxfp4", "bf16_to_mxfp4"])
def test_zeros_are_ordinary(comparison, name: str) -> None:
    dtype = np.float32 if name.startswith("f32") else np.uint16
    out = np.empty((2, 3 * (34 if name.endswith("q8_0") else 17)), np.uint8)
    assert comparison(name)([np.zeros((2, 96), dtype)], [out])


# --- shapes and addresses ---------------------------------------------------------------------------------

TWIN_NAMES = [name for name in CODEC_NAMES if name not in ("i64_to_i32", "mxfp4_to_f32", "q8_0_to_f32")]
SCANS = ["any_u8", "any_u16", "any_u32"]


@needs_library
def test_the_twins_are_those_of_the_codecs() -> None:
    compiled, plain = compiled_codecs(), numpy_codecs()
    replaced = {
        name: getattr(compiled, name) for name in CODEC_NAMES if getattr(compiled, name) != getattr(plain, name)
    }
    assert sorted(replaced) == sorted(TWIN_NAMES)
    assert all(twin.__name__ == name for name, twin in replaced.items())
    assert all(f"`{module}.{name}`" in twin.__doc__ for name, twin in replaced.items() for module in _home(name))


def _home(name: str) -> list[str]:
    return [getattr(NUMPY, name).__module__.rsplit(".", 1)[-1]]


@pytest.mark.parametrize("name", TWIN_NAMES)
def test_ordinary_weights_of_any_shape_do_not_reach_numpy(comparison, name: str) -> None:
    compare = comparison(name)
    for number, shape in enumerate([(1, 32), (1, 160), (7, 96), (130, 416), (256, 2048)]):
        inputs, outputs = tile(name, *shape, seed=number)
        assert compare(inputs, outputs, shape)


@pytest.mark.parametrize("name", TWIN_NAMES)
@pytest.mark.parametrize("shape", [(0, 64), (3, 0)], ids=["no rows", "no columns"])
def test_empty_tiles(comparison, name: str, shape: tuple[int, int]) -> None:
    inputs, outputs = tile(name, *shape, seed=0)
    comparison(name)(inputs, outputs)


@pytest.mark.parametrize("name", ["fp8_to_f32", "fp8_to_bf16", "fp8_to_f16", "fp8_to_q8_0", "fp8_to_mxfp4"])
@pytest.mark.parametrize("block", [(128, 128), (1, 32), (64, 96), (3, 32), (1, 4096)])
def test_fp8_blocks_of_any_size(comparison, name: str, block: tuple[int, int]) -> None:
    inputs, outputs = tile(name, 131, 352, seed=3)
    scale = np.random.default_rng(4).integers(116, 124, (-(-131 // block[0]), -(-352 // block[1])), np.uint8)
    assert comparison(name)([inputs[0], scale, block], outputs)


@pytest.mark.parametrize(
    "name", ["fp8_to_f32", "fp8_to_bf16", "fp8_to_q8_0", "fp8_to_mxfp4", "fp4_to_bf16", "fp4_to_q8_0"]
)
def test_f32_scales_that_are_powers_of_two_are_ordinary(comparison, name: str) -> None:
    inputs, outputs = tile(name, 130, 416, seed=5)
    inputs[1] = np.ldexp(np.float32(1), inputs[1].astype(np.int32) - 127).astype(np.float32)
    compare = comparison(name)
    assert compare(inputs, outputs)
    inputs[1][0, 0] *= np.float32(1.5)
    assert not compare(inputs, outputs)


@pytest.mark.parametrize("name", TWIN_NAMES)
def test_arrays_may_lie_at_any_address(twins: ModuleType, name: str) -> None:
    def moved(array):
        if not isinstance(array, np.ndarray):
            return array
        memory = np.empty(array.nbytes + 1, np.uint8)[1:]
        memory[:] = np.frombuffer(array.tobytes(), np.uint8)
        return memory.view(array.dtype).reshape(array.shape)

    inputs, outputs = tile(name, 5, 352, seed=6)
    odd = [moved(out) for out in outputs]
    getattr(twins, name)(*inputs, *outputs, Scratch(), Tally())
    getattr(twins, name)(*map(moved, inputs), *odd, Scratch(), Tally())
    assert [out.tobytes() for out in odd] == [out.tobytes() for out in outputs]


@pytest.mark.parametrize("name", TWIN_NAMES)
def test_nothing_is_written_around_an_output(twins: ModuleType, name: str) -> None:
    inputs, outputs = tile(name, 131, 416, seed=7)
    fenced = []
    for out in outputs:
        memory = np.full(out.nbytes + 256, 0xA5, np.uint8)
        fenced.append((memory, memory[128 : 128 + out.nbytes].view(out.dtype).reshape(out.shape)))
    getattr(twins, name)(*inputs, *(inner for _, inner in fenced), Scratch(), Tally())
    for memory, inner in fenced:
        assert (memory[:128] == 0xA5).all()
        assert (memory[128 + inner.nbytes :] == 0xA5).all()


@needs_library
@pytest.mark.parametrize("name", [name for name in TWIN_NAMES if name.split("_")[0] in ("fp8", "fp4")])
def test_where_subnormals_are_flushed_results_are_exact_or_refused(name: str) -> None:
    torch = pytest.importorskip("torch")
    inputs, outputs = tile(name, 8, 128, seed=1)
    for scale in inputs:
        if isinstance(scale, np.ndarray) and scale.shape != inputs[0].shape:
            scale[...] = 3
    wanted = [out.copy() for out in outputs]
    getattr(NUMPY, name)(*inputs, *wanted, Scratch(), Tally())
    assert torch.set_flush_denormal(True)
    try:
        getattr(compiled_codecs(), name)(*inputs, *outputs, Scratch(), Tally())
    except DeviceError:
        return
    finally:
        torch.set_flush_denormal(False)
    assert [out.tobytes() for out in outputs] == [out.tobytes() for out in wanted]


# --- the library ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.so")), ids=lambda path: path.stem)
def test_the_library_is_that_of_the_source_and_needs_no_other(path: Path) -> None:
    data = path.read_bytes()
    digest = zlib.crc32(b"".join(source.read_bytes() for source in sorted(FOLDER.glob("*.c"))))
    assert f"{digest:08x}".encode() in data, f"{path.name} is older than its sources; run python hatch_build.py"
    if (nm := shutil.which("nm")) is None:
        pytest.skip("no nm")
    found = subprocess.run([nm, "-D", "--undefined-only", path], capture_output=True, text=True, check=True)
    assert found.stdout == ""
    assert b"libc.so" not in data


FLAGS_V2 = "fpu sse sse2 pni ssse3 cx16 sse4_1 sse4_2 popcnt lahf_lm"
FLAGS_V3 = f"{FLAGS_V2} movbe xsave avx f16c abm bmi1 avx2 bmi2 fma"
FLAGS_V4 = f"{FLAGS_V3} avx512f avx512dq avx512cd avx512bw avx512vl"


@pytest.mark.parametrize(
    ("flags", "levels"),
    [
        ("fpu sse sse2", []),
        (FLAGS_V2, ["x86_64_v2"]),
        (FLAGS_V2 + " avx avx2", ["x86_64_v2"]),
        (FLAGS_V3, ["x86_64_v3", "x86_64_v2"]),
        (FLAGS_V3 + " avx512f", ["x86_64_v3", "x86_64_v2"]),
        (FLAGS_V4, ["x86_64_v4", "x86_64_v3", "x86_64_v2"]),
        ("avx512f avx512dq avx512cd avx512bw avx512vl", []),
    ],
)
def test_levels_of_x86_64(flags: str, levels: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: none\n\nprocessor\t: 1\nflags\t\t: none\n")
    monkeypatch.setattr(library, "_CPUINFO", cpuinfo)
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    assert processor_levels() == levels


@pytest.mark.parametrize(
    ("system", "machine", "levels"),
    [("Linux", "aarch64", ["aarch64"]), ("Linux", "riscv64", []), ("Darwin", "arm64", []), ("Windows", "AMD64", [])],
)
def test_levels_of_other_machines(
    system: str, machine: str, levels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library.platform, "system", lambda: system)
    monkeypatch.setattr(library.platform, "machine", lambda: machine)
    assert processor_levels() == levels


def test_a_machine_that_does_not_tell_its_flags_has_no_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_CPUINFO", Path("/no/such/file"))
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    assert processor_levels() == []


def test_the_best_level_that_is_built_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    monkeypatch.setattr(library, "processor_levels", lambda: ["x86_64_v3", "x86_64_v2"])
    found = library.library_path.__wrapped__
    assert found() is None
    for level in ("x86_64_v2", "x86_64_v4", "x86_64_v3"):
        (tmp_path / f"codecs-{level}.so").touch()
        assert found() == tmp_path / ("codecs-x86_64_v3.so" if level == "x86_64_v3" else "codecs-x86_64_v2.so")


# --- calls ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def widen() -> Function:
    path = library_path()
    if path is None:
        pytest.skip("the compiled codecs are not built for this machine")
    return Function(ctypes.CDLL(str(path)), "bf16_to_f32", "u2 u4 n")


VALUES = np.arange(10, dtype=np.uint16)


@pytest.mark.parametrize(
    "wrong", [VALUES.astype(np.uint8), VALUES.astype(np.int16), VALUES[::2], np.zeros((2, 4), np.uint16).T]
)
def test_an_array_that_the_code_was_not_made_for_is_refused(widen: Function, wrong: np.ndarray) -> None:
    out = np.zeros(wrong.size, np.uint32)
    with pytest.raises(ValueError, match="bf16_to_f32: expected a contiguous array of uint16"):
        widen(wrong, out, wrong.size)


def test_too_few_arguments_are_refused(widen: Function) -> None:
    with pytest.raises(ValueError, match="zip"):
        widen(VALUES, np.zeros(10, np.uint32))


def test_results_are_signed(widen: Function) -> None:
    assert widen(np.full(1, 0x7FC0, np.uint16), np.zeros(1, np.uint32), 1) == -1


@pytest.mark.parametrize("name", TWIN_NAMES)
def test_an_output_of_another_shape_is_refused(twins: ModuleType, name: str) -> None:
    """C writes wherever it is told."""
    inputs, outputs = tile(name, 8, 128, seed=8)
    for number in range(len(outputs)):
        small = [
            out if k != number else np.empty((out.shape[0], out.shape[1] - 1), out.dtype)
            for k, out in enumerate(outputs)
        ]
        with pytest.raises(ValueError, match=r"shape|fill|expected|have"):
            getattr(twins, name)(*inputs, *small, Scratch(), Tally())


# --- values that are not finite ---------------------------------------------------------------------------


def _every_code(dtype: str) -> np.ndarray:
    """Every element of a type of one or two bytes; of float32 all upper halves, with lower halves at the ends."""
    high = np.arange(2**16, dtype="<u2")
    if dtype != "F32":
        return np.arange(256, dtype=np.uint8) if dtype.startswith("F8") else high
    return (high.astype("<u4")[:, None] << 16 | np.array([0, 1, 0x7FFF, 0x8000, 0xFFFF], "<u4")).reshape(-1)


@pytest.mark.parametrize("dtype", MAGNITUDES)
def test_every_code_is_found_or_passed_as_numpy_does(twins: ModuleType, dtype: str) -> None:
    """Each element alone between ones that are finite, at every place of a vector, and all of them together."""
    codes = _every_code(dtype)
    scratch = np.empty(codes.nbytes, np.uint8)
    bad = codes & MAGNITUDES[dtype].mask >= MAGNITUDES[dtype].least
    assert twins.count_not_finite(dtype, codes.view(np.uint8), scratch) == np.count_nonzero(bad)
    finite = codes[~bad]
    assert twins.count_not_finite(dtype, finite.view(np.uint8), scratch) == 0
    row = np.resize(finite, 131)
    for code in codes[bad][:: max(1, np.count_nonzero(bad) // 64)]:
        for place in (0, 1, 63, 64, 127, 128, 130):
            marked = row.copy()
            marked[place] = code
            assert twins.count_not_finite(dtype, marked.view(np.uint8), scratch) == 1, (code, place)


@pytest.mark.parametrize("dtype", MAGNITUDES)
def test_a_scan_stops_where_elements_end_and_begins_at_any_address(twins: ModuleType, dtype: str) -> None:
    kind = MAGNITUDES[dtype]
    size = np.dtype(kind.dtype).itemsize
    for count in range(200):
        memory = np.zeros(1 + count * size + size, np.uint8)
        memory[0] = memory[1 + count * size :] = 0xFF  # what lies around, and what is left of a last element
        for cut in range(size):
            content = memory[1 : 1 + count * size + cut]
            assert twins.count_not_finite(dtype, content, np.empty(len(content), np.uint8)) == 0


def test_types_without_such_values_have_none(twins: ModuleType) -> None:
    content = np.full(64, 0xFF, np.uint8)
    assert twins.count_not_finite("I8", content, content) == 0


# --- checksums --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS or [pytest.param("", marks=needs_library)])
def test_checksums_are_those_of_xxhash_whatever_the_pieces(level: str, tmp_path: Path) -> None:
    """Around every border of the format: stripes of 64 bytes, blocks of 1,024."""
    state, digest = np.zeros(27, np.uint64), np.zeros(16, np.uint8)
    names = ["xxh3_begin", "xxh3_update", "xxh3_digest"]
    if level == EMULATED:
        emulator = emulated.Emulator(names, tmp_path)
        loaded, function = emulator, emulated.EmulatedFunction
    else:
        loaded, function = ctypes.CDLL(str(FOLDER / f"codecs-{level}.so")), Function
    begin, update, end = (
        function(loaded, name, parameters) for name, parameters in zip(names, ("u8", "u8 u1 n", "u8 u1"), strict=True)
    )
    rng = np.random.default_rng(1)
    borders = [border + more for border in (256, 1024, 2048, 5 * 1024) for more in (-1, 0, 1, 63, 64, 65)]
    for size in (241, *borders, 2**20 + 77):
        data = rng.integers(0, 256, size, np.uint8)
        begin(state)
        done = 0
        while done < size:
            piece = data[done : done + int(rng.choice([1, 7, 63, 64, 65, 1000, 2**18]))]
            update(state, piece.copy(), piece.size)
            done += piece.size
        end(state, digest)
        assert digest.tobytes() == xxhash.xxh3_128_digest(data.tobytes()), size
