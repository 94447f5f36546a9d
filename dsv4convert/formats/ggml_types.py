"""ggml's element types: number, block length and block size of each, as GGUF files name them.

Source: ``enum ggml_type`` and the block structs of ggml's public headers. Blocks lie along a row; a row is a whole
number of blocks. The K types and most IQ types have super-blocks of 256 elements.
"""

from __future__ import annotations

from typing import NamedTuple


class GgmlType(NamedTuple):
    """An element type of ggml: ``nbytes`` for every ``elements`` consecutive elements of a row."""

    name: str
    number: int
    elements: int
    nbytes: int

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row of ``columns`` elements, a multiple of ``elements``."""
        return columns // self.elements * self.nbytes


# Numbers that are not here are retired or unknown.
GGML_TYPES: dict[int, GgmlType] = {
    kind.number: kind
    for kind in (
        GgmlType("f32", 0, 1, 4),
        GgmlType("f16", 1, 1, 2),
        GgmlType("q4_0", 2, 32, 18),
        GgmlType("q4_1", 3, 32, 20),
        GgmlType("q5_0", 6, 32, 22),
        GgmlType("q5_1", 7, 32, 24),
        GgmlType("q8_0", 8, 32, 34),
        GgmlType("q8_1", 9, 32, 36),
        GgmlType("q2_k", 10, 256, 84),
        GgmlType("q3_k", 11, 256, 110),
        GgmlType("q4_k", 12, 256, 144),
        GgmlType("q5_k", 13, 256, 176),
        GgmlType("q6_k", 14, 256, 210),
        GgmlType("q8_k", 15, 256, 292),
        GgmlType("iq2_xxs", 16, 256, 66),
        GgmlType("iq2_xs", 17, 256, 74),
        GgmlType("iq3_xxs", 18, 256, 98),
        GgmlType("iq1_s", 19, 256, 50),
        GgmlType("iq4_nl", 20, 32, 18),
        GgmlType("iq3_s", 21, 256, 110),
        GgmlType("iq2_s", 22, 256, 82),
        GgmlType("iq4_xs", 23, 256, 136),
        GgmlType("i8", 24, 1, 1),
        GgmlType("i16", 25, 1, 2),
        GgmlType("i32", 26, 1, 4),
        GgmlType("i64", 27, 1, 8),
        GgmlType("f64", 28, 1, 8),
        GgmlType("iq1_m", 29, 256, 56),
        GgmlType("bf16", 30, 1, 2),
        GgmlType("tq1_0", 34, 256, 54),
        GgmlType("tq2_0", 35, 256, 66),
        GgmlType("mxfp4", 39, 32, 17),
        GgmlType("nvfp4", 40, 64, 36),
        GgmlType("q1_0", 41, 128, 18),
        GgmlType("q2_0", 42, 64, 18),
    )
}
BY_NAME = {kind.name: kind for kind in GGML_TYPES.values()}

# The types that ggml_quantize_chunk makes and that no codec of ours does.
QUANTISED = (
    "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k",
    "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_nl", "iq4_xs",
    "tq1_0", "tq2_0", "nvfp4", "q1_0", "q2_0",
)  # fmt: skip

# What llama.cpp refuses to make without an importance matrix, embedding and output excepted.
NEED_IMPORTANCE = frozenset({"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs"})

# The type that llama.cpp takes where rows are no multiple of 256: one with blocks of 32.
FALLBACK = {
    **dict.fromkeys(
        ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"),
        "iq4_nl",
    ),
    **dict.fromkeys(("q2_k", "q3_k", "tq1_0", "tq2_0"), "q4_0"),
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}


def fitting_type(kind: GgmlType, columns: int) -> GgmlType:
    """Return the type that llama.cpp takes for rows of ``columns`` elements where ``kind`` is asked for.

    That is ``kind`` where its blocks fill a row, else its fallback, else F16.

    >>> fitting_type(BY_NAME["q4_k"], 4096).name, fitting_type(BY_NAME["q4_k"], 96).name
    ('q4_k', 'q5_0')
    >>> fitting_type(BY_NAME["q2_k"], 100).name
    'f16'
    """
    if columns % kind.elements:
        kind = BY_NAME[FALLBACK.get(kind.name, "f16")]
    return kind if columns % kind.elements == 0 else BY_NAME["f16"]
