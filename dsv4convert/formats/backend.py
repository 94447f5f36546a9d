"""The sets of codecs to choose from: numpy, which always works, and its compiled twins."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache

from dsv4convert.errors import escape_control
from dsv4convert.formats import bf16, e2m1, e4m3, mxfp4, q8_0
from dsv4convert.formats.base import TileFunction

# Set to 0 to stay with numpy although llvmlite is installed.
COMPILED_VARIABLE = "DSV4CONVERT_COMPILED"

COMPILED = "compiled"

# Loading and compiling costs more than a smaller conversion takes.
COMPILED_FROM_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Codecs:
    """One function per conversion of a tile; their arguments are those of the numpy functions they name."""

    name: str
    fp8_to_f32: TileFunction = e4m3.fp8_to_f32
    fp8_to_bf16: TileFunction = e4m3.fp8_to_bf16
    fp8_to_f16: TileFunction = e4m3.fp8_to_f16
    fp8_to_q8_0: TileFunction = q8_0.fp8_to_q8_0
    fp4_to_f32: TileFunction = e2m1.fp4_to_f32
    fp4_to_bf16: TileFunction = e2m1.fp4_to_bf16
    fp4_to_f16: TileFunction = e2m1.fp4_to_f16
    fp4_to_fp8: TileFunction = e2m1.fp4_to_fp8
    fp4_to_fp8_scales: TileFunction = e2m1.fp4_to_fp8_scales
    fp4_to_mxfp4: TileFunction = mxfp4.fp4_to_mxfp4
    fp4_to_q8_0: TileFunction = q8_0.fp4_to_q8_0
    f32_to_bf16: TileFunction = bf16.f32_to_bf16
    f32_to_f16: TileFunction = bf16.f32_to_f16
    f32_to_q8_0: TileFunction = q8_0.f32_to_q8_0
    f32_to_mxfp4: TileFunction = mxfp4.f32_to_mxfp4
    bf16_to_f32: TileFunction = bf16.bf16_to_f32
    bf16_to_f16: TileFunction = bf16.bf16_to_f16
    bf16_to_q8_0: TileFunction = q8_0.bf16_to_q8_0
    bf16_to_mxfp4: TileFunction = mxfp4.bf16_to_mxfp4
    f16_to_f32: TileFunction = bf16.f16_to_f32
    f16_to_bf16: TileFunction = bf16.f16_to_bf16
    mxfp4_to_f32: TileFunction = mxfp4.mxfp4_to_f32
    q8_0_to_f32: TileFunction = q8_0.q8_0_to_f32
    i64_to_i32: TileFunction = bf16.i64_to_i32


CODEC_NAMES = tuple(field.name for field in fields(Codecs) if field.name != "name")


@cache
def numpy_codecs() -> Codecs:
    """Return the numpy codecs."""
    return Codecs("numpy")


def compiled_available() -> bool:
    """True when llvmlite is installed and not switched off by DSV4CONVERT_COMPILED=0; imports nothing."""
    return os.environ.get(COMPILED_VARIABLE, "1") != "0" and importlib.util.find_spec("llvmlite") is not None


@cache
def compiled_codecs() -> Codecs:
    """Return the compiled twins; a conversion without one stays with numpy. Imports llvmlite.

    An installed llvmlite that does not import, or knows no code for this processor, costs speed and a
    warning, not the conversion.
    """
    try:
        from dsv4convert.formats import compiled
    except Exception as error:  # noqa: BLE001 - llvmlite raises what it likes: ImportError, RuntimeError, OSError
        reason = escape_control(f"{type(error).__name__}: {error}")
        warnings.warn(f"llvmlite does not work ({reason}); converting with numpy, slower", RuntimeWarning, stacklevel=2)
        return numpy_codecs()
    return Codecs(COMPILED, **compiled.TWINS)


def prepare_codecs(codecs: Codecs, names: Iterable[str]) -> None:
    """Make ready what the named functions need; for numpy that is nothing."""
    if codecs.name == COMPILED:
        from dsv4convert.formats import compiled

        compiled.prepare(names)


def prepare_beside(names: Sequence[str]) -> threading.Thread:
    """Compile the named twins in a thread of its own, while the caller plans; needs them ``compiled_available``.

    LLVM takes 100 MiB and more while it compiles, and has let go of them by the time that the plan of a large
    model is made. Nobody need wait for the thread: whoever calls a kernel waits for that.
    """

    def prepare() -> None:
        # What goes wrong here goes wrong again where it matters, and is told there.
        with contextlib.suppress(Exception):
            prepare_codecs(compiled_codecs(), names)

    thread = threading.Thread(target=prepare, daemon=True)
    thread.start()
    return thread
