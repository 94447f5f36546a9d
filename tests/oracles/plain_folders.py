"""A second, slow opinion: folders read by the safetensors package, values computed one rule at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import safe_open

Array = npt.NDArray[Any]

FP4_VALUES = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
INDEX = "model.safetensors.index.json"


class Counts(NamedTuple):
    """Elements of a tensor that did not come through, by kind."""

    nan: int
    overflow: int
    underflow: int
    changed: int


class Raw(NamedTuple):
    """A tensor as stored: safetensors dtype and the bytes in its shape."""

    dtype: str
    values: Array


def read_folder(folder: Path) -> dict[str, Raw]:
    """Return every tensor of a folder, found through its index if it has one."""
    index = folder / INDEX
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    return {name: raw for file in names for name, raw in read_file(folder / file)}


def read_file(path: Path) -> Iterator[tuple[str, Raw]]:
    """Yield the tensors of a file; torch, because the package knows no float8 in numpy."""
    import torch

    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            tensor = file.get_tensor(name)
            yield name, Raw(file.get_slice(name).get_dtype(), tensor.view(views[tensor.element_size()]).numpy())


def exact_values(weight: Raw, scale: Raw | None) -> Array:
    """Return the exact values of a weight in float64, NaN where a code or a scale says so."""
    if weight.dtype == "I8":
        codes = weight.values.view(np.uint8)
        pairs = np.stack([FP4_VALUES[codes & 0xF], FP4_VALUES[codes >> 4]], axis=-1)
        values = pairs.reshape(codes.shape[0], -1)
    else:
        values = weight.values.view(
            {
                "F8_E4M3": ml_dtypes.float8_e4m3fn,
                "BF16": ml_dtypes.bfloat16,
                "F16": np.float16,
                "F32": np.float32,
            }[weight.dtype]
        ).astype(np.float64)
    if scale is None:
        return values
    if scale.dtype == "F8_E8M0":
        factors = scale.values.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    else:
        factors = scale.values.view(np.float32).astype(np.float64)
    height, width = (1, 32) if weight.dtype == "I8" else (128, 128)
    spread = np.repeat(np.repeat(factors, height, axis=0), width, axis=1)
    with np.errstate(invalid="ignore"):
        return values * spread[: values.shape[0], : values.shape[1]]


def round_to(values: Array, dtype: str) -> Array:
    """Round float64 once, to nearest even, and return the result in float64."""
    with np.errstate(over="ignore", under="ignore"):
        if dtype == "F32":
            return values.astype(np.float32).astype(np.float64)
        if dtype == "F16":
            return values.astype(np.float16).astype(np.float64)
        # bfloat16 has 8 significant bits and no fewer than 2^-133 as its last place.
        _, exponent = np.frexp(values)
        last = np.ldexp(1.0, np.maximum(exponent - 8, -133))
        rounded = np.rint(values / last) * last
        largest = 255 * 2.0**120
        return np.where(np.abs(rounded) > largest, np.copysign(np.inf, rounded), rounded)


SMALLEST_NORMAL = {"F32": 2.0**-126, "BF16": 2.0**-126, "F16": 2.0**-14}


def bits(values: Array, dtype: str) -> Array:
    """Return the bit patterns of values that ``dtype`` holds exactly."""
    if dtype == "F32":
        return values.astype(np.float32).view(np.uint32)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def count_losses(exact: Array, dtype: str) -> Counts:
    """Return what rounding to ``dtype`` does to the elements."""
    rounded = round_to(exact, dtype)
    nan = np.isnan(exact)
    overflow = np.isinf(rounded) & ~nan
    differs = (rounded != exact) & ~nan & ~overflow
    under = differs & (np.abs(exact) < SMALLEST_NORMAL[dtype])
    return Counts(int(nan.sum()), int(overflow.sum()), int(under.sum()), int((differs & ~under).sum()))
