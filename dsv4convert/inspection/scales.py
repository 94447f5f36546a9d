"""The exponents of scales, by family: counted in a few pieces of a few tensors, so that a description stays quick."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..containers.sources import at
from ..containers.untrusted import open_regular

# Tensors of a family and type that are looked into, spread evenly over all, and the scales that are read of each.
SAMPLED_TENSORS = 16
SAMPLED_SCALES = 4096


class _Format(NamedTuple):
    """Where a scale stands in its piece of ``stride`` bytes, the code of ``array`` that holds it, and its fields.

    The exponent is the field above ``mantissa`` bits, less ``bias``; its largest value is no number, and 0 is not
    normal where there is a mantissa.
    """

    stride: int
    code: str
    mantissa: int
    width: int
    bias: int


_E8M0 = _Format(1, "B", 0, 8, 127)
# By the type that stores them: dtypes of safetensors, and ggml types of which each block begins with its scale.
FORMATS = {
    "F8_E8M0": _E8M0,
    "F32": _Format(4, "I", 23, 8, 127),
    "BF16": _Format(2, "H", 7, 8, 127),
    "F16": _Format(2, "H", 10, 5, 15),
    "mxfp4": _E8M0._replace(stride=17),
    "q8_0": _Format(34, "H", 10, 5, 15),
}


class Scales(NamedTuple):
    """The scales of one tensor: its family, the type that stores them, and the bytes of all of them in a file."""

    family: str
    type: str
    file: Path
    offset: int
    nbytes: int


@dataclass
class ScaleCounts:
    """How often each exponent was found among the scales of a family; scales lie from 2^e up to 2^(e+1).

    ``tensors`` have such scales, ``sampled`` of them were counted. ``other`` are zeros, NaN and the like.
    """

    family: str
    type: str
    tensors: int
    sampled: int
    other: int
    exponents: dict[int, int]

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values; keys are texts there."""
        return {**self.__dict__, "exponents": {str(key): count for key, count in sorted(self.exponents.items())}}


def count_scales(scales: Iterable[Scales]) -> list[ScaleCounts]:
    """Return the exponents of a sample of scales, by family and type.

    What cannot be read is not counted, nor what lies elsewhere: a description goes on, and fetches headers alone.
    """
    groups: dict[tuple[str, str], list[Scales]] = {}
    for found in scales:
        if found.type in FORMATS:
            groups.setdefault((found.family, found.type), []).append(found)
    counts = []
    for (family, kind), tensors in groups.items():
        biased: Counter[int] = Counter()
        for found in spread(tensors, SAMPLED_TENSORS):
            biased.update(_biased_exponents(found, FORMATS[kind]))
        counts.append(_counted(family, kind, len(tensors), biased))
    return counts


def spread(items: Sequence[Scales], most: int) -> list[Scales]:
    """Return ``most`` items at most, evenly spread over all."""
    if len(items) <= most:
        return list(items)
    return [items[number * len(items) // most] for number in range(most)]


def _biased_exponents(found: Scales, form: _Format) -> Iterable[int]:
    """Return the exponents, as they are stored, of a tensor's first scales."""
    if at(found.file) is not None:
        return ()
    count = min(SAMPLED_SCALES, found.nbytes // form.stride)
    try:
        with open_regular(found.file) as file:
            raw = os.pread(file.fileno(), count * form.stride, found.offset)
    except OSError:
        return ()
    content = array("B", raw)
    whole = len(content) // form.stride * form.stride
    size = array(form.code).itemsize
    parts = [content[byte : whole : form.stride] for byte in range(size)]
    if size == 1:
        return parts[0]
    mask = 2**form.width - 1
    # Little-endian: the exponent lies in the last two bytes, of four or of two.
    shift = form.mantissa - 8 * (size - 2)
    return [((high << 8 | low) >> shift) & mask for low, high in zip(parts[-2], parts[-1], strict=True)]


def _counted(family: str, kind: str, tensors: int, biased: Counter[int]) -> ScaleCounts:
    form = FORMATS[kind]
    no_number = {2**form.width - 1} | ({0} if form.mantissa else set())
    exponents = {value - form.bias: count for value, count in biased.items() if value not in no_number}
    other = sum(biased[value] for value in no_number)
    return ScaleCounts(family, kind, tensors, biased.total(), other, exponents)
