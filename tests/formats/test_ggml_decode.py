"""Low-bit blocks decode to the values of ggml's own decoder, for every type and any bytes."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from dsv4convert.formats.ggml import Quantiser, find_quantiser
from dsv4convert.formats.ggml_decode import dequantise
from dsv4convert.formats.ggml_types import BY_NAME, QUANTISED

BLOCKS = 300


class TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits`` of ggml.h."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


@pytest.fixture(scope="module")
def quantiser() -> Quantiser:
    pytest.importorskip("llama_cpp")
    return find_quantiser()


@pytest.mark.parametrize("name", QUANTISED)
def test_any_finite_blocks_decode_as_in_ggml(name: str, quantiser: Quantiser) -> None:
    library = ctypes.CDLL(quantiser.path)
    library.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
    kind = BY_NAME[name]
    to_float = library.ggml_get_type_traits(kind.number).contents.to_float
    raw = np.random.default_rng(5).integers(0, 256, (BLOCKS, kind.nbytes), dtype=np.uint8)
    expected = np.empty((BLOCKS, kind.elements), np.float32)
    for block, values in zip(raw, expected, strict=True):
        to_float(block.ctypes.data, values.ctypes.data, kind.elements)
    finite = np.isfinite(expected).all(axis=1)
    assert finite.sum() > BLOCKS // 2
    assert np.array_equal(dequantise(name, raw)[finite], expected[finite])


def test_rows_of_several_blocks_keep_their_shape() -> None:
    raw = np.zeros((3, 4 * BY_NAME["q2_0"].nbytes), np.uint8)
    raw.reshape(3, 4, -1)[:, :, :2] = np.frombuffer(np.float16(2).tobytes(), np.uint8)
    raw.reshape(3, 4, -1)[1, 2, 2] = 0b11_10_01_00
    values = dequantise("q2_0", raw)
    assert values.shape == (3, 256)
    assert values[1, 128:132].tolist() == [-2, 0, 2, 4]
    assert (values[0] == -2).all()
