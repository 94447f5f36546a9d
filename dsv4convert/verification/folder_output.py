"""A finished checkpoint folder of safetensors: which tensor holds which weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ..checkpoint.folder import Checkpoint, FolderHeaders
from ..checkpoint.nvfp4 import CODES
from ..checkpoint.weights import Weight, official_scale
from ..containers.folder_names import INDEX_NAME
from ..containers.presence import is_file
from ..containers.safetensors import Stored, read_metadata
from ..model.tensors import Store, When
from .companions import (
    FP8_SIDE,
    PYTORCH_METADATA,
    QUANTISED,
    check_file_metadata,
    check_files,
    check_folder_config,
    check_index,
    check_quant_config,
)
from .compare import Piece
from .left_out import PREFIX, leave_out, without_absent_parts
from .matrix import Matrix, read_at, stored_matrix, weight_matrix
from .numbers import NVFP4_BLOCK
from .report import EXTRA, FILE, LAYOUT, MISSING, TENSOR, Report

SCALE_SUFFIXES = (".scale", ".weight_scale_inv")
STACK_SCALE_SUFFIXES = ("_scale_inv",)
# Of NVFP4: block scales, the second scale and that of the activations.
NVFP4_SUFFIXES = (".weight_scale", ".weight_scale_2", ".input_scale")
# The matrices of an expert that share input and second scale.
FUSED = {".w1.": ".w3.", ".w3.": ".w1."}

# The weight that shards hold in BF16, whatever the source has. Scales that were lost there cannot be known again.
DEQUANTISED_IN_SHARDS = "attn.wo_a.weight"

ROW_BLOCK = (1, 32)
NVFP4_ROW_BLOCK = (1, NVFP4_BLOCK)

FLOATS = ("bf16", "f16", "f32")
# What a weight that is published in scaled codes may become.
PUBLISHED_AS = {Store.DENSE: ("fp8",), Store.EXPERT: ("fp4", "fp8"), Store.ENGRAM: ("fp8",)}


class Found(NamedTuple):
    """A weight of the output with its scales; NVFP4 has two besides ``scale``: the second one and the input's."""

    stored: Stored
    scale: Stored | None
    second: Stored | None = None
    input_scale: Stored | None = None


