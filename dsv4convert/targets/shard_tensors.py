"""The model-parallel layout: a checkpoint becomes one safetensors file per rank, and the files one checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..checkpoint.folder import Checkpoint
from ..checkpoint.shards import ShardCheckpoint, ShardedWeight
from ..checkpoint.weights import Encoding, Weight
from ..containers.folder_names import CONFIG_NAME, shard_name
from ..containers.safetensors import Stored
from ..errors import UnsupportedError, UsageError, check_choice, counted
from ..formats.not_finite import element_bytes
from ..model.parallel import SPLIT_AXIS, check_blocks, check_divides, expert_rank, local_shape, run_length
from ..model.tensors import BF16_IN_SHARDS, OUTPUT_PROJECTIONS, Row, Split, Store, scale_name
from ..plan import (
    COPY_SEGMENT_BYTES,
    AllEqual,
    Columns,
    Dropped,
    Fill,
    Join,
    Operand,
    OutputFile,
    OutputTensor,
    Segment,
    copy,
)
from .claims import Claims
from .fp8_segments import FP8_BLOCKS, bf16_to_fp8_segments, fp4_to_fp8_segments, fp8_scale_shape
from .safetensors_files import safetensors_file, unplaced_tensor
from .segments import BF16, codec_segment, copy_rows, copy_segments, scale_operand

EXPERT_DTYPES = ("fp4", "fp8")
WO_A_DTYPES = ("bf16", "fp8")

# The bytes of rows beyond a table's last: e4m3 and e8m0 codes of 0 and 1, or zeros of another type.
TABLE_PADDING, SCALE_PADDING = 0x00, 0x7F

DTYPES = {Encoding.FP4: "F4", Encoding.FP8: "F8_E4M3"}
E8M0 = "F8_E8M0"


@dataclass(frozen=True)
class ShardOptions:
    """What decides the bytes of shards.

    ``ranks`` are those to write, None for all. ``experts`` is their type, None the source's.
    ``draft`` "drop" leaves the draft layers out, "only" everything else.
    """

    mp: int
    ranks: tuple[int, ...] | None = None
    experts: str | None = None
    draft: str = "keep"


@dataclass(frozen=True)
class ShardCosts:
    """What model parallelism costs: bytes of the written ranks, and of what every rank holds whole.

    ``replicated`` gives the bytes on one rank by kind of tensor, largest first.
    """

    mp: int
    rank_bytes: Mapping[int, int]
    replicated: Mapping[str, int]
    source_bytes: int

    @property
    def replicated_bytes(self) -> int:
        """Return the bytes that every rank holds whole, on one rank."""
        return sum(self.replicated.values())

    @property
    def extra_bytes(self) -> int:
        """Return the bytes that all ranks together hold because of that, besides the first copy."""
        return self.replicated_bytes * (self.mp - 1)

    def as_json(self) -> dict[str, Any]:
        """Return the costs as plain JSON values."""
        sizes = {key: getattr(self, key) for key in ("replicated_bytes", "extra_bytes")}
        ranks = {str(rank): size for rank, size in self.rank_bytes.items()}
        return {"mp": self.mp, "rank_bytes": ranks, "replicated": dict(self.replicated), **sizes}


def join_costs(parts: Sequence[ShardCosts]) -> ShardCosts:
    """Return what the division of the parts of one model costs together."""
    rank_bytes: Counter[int] = Counter()
    replicated: Counter[str] = Counter()
    for part in parts:
        rank_bytes.update(part.rank_bytes)
        replicated.update(part.replicated)
    source_bytes = sum(part.source_bytes for part in parts)
    return ShardCosts(parts[0].mp, dict(rank_bytes), dict(replicated.most_common()), source_bytes)


def shard_files(
    checkpoint: Checkpoint, options: ShardOptions, output_mp: int | None = None
) -> tuple[tuple[OutputFile, ...], tuple[Dropped, ...], ShardCosts]:
    """Return the files of the chosen ranks, what they leave out, and what they cost.

    ``output_mp`` ranks share the output projections, None as many as share the rest; every so many ranks have them
    all again. No file of that kind is written: engines that hold them so divide them when they load.

    Raises:
        UsageError: ranks that cannot share the model or are out of range, or an expert dtype that the
            checkpoint cannot have; names the config key and the numbers.
    """
    mp = options.mp
    output_mp = mp if output_mp is None else output_mp
    has_draft = checkpoint.n_draft > 0
    check_divides(checkpoint.config, mp, checkpoint.folder / CONFIG_NAME, output_mp, has_draft=has_draft)
    output_options = replace(options, mp=output_mp)
    ranks = _chosen_ranks(options)
    _check_options(checkpoint, options)
    claims = Claims(checkpoint)
    side = FP8_BLOCKS[checkpoint.config.version]
    replicated: Counter[str] = Counter()
    tensors: dict[int, list[OutputTensor]] = {rank: [] for rank in ranks}
    for weight in checkpoint.weights.values():
        claims.take(weight)
        parts = output_options if weight.row.name in OUTPUT_PROJECTIONS else options
        _check_split(weight, parts.mp)
        if weight.row.split is Split.COPY:
            copied = list(_rank_tensors(weight, 0, options, side))
            for rank in ranks:
                tensors[rank] += copied
            replicated[kind_of(weight.row)] += sum(tensor.nbytes for tensor in copied)
            continue
        holders: Sequence[int] = ranks
        if weight.expert is not None and weight.row.split is Split.EXPERT:
            holder = expert_rank(weight.expert, checkpoint.config.n_experts(weight.is_draft), mp)
            holders = [holder] if holder in tensors else []
        for rank in holders:
            tensors[rank] += _rank_tensors(weight, rank % parts.mp, parts, side)
    # Popped, so that the tensors without offsets go as those with offsets come.
    files = tuple(safetensors_file(shard_name(rank, mp), tensors.pop(rank)) for rank in ranks)
    sizes = {rank: file.nbytes for rank, file in zip(ranks, files, strict=True)}
    return files, claims.close(), ShardCosts(mp, sizes, dict(replicated.most_common()), checkpoint.nbytes)


def kind_of(row: Row) -> str:
    """Return the kind of tensor under which costs are counted: "attn.wq_a", "hc_attn_fn"."""
    return ".".join(row.name.removesuffix(".weight").split(".")[:2])


def _chosen_ranks(options: ShardOptions) -> tuple[int, ...]:
    if options.ranks is None:
        return tuple(range(options.mp))
    for rank in options.ranks:
        if not 0 <= rank < options.mp:
            raise UsageError(
                f"--rank {rank}: out of range", expected=f"0 to {options.mp - 1} with --mp {options.mp}", got=rank
            )
    return tuple(sorted(set(options.ranks)))


def _check_options(checkpoint: Checkpoint, options: ShardOptions) -> None:
    if options.experts is None:
        return
    check_choice("--experts", options.experts, EXPERT_DTYPES)
    for weight in checkpoint.weights.values():
        if weight.row.store is not Store.EXPERT or weight.encoding.value == options.experts:
            continue
        if (weight.encoding, options.experts) != (Encoding.FP4, "fp8"):
            raise UsageError(
                f"--experts {options.experts}: cannot be made without rounding",
                where=weight.stored.file,
                expected=f"{options.experts} experts" + (" or fp4" if options.experts == "fp8" else ""),
                got=f"{weight.encoding.value} in {weight.name}",
                hint="omit --experts to keep the experts as they are",
            )


def _check_split(weight: Weight, mp: int) -> None:
    """Check that no scale block would be cut; a codec could not start in its middle either."""
    axis = SPLIT_AXIS[weight.row.split]
    if axis is not None and weight.block is not None and weight.row.split is not Split.RUNS:
        check_blocks(
            weight.name, weight.row.shape[axis], weight.shape[axis], weight.block[axis], mp, weight.stored.file
        )


def _rank_tensors(weight: Weight, rank: int, options: ShardOptions, side: int) -> Iterator[OutputTensor]:
    """Yield what a rank holds of a weight: its part, and the scales of the part.

    ``side`` rows and columns share a scale where FP4 becomes FP8.
    """
    mp, split = options.mp, weight.row.split
    shape = local_shape(weight.shape, split, mp)
    if weight.row.name in BF16_IN_SHARDS and weight.encoding is Encoding.FP8:
        rows = shape[0]
        segment = codec_segment(weight, BF16, rank * rows, rows)
        yield unplaced_tensor(weight.name, "BF16", shape, (segment,))
        return
    if weight.encoding is Encoding.FP4 and options.experts == "fp8":
        codes, scales = fp4_to_fp8_segments(weight, side)
        yield unplaced_tensor(weight.name, DTYPES[Encoding.FP8], shape, codes)
        yield unplaced_tensor(scale_name(weight.name), E8M0, fp8_scale_shape(weight.shape, side), scales)
        return
    if split is Split.RUNS:
        yield from _table_tensors(weight, rank, mp)
        return
    dtype = DTYPES.get(weight.encoding, weight.stored.dtype)
    yield unplaced_tensor(weight.name, dtype, shape, _split(weight.stored, split, rank, mp))
    if weight.scale is not None:
        yield unplaced_tensor(
            scale_name(weight.name),
            weight.scale.dtype,
            local_shape(weight.scale.shape, split, mp),
            _split(weight.scale, split, rank, mp),
        )


def _table_tensors(weight: Weight, rank: int, mp: int) -> Iterator[OutputTensor]:
    """Yield a rank's run of a table's rows and of their scales; beyond the last row are zeros, with scales of 1."""
    parts = [(weight.name, weight.stored, TABLE_PADDING)]
    if weight.scale is not None:
        parts.append((scale_name(weight.name), weight.scale, SCALE_PADDING))
    for name, stored, padding in parts:
        rows, width = weight.shape[0], _width(stored)
        share = run_length(rows, mp)
        real = max(0, min(rows - rank * share, share))
        segments = tuple(copy_rows(stored, rank * share, real)) if real else ()
        if real < share:
            segments += (Segment(Fill(padding), (), share - real, width),)
        yield unplaced_tensor(name, stored.dtype, (share, *stored.shape[1:]), segments)


def _split(stored: Stored, split: Split, rank: int, mp: int) -> Sequence[Segment]:
    """Return the segments of a rank's part of stored bytes, whatever they mean."""
    if split is Split.ROWS:
        part = stored.shape[0] // mp
        return copy_rows(stored, rank * part, part)
    if split is Split.COLUMNS and mp > 1:
        rows, part = stored.shape[0], _width(stored) // mp
        return (Segment(Columns(rank * part, (rank + 1) * part, stored.dtype), (_rows_of(stored),), rows, part),)
    return copy_segments(stored, is_repeated=split is Split.COPY and mp > 1)


