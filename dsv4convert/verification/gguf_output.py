"""A finished GGUF: which rectangle of which tensor holds which source weight, and everything besides tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..checkpoint.folder import Checkpoint
from ..checkpoint.weights import Weight
from ..containers.gguf import GgufModelFile, GgufTensor
from ..containers.imatrix import Entry, Imatrix
from ..containers.untrusted import open_regular, shrank
from ..errors import InventoryError, UnsupportedError, counted, not_read, some
from ..formats.ggml_types import QUANTISED
from ..model.config import ModelConfig, Version
from ..model.tensors import Draft, Store, When, gguf_name, is_vision_name
from .compare import Piece
from .low_bit import LOW_BIT, ImportanceOf
from .matrix import (
    STORAGE,
    Matrix,
    Scale,
    as_matrix,
    read_at,
    read_bits,
    second_scale,
    weight_matrix,
    without_second,
)
from .numbers import BLOCK
from .report import EXTRA, FILE, KEY, LAYOUT, PADDING, TENSOR, LeftOut, Report

LLAMA_CPP, LLAMA_CPP_V41, PORT, DFLASH, CLIP = "deepseek4", "deepseek41", "deepseek-v4", "dflash", "clip"
# The architectures of text models of each version.
TEXT_ARCHITECTURES = {Version.V4: (LLAMA_CPP, PORT), Version.V41: (LLAMA_CPP_V41,)}

# What three tensors of V4.1 are called in dialect ds4.
DS4_V41_NAMES = {"engram_q": "engram_q_norm", "engram_k": "engram_k_norm", "engram_wkv": "engram_kv"}

# What a file holds.
TEXT, MTP, DSPARK, TOWER = "the text model", "the MTP layer", "the DSpark draft", "the vision tower"

# What an MTP file of llama.cpp takes from the trunk.
SHARED_WITH_MTP = ("embed.weight", "norm.weight", "head.weight")

# Tensor types that each kind of weight may have. Norms, biases, sinks and other vectors are never stored with less
# than the source's precision, and tables of integers only as such; matrices that usually keep theirs are noted.
FLOAT_TYPES = ("bf16", "f16", "f32")
ALL_TYPES = ("q8_0", "mxfp4", *FLOAT_TYPES, *QUANTISED)
MATRIX_TYPES = {
    "dense": ALL_TYPES,
    "expert": ALL_TYPES,
    "bf16": ALL_TYPES,
    "f32": ALL_TYPES,
    "table": ("i32",),
    "engram table": ("q8_0", "mxfp4", *FLOAT_TYPES),
}
VECTOR_TYPES = ("f32",)

# Tensors that tell a slice's first layer, and what they are in a checkpoint's layer; dialect ds4 has the first in F16.
SLICE_MARKS = {
    "blk.0.hc_attn_fn.weight": "hc_attn_fn",
    "blk.0.hc_attn.fn": "hc_attn_fn",
    "blk.0.hc_attn_base.weight": "hc_attn_base",
}

# A patch is a square of this many channels.
IMAGE_CHANNELS = 3

CHUNK_BYTES = 2**20
MAX_NAMED = 5


@dataclass(frozen=True)
class GgufContent:
    """What a GGUF is found to be: the config of the layers it holds, and which part of the model that is."""

    config: ModelConfig
    kind: str
    block_count: int
    pieces: list[Piece]


def gguf_content(
    model: GgufModelFile, checkpoint: Checkpoint, report: Report, imatrix: Imatrix | None = None
) -> GgufContent:
    """Return the pieces of ``model`` and report every tensor that is missing, unknown or of a wrong layout.

    ``imatrix`` is the importance matrix with which its low-bit tensors were made.

    Raises:
        UnsupportedError: an architecture that is not verified, or the MTP layer of a source that has several.
        InventoryError: the file holds a part of a model that the source does not have.
    """
    architecture = model.architecture
    known = (*TEXT_ARCHITECTURES[checkpoint.config.version], DFLASH, CLIP)
    if architecture not in known:
        raise UnsupportedError(
            "cannot verify this architecture",
            where=model.files[0],
            expected=f"{', '.join(known[:-1])} or {known[-1]}",
            got=repr(architecture)[:100],
        )
    config, kind, block_count = checkpoint.config, _kind(model, checkpoint), checkpoint.config.num_hidden_layers
    if kind == TOWER:
        block_count, wanted = config.flat.get("vision_n_layers", 0), _tower_weights(checkpoint)
    elif kind == DSPARK:
        block_count, wanted = checkpoint.n_draft, _dspark_weights(checkpoint)
        config = config.of_draft(block_count)
    elif kind == MTP:
        if checkpoint.n_draft > 1:
            raise UnsupportedError(
                "a file of an MTP layer has place for one",
                where=model.files[0],
                expected="a source with 1 MTP layer",
                got=checkpoint.n_draft,
            )
        wanted = _mtp_file_weights(checkpoint)
        block_count += checkpoint.n_draft
    else:
        names = DS4_V41_NAMES if is_ds4_v41(model) else {}
        block_key = f"{architecture}.{'num_hidden_layers' if is_ds4_v41(model) else 'block_count'}"
        blocks = model.metadata.get(block_key)
        if not isinstance(blocks, int):
            report.problem(KEY, block_key, f"missing or no number, got {blocks!r:.40}")
            blocks = checkpoint.config.num_hidden_layers
        first = 0
        inline = architecture == PORT and any(".mtp." in name for name in model.tensors)
        if inline:
            block_count += checkpoint.n_draft
        elif blocks < config.num_hidden_layers:
            first = _first_layer(model, checkpoint, blocks)
            config = config.sliced(first, first + max(blocks, 1) - 1)
            block_count = config.num_hidden_layers
            report.notes.append(f"a slice: layers {first} to {first + blocks - 1} of the source")
        of_layout = _trunk_weights(checkpoint, config, first, architecture, inline)
        wanted = {_renamed(name, names): weights for name, weights in of_layout.items()}
    _note_left_out(checkpoint, wanted, kind, report)
    draft_shift = checkpoint.config.num_hidden_layers if kind != DSPARK else 0
    pieces = list(_pieces(model, wanted, config, architecture, report, imatrix, draft_shift))
    return GgufContent(config, kind, block_count, pieces)


def is_ds4_v41(model: GgufModelFile) -> bool:
    """Return whether a file is of V4.1 in dialect ds4, whose keys are those of config.json."""
    return f"{LLAMA_CPP_V41}.hidden_size" in model.metadata


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """Return a tensor's name with the part below its block as ``names`` says."""
    block, dot, part = name.rpartition(".")[0].rpartition(".")
    return f"{block}{dot}{names.get(part, part)}.{name.rpartition('.')[2]}"


