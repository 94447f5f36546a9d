"""``mlx``: a checkpoint folder in MLX's layout, as mlx-vlm loads it: mxfp4 and mxfp8, experts stacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.folder import BY_INDEX, Checkpoint
from ..checkpoint.weights import FLOAT_ENCODINGS, FP4_BLOCK, Encoding, Weight
from ..containers.folder_names import CONFIG_NAME
from ..containers.safetensors import Stored
from ..errors import InventoryError, UnsupportedError, check_choice
from ..formats.ggml_types import BY_NAME as ELEMENT_TYPES
from ..formats.mlx_affine import Part as AffinePart
from ..model.mlx_names import mlx_name, mlx_shape
from ..model.tensors import Store
from ..plan import Dropped, OutputFile, OutputTensor, Plan, Segment, SpreadScales, ToAffine
from .claims import Claims
from .companions import auxiliary_files, check_apart, folder_plan
from .drafts import DROP, open_with_draft_option
from .hf_folder import DEFAULT_MAX_FILE_BYTES, SAFETENSORS_DTYPE, hf_files, json_file
from .output_config import QUANTIZATION_KEYS
from .safetensors_files import unplaced_tensor
from .segments import (
    BF16,
    I32,
    SOURCES,
    check_stored,
    convert_segments,
    copy_segments,
    join_segments,
    operands,
    scale_operand,
)

MLX = "mlx"

# What becomes of FP8 weights.
MXFP8 = "mxfp8"
AFFINE8 = "affine8"
DENSE_FORMS = (MXFP8, AFFINE8, "bf16")
# Elements of a row that share a scale and a bias in the affine mode, the first that divides a row.
AFFINE_GROUPS = (64, 32)
AFFINE_BITS = 8

# Elements of a row that share one scale in MLX's mxfp4 and mxfp8.
GROUP_SIZE = 32

MLX_METADATA = {"format": "mlx"}
QUANTIZATION_KEY = "quantization"
# What a module that no other entry of the config names would have, were it quantised.
DEFAULT_MODE = {"group_size": 64, "bits": 8, "mode": "affine"}

DRAFT_REASON = "mlx-vlm keeps drafts in folders of their own"

WORD_BYTES = 4
AFFINE_PARTS: tuple[AffinePart, ...] = ("codes", "scales", "biases")
CODE_BITS = {Encoding.FP4: 4, Encoding.FP8: 8}
# What is stored without scales and not in its own type.
PLAIN_TYPES = {Encoding.FP8: BF16, Encoding.I64: I32}
MODES = {Encoding.FP4: "mxfp4", Encoding.FP8: "mxfp8"}


@dataclass(frozen=True)
class MlxTensors:
    """The tensors of a folder, and config.json's entries of its quantised modules, by the path of the module."""

    tensors: list[OutputTensor]
    modes: dict[str, dict[str, Any]]
    dropped: tuple[Dropped, ...]


def plan_mlx(
    source: Path,
    out: Path,
    *,
    dense: str = MXFP8,
    max_file_bytes: int = DEFAULT_MAX_FILE_BYTES,
    strict: bool = False,
    index: str = BY_INDEX,
) -> Plan:
    """Plan ``mlx``: the folder ``out`` with the weights of ``source`` under mlx-vlm's names, in MLX's types.

    ``dense`` is what becomes of FP8 weights: "mxfp8", which holds their very codes, "affine8", to which floats that are
    published as FP8 are rounded, too, or "bf16".

    Raises:
        UsageError: an unknown ``dense``, or folders that overlap.
        UnsupportedError: FP8 blocks that mxfp8 cannot hold.
        Dsv4Error: whatever is wrong with the source.
    """
    check_choice("--dense", dense, DENSE_FORMS)
    checkpoint, config, left_out = open_with_draft_option(source, DROP, strict=strict, index=index)
    out = check_apart(checkpoint.folder, checkpoint.files, out)
    made = mlx_tensors(checkpoint, dense)
    files = (
        *hf_files(made.tensors, max_file_bytes, MLX_METADATA),
        mlx_config(config, made.modes),
        *auxiliary_files(source),
    )
    dropped = (*made.dropped, *(replace(entry, reason=DRAFT_REASON) for entry in left_out))
    return folder_plan(MLX, checkpoint, out, files, dropped, {"dense": dense, "max_file_bytes": max_file_bytes})


