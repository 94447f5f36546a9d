"""How files hold scales that are taken as E8M0 bytes or as float32: a closed set, which `containers.wide_scales` reads.

Scales of none of these forms lie as they are taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias


@dataclass(frozen=True, slots=True)
class PowersOfTwo:
    """E8M0 scales as floats of a safetensors dtype."""

    dtype: Literal["F32", "BF16"]


@dataclass(frozen=True, slots=True)
class Pairs:
    """E8M0 scales as e4m3 ones, each twice, times 2^``exponent``: FP4 in NVFP4's form."""

    exponent: int


@dataclass(frozen=True, slots=True)
class Floats:
    """Float32 scales as floats of a shorter safetensors dtype."""

    dtype: Literal["BF16", "F16"]


@dataclass(frozen=True, slots=True)
class Times:
    """Float32 scales as e4m3 ones, multiplied by a float32: NVFP4."""

    second: float


@dataclass(frozen=True, slots=True)
class Over:
    """Float32 scales as e4m3 ones, divided by a float32: NVFP4 of compressed-tensors."""

    second: float


ScaleForm: TypeAlias = PowersOfTwo | Pairs | Floats | Times | Over