def _width(stored: Stored) -> int:
    """Return the bytes of a row of a stored tensor in an output."""
    return stored.nbytes // stored.shape[0] if stored.scale_form is None else stored.shape[1]


def _rows_of(stored: Stored) -> Operand:
    """Return the operand of the rows of stored bytes, whatever they mean; scales of a wider type as E8M0."""
    if stored.scale_form is not None:
        return scale_operand(stored)
    return Operand(stored.file, stored.offset, stored.nbytes // stored.shape[0], 1, "u1")


def unshard_tensors(shards: ShardCheckpoint, wo_a: str) -> tuple[list[OutputTensor], tuple[str, ...]]:
    """Return the tensors of the checkpoint that ``shards`` were made of, and notes.

    ``wo_a`` "bf16" leaves those weights as the shards hold them; "fp8" makes codes and scales of them.

    Raises:
        UsageError: an unknown ``wo_a``.
        UnsupportedError: the rows of a rank are no whole blocks of FP8.
    """
    check_choice("--wo-a", wo_a, WO_A_DTYPES)
    form = _fp8_form(shards)
    tensors: list[OutputTensor] = []
    left_bf16 = 0
    for weight in shards.weights.values():
        if weight.row.name in BF16_IN_SHARDS and weight.encoding is Encoding.BF16:
            if wo_a == "fp8":
                tensors += _fp8_pair(weight, form or _Fp8Form((FP8_BLOCKS[shards.config.version],) * 2, E8M0))
                continue
            left_bf16 += form is not None
        tensors += _joined(weight)
    notes = []
    if left_bf16:
        notes.append(
            f"wo_a of {counted(left_bf16, 'layer')} stays BF16, as the shards hold it; --wo-a fp8 makes FP8 of it"
        )
    return tensors, tuple(notes)


class _Fp8Form(NamedTuple):
    """The rows and columns that share a scale of FP8 weights, and the type of the scales."""

    block: tuple[int, int]
    dtype: str


def _fp8_form(shards: ShardCheckpoint) -> _Fp8Form | None:
    """Return the form of the FP8 weights of a set, None where it has none.

    A dimension under one scale does not tell how many elements would share one; where all are, the version does.
    """
    dense = [weight for weight in shards.weights.values() if weight.row.store is Store.DENSE]
    parts = [part for weight in dense for part in weight.parts[:1] if part.encoding is Encoding.FP8]
    if not parts:
        return None
    side = FP8_BLOCKS[shards.config.version]
    told = [
        [part.block[axis] for part in parts if part.block and part.shape[axis] > part.block[axis]] for axis in (0, 1)
    ]
    dtype = next(part.scale.dtype for part in parts if part.scale is not None)
    return _Fp8Form((next(iter(told[0]), side), next(iter(told[1]), side)), dtype)


def _fp8_pair(weight: ShardedWeight, form: _Fp8Form) -> Iterator[OutputTensor]:
    """Yield FP8 codes and scales of a BF16 weight."""
    block, dtype = form
    for part in weight.parts[:-1]:
        if part.shape[0] % block[0]:
            raise UnsupportedError(
                f"--wo-a fp8: tensor {weight.name} cannot be FP8, the rows of a rank end inside a scale block",
                where=part.stored.file,
                expected=f"a multiple of {block[0]} rows",
                got=part.shape[0],
                hint="omit --wo-a fp8",
            )
    pairs = [bf16_to_fp8_segments(part, block, dtype) for part in weight.parts]
    rows, columns = weight.shape
    scale_shape = (-(-rows // block[0]), -(-columns // block[1]))
    yield unplaced_tensor(
        weight.name, DTYPES[Encoding.FP8], weight.shape, tuple(s for codes, _ in pairs for s in codes)
    )
    yield unplaced_tensor(scale_name(weight.name), dtype, scale_shape, tuple(s for _, scales in pairs for s in scales))


def _joined(weight: ShardedWeight) -> Iterator[OutputTensor]:
    """Yield a weight and its scales, whole and byte for byte."""
    parts = weight.parts + weight.copies
    stored = [part.stored for part in parts]
    # The published checkpoints know packed FP4 as bytes, two elements each.
    is_fp4 = weight.encoding is Encoding.FP4
    shape = (*weight.shape[:-1], weight.shape[-1] // 2) if is_fp4 else weight.shape
    yield unplaced_tensor(weight.name, "I8" if is_fp4 else stored[0].dtype, shape, _join(stored, weight))
    scales = [part.scale for part in parts if part.scale is not None]
    if scales:
        yield unplaced_tensor(
            scale_name(weight.name), scales[0].dtype, _whole_shape(scales, weight), _join(scales, weight)
        )


def _whole_shape(stored: Sequence[Stored], weight: ShardedWeight) -> tuple[int, ...]:
    shape, axis = stored[0].shape, weight.axis
    if weight.row.split is Split.RUNS:
        return (weight.shape[0], *shape[1:])
    return shape if axis is None else (*shape[:axis], shape[axis] * len(stored), *shape[axis + 1 :])


def _join(stored: Sequence[Stored], weight: ShardedWeight) -> Sequence[Segment]:
    """Return the segments that put the ranks' bytes together again."""
    first = stored[0]
    if weight.row.split is Split.RUNS:
        return _without_padding(stored, weight.shape[0])
    if len(stored) == 1:
        return copy_segments(first)
    if weight.axis == 1:
        operands = tuple(map(_rows_of, stored))
        return (Segment(Join((first.dtype,) * len(stored)), operands, first.shape[0], _width(first) * len(stored)),)
    if first.scale_form is not None:
        rows, width = first.shape[0], _width(first)
        if weight.axis == 0:
            return tuple(segment for part in stored for segment in copy_rows(part, 0, rows))
        return (Segment(AllEqual(first.dtype), tuple(map(_rows_of, stored)), rows, width),)
    if weight.axis == 0:
        piece = _piece_bytes(first.nbytes)
        return tuple(
            Segment(copy(part.dtype), (Operand(part.file, part.offset + begin, 1, 1, "u1"),), piece, 1)
            for part in stored
            for begin in range(0, part.nbytes, piece)
        )
    size = element_bytes(first.dtype)  # a row is an element, so that no tile cuts one that is to be counted
    return tuple(
        Segment(
            AllEqual(first.dtype),
            tuple(Operand(part.file, part.offset + begin, size, 1, "u1") for part in stored),
            min(COPY_SEGMENT_BYTES, first.nbytes - begin) // size,
            size,
        )
        for begin in range(0, first.nbytes, COPY_SEGMENT_BYTES)
    )


def _without_padding(stored: Sequence[Stored], rows: int) -> tuple[Segment, ...]:
    """Return the segments that join the ranks' runs of a table of ``rows`` rows, without those beyond its last."""
    share = stored[0].shape[0]
    return tuple(
        segment
        for rank, part in enumerate(stored)
        if rank * share < rows
        for segment in copy_rows(part, 0, min(rows - rank * share, share))
    )


def _piece_bytes(nbytes: int) -> int:
    """Return the size of the equal pieces in which each of several runs of ``nbytes`` is copied."""
    least = -(-nbytes // COPY_SEGMENT_BYTES)
    pieces = next((count for count in range(least, 4 * least) if count and nbytes % count == 0), 1)
    return nbytes // pieces