def _kind(model: GgufModelFile, checkpoint: Checkpoint) -> str:
    """Return which part of a model a file holds.

    Raises:
        InventoryError: one that the source does not have.
    """
    kind = {CLIP: TOWER, DFLASH: DSPARK}.get(model.architecture or "", TEXT)
    is_mtp = f"{LLAMA_CPP}.nextn_predict_layers" in model.metadata or any(".nextn." in n for n in model.tensors)
    if model.architecture == LLAMA_CPP and is_mtp:
        kind = MTP
    has = {
        TEXT: True,
        MTP: checkpoint.draft is Draft.MTP,
        DSPARK: checkpoint.draft is Draft.DSPARK,
        TOWER: any(map(is_vision_name, checkpoint.weights)),
    }
    if not has[kind]:
        raise InventoryError(f"contains {kind}, which the source lacks", where=model.files[0])
    return kind


def _mtp_file_weights(checkpoint: Checkpoint) -> dict[str, list[Weight]]:
    """Return the weights of each tensor of llama.cpp's separate MTP file."""
    wanted: dict[str, list[Weight]] = {}
    for weight in checkpoint.weights.values():
        if weight.is_draft:
            _want(wanted, weight, weight.row.gguf, checkpoint.config.num_hidden_layers)
        elif weight.name in SHARED_WITH_MTP:
            _want(wanted, weight, weight.row.gguf, 0)
    return wanted


def _dspark_weights(checkpoint: Checkpoint) -> dict[str, list[Weight]]:
    """Return the weights of each tensor of a DSpark draft's file, whose routers know no images."""
    wanted: dict[str, list[Weight]] = {}
    for weight in checkpoint.weights.values():
        if weight.is_draft and weight.row.when is not When.VISION:
            _want(wanted, weight, weight.row.gguf, 0)
    return wanted


def _tower_weights(checkpoint: Checkpoint) -> dict[str, list[Weight]]:
    """Return the weight of each tensor of the vision tower's file; gate and up are halves of one weight."""
    wanted: dict[str, list[Weight]] = {}
    for weight in checkpoint.weights.values():
        if is_vision_name(weight.name):
            for name in (weight.row.gguf or "").split():
                full = name if weight.layer is None else f"v.blk.{weight.layer}.{name}"
                wanted[full] = [weight]
    return wanted


