"""The sets of codecs to choose from: numpy, which always works, and its compiled twins."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, fields
from functools import cache

from dsv4convert.errors import escape_control
from dsv4convert.formats import bf16, e2m1, e4m3, mxfp4, nvfp4, q8_0
from dsv4convert.formats.base import (
    BlockQuantiser,
    BlockwiseCodec,
    PlainCodec,
    RescalingCodec,
    ScaledCodec,
    SharingCodec,
    SharingScalesCodec,
    TileScalesCodec,
)
from dsv4convert.formats.compiled.library import library_path
from dsv4convert.formats.not_finite import NotFiniteCounter, count_not_finite

# Set to 0 to stay with numpy although the compiled codecs are there.
COMPILED_VARIABLE = "DSV4CONVERT_COMPILED"

NUMPY = "numpy"
COMPILED = "compiled"


@dataclass(frozen=True, slots=True)
class Codecs:
    """A function per conversion of a tile, and a counter; arguments are those of the numpy functions that they name."""

    name: str
    fp8_to_f32: ScaledCodec = e4m3.fp8_to_f32
    fp8_to_bf16: ScaledCodec = e4m3.fp8_to_bf16
    fp8_to_f16: ScaledCodec = e4m3.fp8_to_f16
    fp8_to_q8_0: ScaledCodec = q8_0.fp8_to_q8_0
    fp8_to_mxfp4: ScaledCodec = mxfp4.fp8_to_mxfp4
    fp4_to_f32: ScaledCodec = e2m1.fp4_to_f32
    fp4_to_bf16: ScaledCodec = e2m1.fp4_to_bf16
    fp4_to_f16: ScaledCodec = e2m1.fp4_to_f16
    fp4_to_fp8: RescalingCodec = e2m1.fp4_to_fp8
    fp4_to_fp8_scales: TileScalesCodec = e2m1.fp4_to_fp8_scales
    fp4_to_mxfp4: BlockwiseCodec = mxfp4.fp4_to_mxfp4
    fp4_to_nvfp4: SharingCodec = nvfp4.fp4_to_nvfp4
    fp4_to_nvfp4_scales: SharingScalesCodec = nvfp4.fp4_to_nvfp4_scales
    nvfp4_to_ggml: BlockwiseCodec = nvfp4.nvfp4_to_ggml
    fp4_to_q8_0: ScaledCodec = q8_0.fp4_to_q8_0
    f32_to_bf16: PlainCodec = bf16.f32_to_bf16
    f32_to_f16: PlainCodec = bf16.f32_to_f16
    f32_to_q8_0: PlainCodec = q8_0.f32_to_q8_0
    f32_to_mxfp4: PlainCodec = mxfp4.f32_to_mxfp4
    f32_to_fp8: BlockQuantiser = e4m3.f32_to_fp8
    f32_to_fp8_scales: BlockQuantiser = e4m3.f32_to_fp8_scales
    f32_to_fp4: PlainCodec = e2m1.f32_to_fp4
    f32_to_fp4_scales: PlainCodec = e2m1.f32_to_fp4_scales
    bf16_to_fp8: BlockQuantiser = e4m3.bf16_to_fp8
    bf16_to_fp8_scales: BlockQuantiser = e4m3.bf16_to_fp8_scales
    bf16_to_fp4: PlainCodec = e2m1.bf16_to_fp4
    bf16_to_fp4_scales: PlainCodec = e2m1.bf16_to_fp4_scales
    bf16_to_f32: PlainCodec = bf16.bf16_to_f32
    bf16_to_f16: PlainCodec = bf16.bf16_to_f16
    bf16_to_q8_0: PlainCodec = q8_0.bf16_to_q8_0
    bf16_to_mxfp4: PlainCodec = mxfp4.bf16_to_mxfp4
    f16_to_f32: PlainCodec = bf16.f16_to_f32
    f16_to_bf16: PlainCodec = bf16.f16_to_bf16
    mxfp4_to_f32: PlainCodec = mxfp4.mxfp4_to_f32
    q8_0_to_f32: PlainCodec = q8_0.q8_0_to_f32
    i64_to_i32: PlainCodec = bf16.i64_to_i32
    count_not_finite: NotFiniteCounter = count_not_finite


CODEC_NAMES = tuple(field.name for field in fields(Codecs) if field.name not in ("name", "count_not_finite"))


@cache
def numpy_codecs() -> Codecs:
    """Return the numpy codecs."""
    return Codecs(NUMPY)


def compiled_available() -> bool:
    """True when the library is built for this processor and not switched off by DSV4CONVERT_COMPILED=0."""
    return os.environ.get(COMPILED_VARIABLE, "1") != "0" and library_path() is not None


@cache
def compiled_codecs() -> Codecs:
    """Return the compiled twins; a conversion without one stays with numpy. Loads the library.

    A library that does not load costs speed and a warning, not the conversion.
    """
    try:
        from dsv4convert.formats.compiled import segments, twins

        segments.functions()
    except (OSError, AttributeError) as error:  # AttributeError: a function is missing
        reason = escape_control(str(error))
        warnings.warn(
            f"the compiled codecs do not load ({reason}); converting with numpy, slower", RuntimeWarning, stacklevel=2
        )
        return numpy_codecs()
    return Codecs(
        COMPILED,
        fp8_to_f32=twins.fp8_to_f32,
        fp8_to_bf16=twins.fp8_to_bf16,
        fp8_to_f16=twins.fp8_to_f16,
        fp4_to_f32=twins.fp4_to_f32,
        fp4_to_bf16=twins.fp4_to_bf16,
        fp4_to_f16=twins.fp4_to_f16,
        fp4_to_mxfp4=twins.fp4_to_mxfp4,
        fp4_to_nvfp4=twins.fp4_to_nvfp4,
        fp4_to_nvfp4_scales=twins.fp4_to_nvfp4_scales,
        nvfp4_to_ggml=twins.nvfp4_to_ggml,
        fp4_to_fp8_scales=twins.fp4_to_fp8_scales,
        fp4_to_fp8=twins.fp4_to_fp8,
        fp8_to_q8_0=twins.fp8_to_q8_0,
        fp8_to_mxfp4=twins.fp8_to_mxfp4,
        fp4_to_q8_0=twins.fp4_to_q8_0,
        f32_to_q8_0=twins.f32_to_q8_0,
        bf16_to_q8_0=twins.bf16_to_q8_0,
        f32_to_mxfp4=twins.f32_to_mxfp4,
        f32_to_fp8=twins.f32_to_fp8,
        f32_to_fp8_scales=twins.f32_to_fp8_scales,
        f32_to_fp4=twins.f32_to_fp4,
        f32_to_fp4_scales=twins.f32_to_fp4_scales,
        bf16_to_mxfp4=twins.bf16_to_mxfp4,
        bf16_to_fp8=twins.bf16_to_fp8,
        bf16_to_fp8_scales=twins.bf16_to_fp8_scales,
        bf16_to_fp4=twins.bf16_to_fp4,
        bf16_to_fp4_scales=twins.bf16_to_fp4_scales,
        f32_to_bf16=twins.f32_to_bf16,
        f32_to_f16=twins.f32_to_f16,
        bf16_to_f16=twins.bf16_to_f16,
        f16_to_bf16=twins.f16_to_bf16,
        bf16_to_f32=twins.bf16_to_f32,
        f16_to_f32=twins.f16_to_f32,
        count_not_finite=twins.count_not_finite,
    )


def default_codecs() -> Codecs:
    """Return the compiled codecs where they are available, else numpy's."""
    return compiled_codecs() if compiled_available() else numpy_codecs()


def describe_codecs() -> str:
    """Return which codecs conversions use here, in words, and why where they are numpy's."""
    path = library_path()
    if path is None:
        return "numpy codecs (the compiled ones are not built for this machine)"
    if not compiled_available():
        return f"numpy codecs ({COMPILED_VARIABLE}=0)"
    return f"compiled codecs ({path.stem.removeprefix('codecs-')})"