def mlx_tensors(checkpoint: Checkpoint, dense: str) -> MlxTensors:
    """Return the tensors of ``checkpoint`` as mlx-vlm's modules hold them, the experts of a layer stacked.

    Raises:
        InventoryError: experts of one stack that differ in their type.
        UnsupportedError: FP8 blocks that mxfp8 cannot hold.
    """
    check_stored(checkpoint.weights.values(), "a folder of mlx")
    claims = Claims(checkpoint)
    version, groups = checkpoint.config.version, checkpoint.config.o_groups
    stacks: dict[str, list[Weight]] = {}
    for weight in checkpoint.weights.values():
        name = mlx_name(weight.row, weight.prefix, version, is_expert=weight.expert is not None)
        stacks.setdefault(name, []).append(claims.take(weight))
    tensors: list[OutputTensor] = []
    modes: dict[str, dict[str, Any]] = {}
    for name, weights in stacks.items():
        first = weights[0]
        for weight in weights:
            if (weight.encoding, weight.block) != (first.encoding, first.block):
                raise InventoryError(
                    f"tensor {weight.name}: cannot be stacked with {first.name}, its type differs",
                    where=weight.stored.file,
                    expected=f"{first.encoding.value}, blocks {first.block}",
                    got=f"{weight.encoding.value}, blocks {weight.block}",
                )
        shape = mlx_shape(first.row, first.shape, groups)
        if first.expert is not None:
            shape = (len(weights), *shape)
        is_table = first.row.store is Store.ENGRAM
        if first.encoding is Encoding.FP4 or (first.encoding is Encoding.FP8 and (dense == MXFP8 or is_table)):
            tensors += _packed(name, weights, shape)
            if not is_table:  # mlx-vlm reads the form of tables off their tensors
                modes[name.removesuffix(".weight")] = {
                    "group_size": GROUP_SIZE,
                    "bits": CODE_BITS[first.encoding],
                    "mode": MODES[first.encoding],
                }
        elif dense == AFFINE8 and _is_affine(first):
            group = _affine_group(first)
            tensors += _affine(name, weights, shape, group)
            modes[name.removesuffix(".weight")] = {"group_size": group, "bits": AFFINE_BITS, "mode": "affine"}
        else:
            tensors.append(_plain(name, weights, shape))
    return MlxTensors(tensors, modes, claims.close())