def _trunk_weights(
    checkpoint: Checkpoint, config: ModelConfig, first: int, architecture: str, inline: bool
) -> dict[str, list[Weight]]:
    """Return the weights of each tensor of a text model whose block 0 is layer ``first``."""
    wanted: dict[str, list[Weight]] = {}
    for weight in checkpoint.weights.values():
        name = weight.row.port if architecture == PORT else weight.row.gguf
        if weight.is_draft:
            if inline:
                _want(wanted, weight, name, checkpoint.config.num_hidden_layers)
        elif weight.layer is None:
            _want(wanted, weight, name, 0)
        elif first <= weight.layer < first + config.num_hidden_layers:
            _want(wanted, weight, name, -first)
    return wanted


def _want(wanted: dict[str, list[Weight]], weight: Weight, name: str | None, shift: int) -> None:
    if name is None or is_vision_name(weight.name):
        return
    full = gguf_name(name, None if weight.layer is None else weight.layer + shift)
    wanted.setdefault(full, []).append(weight)


def _first_layer(model: GgufModelFile, checkpoint: Checkpoint, blocks: int) -> int:
    """Return which layer of the source block 0 is: the first whose hyper-connections have the same bytes.

    A slice numbers its blocks anew and does not say where it was cut; one of these tensors is always stored
    as it is. Where none is the same, the slice is taken to begin at layer 0.
    """
    for name, of in SLICE_MARKS.items():
        found = model.tensors.get(name)
        for first in range(checkpoint.config.num_hidden_layers - blocks + 1):
            weight = checkpoint.weights.get(f"layers.{first}.{of}")
            if found is None or weight is None or found.type != "f32" or found.shape != weight.shape:
                break
            sides = (_gguf_matrix(found), weight_matrix(weight))
            rows = [read_bits(side, (0, 1), (0, side.columns)) for side in sides]
            if np.array_equal(rows[0], rows[1]):
                return first
    return 0


def _note_left_out(checkpoint: Checkpoint, wanted: Mapping[str, Sequence[Weight]], kind: str, report: Report) -> None:
    """Report what of the source is in no tensor of this file, by reason."""
    held = {weight.name for weights in wanted.values() for weight in weights}
    groups: dict[tuple[str, str], int] = {}
    for weight in checkpoint.weights.values():
        if weight.name in held:
            continue
        own = f"this is {kind}'s own file"
        if is_vision_name(weight.name):
            what = TOWER, own
        elif weight.is_draft and kind != DSPARK:
            what = "the draft layers", own
        elif kind != TEXT and not weight.is_draft:
            what = "the trunk", own
        elif kind == TEXT and weight.layer is not None and weight.row.gguf is not None:
            what = "layers outside the slice", "the file holds some layers only"
        else:
            what = weight.row.name, "not part of this layout"
        groups[what] = groups.get(what, 0) + 1 + (weight.scale is not None)
    report.left_out += [LeftOut(what, reason, count) for (what, reason), count in groups.items()]


def _pieces(
    model: GgufModelFile,
    wanted: Mapping[str, list[Weight]],
    config: ModelConfig,
    architecture: str,
    report: Report,
    imatrix: Imatrix | None,
    draft_shift: int,
) -> Iterator[Piece]:
    unprotected: list[str] = []
    scales: set[str] = set()
    for name, weights in wanted.items():
        tensor = model.tensors.get(name)
        if tensor is None:
            report.missing(name, weights[0].name)
            continue
        weights = _in_order(weights)
        if tensor.type == "i8" and weights[0].row.store is Store.ENGRAM:
            yield from _lossless_table(model, tensor, weights[0], report)
            continue
        shape = _expected_shape(weights, config, architecture)
        if tensor.shape != shape:
            report.problem(LAYOUT, f"tensor {name}", f"expected shape {list(shape)}, got {list(tensor.shape)}")
            continue
        allowed = VECTOR_TYPES if len(weights[0].shape) == 1 else MATRIX_TYPES[weights[0].row.store.value]
        if tensor.type not in allowed:
            what = f"expected type {' or '.join(allowed)}, got {tensor.type}"
            report.problem(LAYOUT, f"tensor {name}", what)
            if tensor.type not in STORAGE:
                continue
        if weights[0].row.store is Store.F32 and tensor.type != "f32":
            unprotected.append(name)
        matrix, entry = _gguf_matrix(tensor), None
        seconds = _second_scales(model, tensor, weights)
        if seconds is not None:
            matrix = matrix._replace(encoding="nvfp4/e4m3")
            _check_second_scales(model, tensor, seconds, report)
            scales.add(_second_name(name))
        elif imatrix is not None and tensor.type in LOW_BIT:
            entry = _importance(imatrix, weights, architecture, draft_shift, report)
        if architecture == CLIP:
            yield _tower_piece(matrix, tensor, weights[0])
            continue
        for number, weight in enumerate(weights):
            source = weight_matrix(weight) if seconds is None else without_second(weight_matrix(weight))
            size = source.rows, source.columns
            at = (0, number * size[1]) if weight.expert is None else (number * size[0], 0)
            of = None if entry is None else ImportanceOf(entry, number)
            yield Piece(matrix, tensor.shape, at, source, (0, 0), size, of)
    if unprotected:
        names = some(unprotected, MAX_NAMED)
        report.notes.append(f"usually F32, and not here: {counted(len(unprotected))}: {names}")
    for name in model.tensors:
        if name not in wanted and _table_of_scales(name) not in wanted and name not in scales:
            report.problem(EXTRA, f"tensor {name}", "not in the source")


