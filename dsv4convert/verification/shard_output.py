"""Finished model-parallel shards: which tensor of which rank holds which part of which weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ..checkpoint.folder import Checkpoint
from ..checkpoint.weights import Weight
from ..containers.folder_names import SHARD_NAME
from ..containers.safetensors import read_header
from ..model.config import ModelConfig, Version
from ..model.tensors import Split
from .companions import (
    FP8_SIDE,
    PYTORCH_METADATA,
    QUANTISED,
    check_file_metadata,
    check_files,
    check_folder_config,
    check_inference_config,
)
from .compare import Piece
from .folder_output import DEQUANTISED_IN_SHARDS, Found, Tensors, checked_matrix
from .left_out import without_absent_parts
from .matrix import read_at, weight_matrix
from .report import EXTRA, FILE, LAYOUT, MISSING, PADDING, Report


def shard_pieces(folder: Path, checkpoint: Checkpoint, report: Report) -> list[Piece]:
    """Return the pieces of the shards in ``folder``, and report all that does not belong or is missing.

    Ranks that are not there are noted: ``shard --rank`` writes some only.

    Raises:
        Dsv4Error: a shard cannot be read at all.
    """
    files = {
        (int(found[2]), int(found[1])): path
        for path in sorted(folder.iterdir())
        if (found := SHARD_NAME.fullmatch(path.name)) is not None
    }
    sizes = sorted({size for size, _ in files})
    if len(sizes) > 1:
        report.problem(FILE, folder, f"shards of several divisions: mp {', '.join(map(str, sizes))}")
    mp = sizes[0]
    for path in sorted(folder.glob("*.safetensors")):
        if path not in files.values():
            report.problem(FILE, path, "unexpected file next to shards")
    ranks = {rank: path for (size, rank), path in files.items() if size == mp}
    absent = [rank for rank in range(mp) if rank not in ranks]
    if absent:
        report.notes.append(f"not there and not verified: ranks {', '.join(map(str, absent[:20]))} of {mp}")
    for rank in [rank for rank in ranks if rank >= mp]:
        report.problem(FILE, ranks.pop(rank), f"rank {rank} of {mp}")
    stored = {rank: read_header(path) for rank, path in ranks.items()}
    names = (name for tensors in stored.values() for name in tensors)
    present = without_absent_parts(list(checkpoint.weights.values()), names, report)
    pieces: list[Piece] = []
    for rank, tensors in stored.items():
        pieces += _rank_pieces(rank, mp, Tensors(tensors), present, checkpoint.config, report)
    check_file_metadata(ranks.values(), report, PYTORCH_METADATA)
    check_folder_config(folder, checkpoint, pieces, report)
    if checkpoint.config.version is Version.V41 and not report.foreign:
        check_inference_config(folder, checkpoint, pieces, report)
    check_files(folder, checkpoint.folder, report)
    return pieces


def _rank_pieces(
    rank: int, mp: int, tensors: Tensors, weights: Iterable[Weight], config: ModelConfig, report: Report
) -> Iterator[Piece]:
    for weight in weights:
        experts = max(1, (config.draft_n_routed_experts if weight.is_draft else config.n_routed_experts) // mp)
        if weight.expert is not None and weight.row.split is Split.EXPERT and weight.expert // experts != rank:
            continue
        source = weight_matrix(weight)
        found = tensors.take(weight.name)
        if found is None:
            report.problem(MISSING, f"rank {rank}: tensor {weight.name}", "not in the shard")
            continue
        if weight.row.split is Split.RUNS:
            yield from _run_piece(rank, mp, weight, found, report)
            continue
        axis = {Split.ROWS: 0, Split.COLUMNS: 1}.get(weight.row.split)
        shape = weight.shape
        if axis is not None:
            shape = (*shape[:axis], shape[axis] // mp, *shape[axis + 1 :])
        matrix = checked_matrix(f"rank{rank}:{weight.name}", found, shape, [weight], FP8_SIDE[config.version], report)
        if matrix is None:
            continue
        dequantised = weight.row.name == DEQUANTISED_IN_SHARDS and source.encoding in QUANTISED
        if dequantised and matrix.encoding != "bf16":
            what = f"expected bf16, got {matrix.encoding}"
            report.problem(LAYOUT, f"rank {rank}: tensor {weight.name}", what)
        at = (0, 0)
        if axis is not None:
            vector = len(weight.shape) == 1
            at = (0, rank * matrix.columns) if vector or axis == 1 else (rank * matrix.rows, 0)
        yield Piece(matrix, shape, (0, 0), source, at, (matrix.rows, matrix.columns))
    for name in tensors.names():
        report.problem(EXTRA, f"rank {rank}: tensor {name}", "not in the source")


def _run_piece(rank: int, mp: int, weight: Weight, found: Found, report: Report) -> Iterator[Piece]:
    """Yield a rank's run of a table's rows; what fills up the last ranks must be zeros with scales of 1."""
    rows = weight.shape[0]
    share = (rows + mp - 1) // mp
    shape = (share, *weight.shape[1:])
    name = f"rank{rank}:{weight.name}"
    matrix = checked_matrix(name, found, shape, [weight], FP8_SIDE[Version.V41], report)
    if matrix is None:
        return
    real = max(0, min(rows - rank * share, share))
    for stored, byte in zip((found.stored, found.scale), (b"\0", b"\x7f"), strict=True):
        if stored is not None and real < share:
            width = stored.nbytes // share
            filled = read_at(stored.file, stored.offset + real * width, (share - real) * width)
            if filled.tobytes().strip(byte):
                what = f"expected rows {real} to {share} to be filled with {byte.hex()}"
                report.problem(PADDING, f"rank {rank}: tensor {weight.name}", what)
    if real:
        yield Piece(matrix, shape, (0, 0), weight_matrix(weight), (rank * share, 0), (real, matrix.columns))
