"""A finished folder in MLX's layout: which words and scales hold which weights, and what config.json says of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.folder import Checkpoint, FolderHeaders
from ..checkpoint.weights import Weight
from ..containers.folder_names import INDEX_NAME
from ..containers.presence import is_file
from ..containers.safetensors import Stored
from ..model.mlx_names import mlx_name, mlx_shape
from ..model.tensors import Store
from .companions import (
    borne_out_config,
    check_config,
    check_file_metadata,
    check_files,
    check_index,
    without_draft,
)
from .compare import Piece
from .left_out import THE_DRAFT, is_left_out, without_absent_parts
from .matrix import Matrix, Scale, as_matrix, stored_matrix, weight_matrix
from .report import EXTRA, FILE, LAYOUT, Report

MLX_METADATA = {"format": "mlx"}

WORD_BITS = 32
GROUP = 32
# What a weight in words is in the published folders' types, by the bits of its codes, and MLX's name for it.
DTYPE_OF_BITS = {4: "I8", 8: "F8_E4M3"}
MODE_OF_ENCODING = {"fp4": (4, "mxfp4"), "fp8": (8, "mxfp8")}
AFFINE_GROUPS = (64, 32)
AFFINE_SOURCES = ("fp8", "fp8/f32", "bf16", "f16", "f32")
# What MLX may store a source's encoding as; others stay what they are.
ALLOWED = {"fp4": ("fp4",), "fp8": ("fp8", "bf16"), "fp8/f32": ("fp8", "bf16"), "i64": ("i32",)}


def mlx_pieces(folder: Path, headers: FolderHeaders, checkpoint: Checkpoint, report: Report) -> list[Piece]:
    """Return the pieces of a folder in MLX's layout, and report everything that does not belong or is missing."""
    stored, files, strays = headers
    for stray in strays:
        report.problem(FILE, folder, stray)
    check_file_metadata(files, report, MLX_METADATA)
    if is_file(folder / INDEX_NAME):
        check_index(folder / INDEX_NAME, stored, report)
    groups: dict[str, list[Weight]] = {}
    for weight in without_absent_parts(list(checkpoint.weights.values()), stored, report):
        name = mlx_name(weight.row, weight.prefix, checkpoint.config.version, is_expert=weight.expert is not None)
        groups.setdefault(name, []).append(weight)
    left = dict(stored)
    pieces: list[Piece] = []
    modes: dict[str, Any] = {}
    for name, weights in groups.items():
        path = name.removesuffix(".weight")
        words, scales, biases = (left.pop(part, None) for part in (name, f"{path}.scales", f"{path}.biases"))
        if words is None:
            report.missing(name, weights[0].name)
            continue
        shape = mlx_shape(weights[0].row, weights[0].shape, checkpoint.config.o_groups)
        if weights[0].expert is not None:
            shape = (len(weights), *shape)
        if biases is not None:
            matrix = _affine(name, words, scales, biases, shape, weights[0], report)
        else:
            matrix = _checked(name, words, scales, shape, weights[0], report)
        if matrix is None:
            continue
        if matrix.encoding == "affine8" and matrix.scale is not None:
            modes[path] = {"group_size": matrix.scale.block[1], "bits": 8, "mode": "affine"}
        if matrix.encoding in MODE_OF_ENCODING and weights[0].row.store is not Store.ENGRAM:
            bits, mode = MODE_OF_ENCODING[matrix.encoding]
            modes[path] = {"group_size": GROUP, "bits": bits, "mode": mode}
        for number, weight in enumerate(sorted(weights, key=lambda weight: weight.expert or 0)):
            source = weight_matrix(weight)
            pieces.append(
                Piece(matrix, shape, (number * source.rows, 0), source, (0, 0), (source.rows, source.columns))
            )
    for name in left:
        report.problem(EXTRA, f"tensor {name}", "not in the source")
    expected = _expected_config(checkpoint, modes, report)
    check_config(folder, lambda found: expected, report)
    check_files(folder, checkpoint.folder, report)
    return pieces