def _second_name(name: str) -> str:
    """Return the name of the tensor with the second scales of NVFP4 experts."""
    return name.removesuffix(".weight") + ".scale"


def _second_scales(model: GgufModelFile, tensor: GgufTensor, weights: Sequence[Weight]) -> list[float] | None:
    """Return the second scale of each expert of a stack of NVFP4 that was moved; None where it was quantised anew.

    It was moved where there is a tensor of second scales, which only those that are all 1 need not have.
    """
    if tensor.type != "nvfp4" or weights[0].expert is None:
        return None
    sources = [weight_matrix(weight) for weight in weights]
    if any(source.encoding != "fp4/f32" for source in sources):
        return None
    seconds = list(map(second_scale, sources))
    return seconds if _second_name(tensor.name) in model.tensors or set(seconds) == {1.0} else None


def _check_second_scales(model: GgufModelFile, tensor: GgufTensor, seconds: list[float], report: Report) -> None:
    """Report second scales that are not those of the source."""
    found = model.tensors.get(_second_name(tensor.name))
    if found is None:
        return
    if found.type != "f32" or found.shape != (len(seconds),):
        what = f"expected f32 [{len(seconds)}], got {found.type} {list(found.shape)}"
        report.problem(LAYOUT, f"tensor {found.name}", what)
        return
    held = read_at(found.file, found.offset, found.nbytes).view("<f4")
    for expert, (value, wanted) in enumerate(zip(held.tolist(), seconds, strict=True)):
        if value != wanted:
            report.problem(TENSOR, f"tensor {found.name}", f"[{expert}]: expected {wanted:.9g}, got {value:.9g}")
            return


def _importance(
    imatrix: Imatrix, weights: Sequence[Weight], architecture: str, draft_shift: int, report: Report
) -> Entry | None:
    """Return the entry of the importance matrix for a tensor, under its name in a file of the whole model."""
    first = weights[0]
    layer = first.layer if first.layer is None or not first.is_draft else first.layer + draft_shift
    name = gguf_name((first.row.port if architecture == PORT else first.row.gguf) or "", layer)
    entry = imatrix.entries.get(name)
    experts = len(weights) if first.expert is not None else 1
    if entry is None:
        return None
    if entry.values != experts * first.shape[-1] or (not entry.is_legacy and len(entry.counts) not in (1, experts)):
        columns = first.shape[-1]
        what = f"importance of {name}: expected {experts} x {columns} values, got {entry.values}"
        what += f"; was {imatrix.path.name} made from another model?"
        report.problem(LAYOUT, f"tensor {name}", what)
        return None
    return entry


def _table_of_scales(name: str) -> str:
    """Return the name of the table whose scales a tensor of this name holds; another if it is none such."""
    return name.replace("engram_embd_scale.", "engram_embd.")