class Tensors:
    """The tensors of a file or folder by name without a prefix, each taken once; what is left is extra."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._left = dict(stored)

    def take(self, name: str) -> Found | None:
        """Return a weight and its scales, None where there is no such weight."""
        stored = self._pop(name)
        if stored is None:
            return None
        stem = name.removesuffix(".weight")
        suffixes = SCALE_SUFFIXES if stem != name else STACK_SCALE_SUFFIXES
        scales = (self._pop(stem + suffix) for suffix in suffixes)
        scale = next((scale for scale in scales if scale is not None), None)
        if scale is not None or stem == name:
            return Found(stored, scale)
        return Found(stored, *(self._pop(stem + suffix) for suffix in NVFP4_SUFFIXES))

    def _pop(self, name: str) -> Stored | None:
        return self._left.pop(name, None) or self._left.pop(PREFIX + name, None)

    def names(self) -> list[str]:
        """Return the names that are not taken yet."""
        return list(self._left)


def folder_pieces(folder: Path, headers: FolderHeaders, checkpoint: Checkpoint, report: Report) -> list[Piece]:
    """Return the pieces of a checkpoint folder, and report everything that does not belong or is missing."""
    stored, files, strays = headers
    for stray in strays:
        report.problem(FILE, folder, stray)
    check_file_metadata(files, report, PYTORCH_METADATA, *(read_metadata(path) for path in checkpoint.files))
    packed = next((name for name in stored if name.endswith(CODES)), None)
    if packed is not None:
        what = "packed by compressed-tensors, as no command does; compare holds such folders against each other"
        report.problem(LAYOUT, f"tensor {packed}", what)
        return []
    if is_file(folder / INDEX_NAME):
        check_index(folder / INDEX_NAME, stored, report)
    transformers = any(".self_attn." in name for name in stored)
    tensors = Tensors(stored)
    names: dict[str, str] = {}  # by official name
    nameless: list[Weight] = []
    for weight in checkpoint.weights.values():
        name = _transformers_name(weight) if transformers else weight.name
        if name is None:
            nameless.append(weight)
        else:
            names[weight.name] = name
    leave_out(nameless, "transformers has no such module", report)
    named = [checkpoint.weights[official] for official in names]
    pieces: list[Piece] = []
    groups: dict[str, list[Weight]] = {}
    for weight in without_absent_parts(named, stored, report):
        groups.setdefault(names[weight.name], []).append(weight)
    input_scales = InputScales()
    for name, weights in groups.items():
        made = _folder_tensor(name, weights, tensors, FP8_SIDE[checkpoint.config.version], report, input_scales)
        pieces += (_with_sharing(piece, weights[0], checkpoint) for piece in made)
    input_scales.report_uneven(report)
    for name in tensors.names():
        report.problem(EXTRA, f"tensor {name}", "not in the source")
    check_folder_config(folder, checkpoint, pieces, report)
    check_quant_config(folder, pieces, report)
    check_files(folder, checkpoint.folder, report)
    return pieces


class InputScales:
    """The scales of activations that NVFP4 experts have: positive numbers, alike for the matrices of one input.

    Nobody can tell from the source what they are.
    """

    def __init__(self) -> None:
        self._values: dict[str, float] = {}

    def add(self, name: str, stored: Stored | None, report: Report) -> None:
        """Check one and keep it."""
        where = f"tensor {name.removesuffix('.weight')}.input_scale"
        if stored is None:
            report.problem(MISSING, where, "not in the output; NVFP4 experts have one")
        elif stored.dtype != "F32" or stored.shape != ():
            report.problem(LAYOUT, where, f"expected F32 [], got {stored.dtype} {list(stored.shape)}")
        else:
            value = float(read_at(stored.file, stored.offset, stored.nbytes).view("<f4")[0])
            if not 0 < value < float("inf"):
                report.problem(TENSOR, where, f"expected a positive number, got {value:g}")
            self._values[name] = value

    def report_uneven(self, report: Report) -> None:
        """Report the matrices that read one input by two scales."""
        for name, value in self._values.items():
            partner = name.replace(".w3.", ".w1.")
            if ".w3." in name and self._values.get(partner, value) != value:
                where = f"tensor {name.removesuffix('.weight')}.input_scale"
                report.problem(TENSOR, where, f"expected that of w1, {self._values[partner]:g}, got {value:g}")


def _with_sharing(piece: Piece, weight: Weight, checkpoint: Checkpoint) -> Piece:
    """Return a piece of NVFP4 made of FP4 with the scales of the source that its second scale goes by."""
    if piece.output.encoding != "fp4/nv" or piece.source.encoding != "fp4":
        return piece
    fused = (weight.name.replace(own, other) for own, other in FUSED.items() if own in weight.name)
    matrices = [piece.source, *(weight_matrix(checkpoint.weights[name]) for name in fused)]
    return piece._replace(sharing=tuple(matrix.scale for matrix in matrices if matrix.scale is not None))


def _folder_tensor(
    name: str, weights: list[Weight], tensors: Tensors, side: int, report: Report, input_scales: InputScales
) -> Iterator[Piece]:
    """Yield the pieces of a tensor that holds a weight, or the experts of a layer one above the other."""
    found = tensors.take(name)
    if found is None:
        report.missing(name, weights[0].name)
        return
    first = weights[0]
    stacked = first.expert is not None and name != first.name
    shape = first.shape
    if stacked:
        weights = sorted(weights, key=lambda weight: (weight.expert or 0, weight.row.name))
        experts = len({weight.expert for weight in weights})
        shape = (experts, len(weights) // experts * first.shape[0], first.shape[1])
    matrix = checked_matrix(name, found, shape, weights, side, report)
    if matrix is None:
        return
    if matrix.encoding == "fp4/nv":
        input_scales.add(name, found.input_scale, report)
    for number, weight in enumerate(weights):
        source = weight_matrix(weight)
        at = (number * source.rows, 0)
        by_value = weight.row.name == DEQUANTISED_IN_SHARDS
        yield Piece(matrix, shape, at, source, (0, 0), (source.rows, source.columns), by_value=by_value)


def checked_matrix(
    name: str,
    found: Found,
    shape: tuple[int, ...],
    weights: list[Weight],
    side: int,
    report: Report,
) -> Matrix | None:
    """Return the stored matrix if its shape and type are what they may be, and report them if not.

    ``side``: the rows and columns of the blocks of FP8 that is made here.
    """
    stored = found.stored
    where = f"tensor {name}"
    scale = found.scale
    if scale is not None and found.second is None:
        scale = official_scale(stored, scale, None)  # mend leaves those of folders saved anew in their own type
    matrix = stored_matrix(name, stored, scale, found.second)
    if isinstance(matrix, str):
        report.problem(LAYOUT, where, matrix)
        return None
    logical = stored.shape
    if stored.dtype in ("I8", "U8"):
        logical = (*logical[:-1], logical[-1] * 2)
    if logical != shape:
        report.problem(LAYOUT, where, f"expected shape {list(shape)}, got {list(logical)}")
        return None
    allowed = _allowed_encodings(weights[0])
    if matrix.encoding not in allowed:
        report.problem(LAYOUT, where, f"expected {' or '.join(allowed)}, got {matrix.encoding}")
        if matrix.encoding == "fp4/nv":  # FP4 alone becomes NVFP4: no rule says what its elements should be here
            return None
    elif matrix.encoding in QUANTISED and matrix.scale is not None:
        own, made = weights[0].block, _made_block(matrix.encoding, weights[0], side)
        block = own if own is not None and matrix.encoding == weight_matrix(weights[0]).encoding else made
        if not _same_blocks(matrix.scale.block, block, matrix) and not report.foreign:
            report.problem(LAYOUT, where, f"expected blocks {list(block)}, got {list(matrix.scale.block)}")
    return matrix


def _same_blocks(found: tuple[int, int], expected: tuple[int, int], matrix: Matrix) -> bool:
    """Return whether blocks are those expected; along a length that one scale covers either way, any size is."""
    lengths = (matrix.rows, matrix.columns)
    return all(
        one == other or length <= min(one, other) for one, other, length in zip(found, expected, lengths, strict=True)
    )


def _allowed_encodings(weight: Weight) -> tuple[str, ...]:
    """Return how a folder may store a weight: integers and what is published in F32 as they are, others as floats.

    What is published as FP8 or FP4 may be that again, and FP4 experts FP8.
    """
    own, store = weight_matrix(weight).encoding, weight.row.store
    made = ("fp4/nv",) if own == "fp4" and store is Store.EXPERT else ()
    if own in ("i32", "i64") or (own == "f32" and store is Store.F32):
        return (own,)
    return tuple(dict.fromkeys((own, *PUBLISHED_AS.get(store, ()), *made, *FLOATS)))


def _made_block(encoding: str, weight: Weight, side: int) -> tuple[int, int]:
    """Return the rows and columns that share a scale where a conversion quantises a weight."""
    if encoding == "fp4/nv":
        return NVFP4_ROW_BLOCK
    return ROW_BLOCK if encoding == "fp4" or weight.row.store is Store.ENGRAM else (side, side)


def _transformers_name(weight: Weight) -> str | None:
    """Return what transformers calls a weight; it has no draft layers, which keep their names in its folders."""
    if weight.is_draft:
        return None if weight.row.when is When.VISION else weight.name
    name = weight.row.transformers
    return name if name is None or weight.layer is None else f"{PREFIX}layers.{weight.layer}.{name}"