def _packed(name: str, weights: Sequence[Weight], shape: tuple[int, ...]) -> list[OutputTensor]:
    """Return the words [.., out, in · bits / 32] and the scales [.., out, in / 32] of FP4 or FP8 weights.

    Codes lie in a word from its lowest bits on, which are the bytes of the source as they are.
    """
    words = shape[-1] * CODE_BITS[weights[0].encoding] // (8 * WORD_BYTES)
    codes = join_segments([copy_segments(weight.stored) for weight in weights])
    scales = join_segments([_scale_segments(weight) for weight in weights])
    return [
        unplaced_tensor(name, "U32", (*shape[:-1], words), codes),
        unplaced_tensor(f"{name.removesuffix('weight')}scales", "U8", (*shape[:-1], shape[-1] // GROUP_SIZE), scales),
    ]


def _is_affine(weight: Weight) -> bool:
    """Return whether ``--dense affine8`` rounds a weight: FP8, and floats that are published as FP8 or FP4."""
    if weight.row.store not in (Store.DENSE, Store.EXPERT):
        return False
    return weight.encoding is Encoding.FP8 or weight.encoding in FLOAT_ENCODINGS


def _affine_group(weight: Weight) -> int:
    """Return how many elements of a row share a scale and a bias.

    Raises:
        UnsupportedError: no group divides its rows.
    """
    columns = weight.shape[-1]
    for group in AFFINE_GROUPS:
        if columns % group == 0:
            return group
    raise UnsupportedError(
        f"tensor {weight.name}: the affine mode cannot hold its rows",
        where=weight.stored.file,
        expected=f"rows of a multiple of {AFFINE_GROUPS[-1]}",
        got=columns,
        hint="pass --dense bf16",
    )


def _affine(name: str, weights: Sequence[Weight], shape: tuple[int, ...], group: int) -> list[OutputTensor]:
    """Return the words [.., out, in / 4], scales and biases [.., out, in / group] of weights in the affine mode."""
    stem = name.removesuffix("weight")
    of = {part: join_segments([_affine_segments(weight, part, group) for weight in weights]) for part in AFFINE_PARTS}
    per_group = (*shape[:-1], shape[-1] // group)
    return [
        unplaced_tensor(name, "U32", (*shape[:-1], shape[-1] // WORD_BYTES), of["codes"]),
        unplaced_tensor(f"{stem}scales", "BF16", per_group, of["scales"]),
        unplaced_tensor(f"{stem}biases", "BF16", per_group, of["biases"]),
    ]


def _affine_segments(weight: Weight, part: AffinePart, group: int) -> Sequence[Segment]:
    rows, columns = weight.shape
    row_bytes = columns if part == "codes" else columns // group * BF16.nbytes
    operation = ToAffine(part, SOURCES[weight.encoding], weight.block, group)
    return (Segment(operation, operands(weight), rows, row_bytes),)


def _scale_segments(weight: Weight) -> Sequence[Segment]:
    """Return the segments of a scale for every ``GROUP_SIZE`` elements of every row.

    Raises:
        UnsupportedError: the blocks of the weight cannot be cut into such groups.
    """
    rows, columns = weight.shape
    height, width = weight.block or (0, 0)
    scale: Stored | None = weight.scale
    if scale is None or width % GROUP_SIZE or columns % GROUP_SIZE:
        raise UnsupportedError(
            f"tensor {weight.name}: mxfp8 cannot hold its blocks",
            where=weight.stored.file,
            expected=f"rows and blocks of a multiple of {GROUP_SIZE} columns",
            got=f"rows of {columns}, blocks of {[height, width]}",
            hint="pass --dense bf16",
        )
    if (height, width) == (1, FP4_BLOCK) and scale.dtype != "F32":
        return copy_segments(scale)
    operand = scale_operand(scale, rows_per=height)
    return (Segment(SpreadScales((height, width // GROUP_SIZE)), (operand,), rows, columns // GROUP_SIZE),)


def _plain(name: str, weights: Sequence[Weight], shape: tuple[int, ...]) -> OutputTensor:
    """Return weights without scales: FP8 decoded to BF16, floats as they are, routing tables in 32 bits."""
    to = PLAIN_TYPES.get(weights[0].encoding) or ELEMENT_TYPES[weights[0].encoding.value]
    segments = join_segments([convert_segments(weight, to) for weight in weights])
    return unplaced_tensor(name, SAFETENSORS_DTYPE[to.name], shape, segments)


def mlx_config(raw: Mapping[str, Any], modes: Mapping[str, Mapping[str, Any]]) -> OutputFile:
    """Return config.json with the modes of quantised modules in MLX's words."""
    config = {key: value for key, value in raw.items() if key not in QUANTIZATION_KEYS}
    if modes:
        entries = {**DEFAULT_MODE, **modes}
        config |= {QUANTIZATION_KEY: entries, "quantization_config": entries}
    return json_file(CONFIG_NAME, config)