def _lossless_table(model: GgufModelFile, tensor: GgufTensor, weight: Weight, report: Report) -> Iterator[Piece]:
    """Yield the piece of an n-gram table that is stored as bytes: rows with their scales, or scales of their own."""
    rows, columns = weight.shape
    scales = columns // BLOCK
    own_scales = model.tensors.get(tensor.name.replace("engram_embd.", "engram_embd_scale."))
    shape = (rows, columns) if own_scales is not None else (rows, columns + scales)
    for found, wanted in ((tensor, shape), (own_scales, (rows, scales))):
        if found is not None and (found.shape != wanted or found.type != "i8"):
            what = f"expected i8 {list(wanted)}, got {found.type} {list(found.shape)}"
            report.problem(LAYOUT, f"tensor {found.name}", what)
            return
    encoding, scale = "fp8/row", None
    if own_scales is not None:
        encoding, scale = "fp8", Scale(own_scales.file, own_scales.offset, "F8_E8M0", rows, scales, (1, BLOCK))
    matrix = Matrix(tensor.name, tensor.file, tensor.offset, encoding, rows, columns, scale)
    yield Piece(matrix, weight.shape, (0, 0), weight_matrix(weight), (0, 0), (rows, columns))


def _tower_piece(matrix: Matrix, tensor: GgufTensor, weight: Weight) -> Piece:
    """Return the piece of a tower's tensor: all of its weight, or the half of the rows that its name stands for."""
    source = weight_matrix(weight)
    names = (weight.row.gguf or "").split()
    rows = source.rows // len(names)
    first = next(number for number, name in enumerate(names) if tensor.name.endswith(name)) * rows
    whole = matrix._replace(rows=rows, columns=source.columns)
    return Piece(whole, (rows, source.columns), (0, 0), source, (first, 0), (rows, source.columns))


def _in_order(weights: list[Weight]) -> list[Weight]:
    """Return experts by number, and e_proj before h_proj."""
    return sorted(weights, key=lambda weight: (weight.expert or 0, weight.row.name))


def _expected_shape(weights: Sequence[Weight], config: ModelConfig, architecture: str) -> tuple[int, ...]:
    first = weights[0]
    if first.expert is not None:
        return (len(weights), *first.shape)
    if len(weights) > 1:
        return (first.shape[0], sum(weight.shape[1] for weight in weights))
    if architecture == CLIP and first.row.name == "vision.patch_embed.proj.weight":
        side = math.isqrt(first.shape[1] // IMAGE_CHANNELS)
        return (first.shape[0], IMAGE_CHANNELS, side, side)
    if architecture == CLIP and len(first.shape) > 1:
        return (first.shape[0] // len((first.row.gguf or "").split()), first.shape[1])
    if architecture == PORT and first.row.name == "attn.wo_a.weight":
        return (config.o_groups, first.shape[0] // config.o_groups, first.shape[1])
    return first.shape


def _gguf_matrix(tensor: GgufTensor) -> Matrix:
    rows, columns = as_matrix(tensor.shape)
    return Matrix(tensor.name, tensor.file, tensor.offset, tensor.type, rows, columns)


# Besides tensors


def check_padding(model: GgufModelFile, report: Report) -> None:
    """Report bytes outside header and tensors that are not zero, and files that do not end where they should."""
    for part in model.parts:
        end = -(-part.data_end // part.alignment) * part.alignment
        if part.nbytes != end:
            report.problem(FILE, part.path, f"expected {end} bytes, padding included, got {part.nbytes}")
        for start, stop in part.gaps():
            position = _first_nonzero(part.path, start, stop)
            if position is not None:
                report.problem(PADDING, part.path, f"byte {position} belongs to nothing and is not zero")


def _first_nonzero(path: Path, start: int, stop: int) -> int | None:
    """Return the first position from ``start`` to ``stop`` whose byte is not zero, None where all are.

    Raises:
        InputMissingError, InputOutputError: the file cannot be read, or ended early.
    """
    try:
        with open_regular(path) as file:
            file.seek(start)
            while start < stop:
                chunk = file.read(min(CHUNK_BYTES, stop - start))
                if not chunk:
                    raise shrank(path)
                if chunk.strip(b"\0"):
                    return start + len(chunk) - len(chunk.lstrip(b"\0"))
                start += len(chunk)
    except OSError as error:
        raise not_read(path, error) from None
    return None


def check_split_keys(model: GgufModelFile, report: Report) -> None:
    """Report keys of splits that have a wrong type or are not about splits."""
    expected = {"split.no": "u16", "split.count": "u16", "split.tensors.count": "i32"}
    for number, part in enumerate(model.parts):
        for key, kind in part.types.items():
            if key in expected:
                report.keys += 1
                if kind != expected[key]:
                    report.problem(KEY, key, f"expected type {expected[key]}, got {kind} ({part.path.name})")
            elif number > 0:
                report.problem(KEY, key, f"only the first of the files has such keys ({part.path.name})")