def _affine(
    name: str,
    words: Stored,
    scales: Stored | None,
    biases: Stored,
    shape: tuple[int, ...],
    weight: Weight,
    report: Report,
) -> Matrix | None:
    """Return the matrix of the affine mode of eight bits, or report why it is none or may not be."""
    where = f"tensor {name}"
    rows, columns = as_matrix(shape)
    logical = (*words.shape[:-1], words.shape[-1] * 4) if words.shape else ()
    if words.dtype != "U32" or logical != shape:
        report.problem(LAYOUT, where, f"expected U32 of {list(shape)} bytes, got {words.dtype} {list(words.shape)}")
        return None
    group = columns // scales.shape[-1] if scales is not None and scales.shape and scales.shape[-1] else 0
    wanted = (*shape[:-1], columns // group) if group else ()
    if scales is None or group not in AFFINE_GROUPS or {scales.shape, biases.shape} != {wanted}:
        report.problem(
            LAYOUT, where, f"scales and biases are not those of groups of {' or '.join(map(str, AFFINE_GROUPS))}"
        )
        return None
    if scales.dtype != "BF16" or biases.dtype != "BF16":
        report.problem(LAYOUT, where, f"expected scales and biases in BF16, got {scales.dtype} and {biases.dtype}")
        return None
    if weight_matrix(weight).encoding not in AFFINE_SOURCES or weight.row.store not in (Store.DENSE, Store.EXPERT):
        report.problem(LAYOUT, where, "the affine mode is for dense weights only")
    place = Scale(scales.file, scales.offset, "BF16", rows, columns // group, (1, group))
    return Matrix(name, words.file, words.offset, "affine8", rows, columns, place, zero=biases)


def _checked(
    name: str, words: Stored, scales: Stored | None, shape: tuple[int, ...], weight: Weight, report: Report
) -> Matrix | None:
    """Return the stored matrix if its shape and type are what they may be, and report them if not."""
    where = f"tensor {name}"
    logical = words.shape
    if words.dtype == "U32":
        if scales is None or scales.dtype != "U8" or not scales.shape:
            got = "none" if scales is None else f"{scales.dtype} {list(scales.shape)}"
            report.problem(LAYOUT, where, f"expected scales in U8, got {got}")
            return None
        columns = scales.shape[-1] * GROUP
        logical = (*words.shape[:-1], columns)
        bits = words.shape[-1] * WORD_BITS // columns if columns else 0
        if bits not in DTYPE_OF_BITS or scales.shape[:-1] != words.shape[:-1]:
            what = f"words {list(words.shape)} and scales {list(scales.shape)} are neither mxfp4 nor mxfp8"
            report.problem(LAYOUT, where, what)
            return None
        rows = as_matrix(logical)[0]
        words = words._replace(dtype=DTYPE_OF_BITS[bits], shape=(rows, columns * bits // 8))
        scales = scales._replace(dtype="F8_E8M0", shape=(rows, columns // GROUP))
    if logical != shape:
        report.problem(LAYOUT, where, f"expected shape {list(shape)}, got {list(logical)}")
        return None
    matrix = stored_matrix(name, words, scales)
    if isinstance(matrix, str):
        report.problem(LAYOUT, where, matrix)
        return None
    own = weight_matrix(weight).encoding
    allowed = ALLOWED.get(own, (own,))
    if matrix.encoding not in allowed or (weight.row.store is Store.ENGRAM and matrix.encoding != allowed[0]):
        report.problem(LAYOUT, where, f"expected {' or '.join(allowed)}, got {matrix.encoding}")
    return matrix


def _expected_config(checkpoint: Checkpoint, modes: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Return the source's config without its own words on quantisation, with MLX's for the modules at these paths."""
    config = borne_out_config(checkpoint)
    if checkpoint.n_draft and is_left_out(THE_DRAFT, report):
        config = without_draft(config)
    config = {key: value for key, value in config.items() if key not in ("quantization_config", "expert_dtype")}
    if modes:
        entries = {"group_size": 64, "bits": 8, "mode": "affine", **modes}
        config |= {"quantization": entries, "quantization_config": entries}
    return config
