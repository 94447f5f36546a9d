"""A second opinion on a finished conversion: reads source and output anew, and compares every element.

It shares no codec and no tile with the engine: numbers.py has its own formulas, and what a file must hold
is worked out again from the source. What it takes from the rest of the package are readers of headers and
the name tables.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.folder import BY_INDEX, Checkpoint, read_folder_headers
from ..checkpoint.meaning import open_checked
from ..checkpoint.model_card import MODEL_CARD_NAME, read_model_card
from ..checkpoint.shards import is_shard_folder
from ..containers.gguf import GgufModelFile, is_gguf, open_gguf
from ..containers.imatrix import Imatrix, read_imatrix
from ..containers.presence import exists, is_file, is_folder
from ..containers.sources import shown
from ..engine.monitor import Step, Watched
from ..errors import DeviceError, FileFormatError, InputMissingError, InputOutputError, InventoryError, UsageError
from ..formats.ggml import Quantiser, find_quantiser
from ..model.mlx_names import is_mlx
from .companions import NEEDED_FILES, OTHER_FILES
from .compare import Comparison, Piece, bytes_to_read, check_fits, compare_pieces
from .folder_output import folder_pieces
from .gguf_keys import IMATRIX_PREFIX, check_keys
from .gguf_output import check_padding, check_split_keys, gguf_content
from .low_bit import LOW_BIT
from .maxtext_output import is_maxtext_folder, maxtext_pieces
from .mlx_output import mlx_pieces
from .report import FILE, FOLDER, GGUF, LAYOUT, MAXTEXT, MLX, SHARDS, TENSOR, Problem, Report, TensorResult
from .shard_output import shard_pieces

__all__ = ["Problem", "Report", "TensorResult", "Verification", "prepare", "verify"]

# Files of the source whose faults are not the output's.
COMPANIONS = (MODEL_CARD_NAME, *NEEDED_FILES, *OTHER_FILES)


@dataclass
class Verification:
    """A verification that has read all headers, and has the elements still to compare."""

    report: Report
    pieces: list[Piece]
    how: Comparison
    started: float
    source: Path
    output: Path

    @property
    def nbytes(self) -> int:
        """Return about how many bytes of source and output are to be read."""
        return sum(bytes_to_read(piece, self.how) for piece in self.pieces)

    def run(self, threads: int = 1, watch: Callable[[Step], None] | None = None) -> Report:
        """Compare the elements; ``watch`` is told how many bytes have been read, and in which file of the output.

        Raises:
            InputOutputError: a file cannot be read.
        """
        report = self.report
        watched = Watched(watch, (self.source, self.output))
        for piece, result, nbytes in compare_pieces(self.pieces, self.how, threads, watched.enter):
            report.bytes_read += nbytes
            known = report.results.setdefault(result.name, result)
            if known is not result:
                known.add(result)
            watched.tell(report.bytes_read, _name_within(self.output, piece.output.file))
        for result in report.results.values():
            if result.wrong:
                report.problem(TENSOR, f"tensor {result.name}", _describe_wrong(result))
        report.seconds = time.monotonic() - self.started
        return report


def _name_within(output: Path, file: Path) -> str:
    return str(file.relative_to(output)) if output in file.parents else file.name


def verify(source: Path, output: Path, *, threads: int = 1, **options: Any) -> Report:
    """Compare the finished conversion ``output`` with its ``source``; see ``prepare`` for the options."""
    return prepare(source, output, **options).run(threads)


def prepare(
    source: Path,
    output: Path,
    *,
    sample: float | None = None,
    seed: int = 0,
    foreign: bool = False,
    ignore_keys: Iterable[str] = (),
    strict: bool = False,
    index: str = BY_INDEX,
    imatrix: Path | None = None,
    ggml_lib: Path | None = None,
    graft_draft: Path | None = None,
) -> Verification:
    """Hold the headers of ``output`` against those of the checkpoint folder ``source``.

    ``sample`` is the fraction of each tensor to look at, None for everything. ``foreign`` accepts what
    another tool may do otherwise: any rounding within the format's half step, and other names and
    wordings of metadata. ``strict`` refuses a source with values that are not finite, or all zero. ``imatrix`` is the
    importance matrix with which a GGUF was made, ``ggml_lib`` ggml's library, which makes its low-bit tensors anew.
    ``graft_draft`` is the folder whose draft the output has in place of the source's.

    Raises:
        InputMissingError: source or output is not there.
        Dsv4Error: the source cannot be read. An output that cannot be read is a problem in the report.
    """
    started = time.monotonic()
    if source.suffix == ".gguf" and is_file(source) and is_folder(output):
        raise UsageError("SOURCE is a GGUF file and OUT a folder: SOURCE comes first", expected="verify SOURCE OUT")
    if is_shard_folder(source):
        raise UsageError(
            "SOURCE is a folder of shards", where=source, hint="pass the checkpoint that was converted, and then OUT"
        )
    checkpoint = open_checked(source, draft_wanted=False, strict=strict, index=index, draft_from=graft_draft)
    if not exists(output):
        raise InputMissingError("no such file or folder", where=output)
    if os.path.realpath(source) == os.path.realpath(output):
        raise UsageError("source and output are the same", where=output)
    if is_file(output) and not is_gguf(output):
        raise InputMissingError(
            "neither a GGUF file nor a folder", where=output, hint=f"pass its folder, {shown(output.parent)}"
        )
    layout = GGUF if is_gguf(output) else SHARDS if is_shard_folder(output) else FOLDER
    report = Report(shown(source), str(output), layout, sample, seed, foreign, ignored_keys=list(ignore_keys))
    report.notes += checkpoint.notes
    report.notes += read_model_card(source).notes
    matrix = None if imatrix is None else read_imatrix(imatrix)
    try:
        pieces = _pieces(layout, output, checkpoint, report, matrix)
    except (FileFormatError, InputMissingError, InputOutputError, InventoryError) as error:
        if error.where in {source / name for name in COMPANIONS}:
            raise
        bare = type(error)(error.what, expected=error.expected, got=error.got, hint=error.hint)
        report.problem(FILE, output if error.where is None else error.where, str(bare))
        pieces = []
    fitting: list[Piece] = []
    for piece in pieces:
        try:
            check_fits(piece)
            fitting.append(piece)
        except InventoryError as error:
            report.problem(LAYOUT, f"tensor {piece.output.name}", str(error))
    quantiser = None
    if any(piece.output.encoding in LOW_BIT for piece in fitting):
        quantiser = _quantiser(open_gguf(output), matrix, ggml_lib, report)
    return Verification(report, fitting, Comparison(sample, seed, foreign, quantiser), started, source, output)


def _quantiser(
    model: GgufModelFile, imatrix: Imatrix | None, ggml_lib: Path | None, report: Report
) -> Quantiser | None:
    """Return what makes low-bit tensors anew, None where their bytes cannot be told; a note says which.

    Raises:
        DeviceError: ``ggml_lib`` cannot be used.
    """
    stated = model.metadata.get(f"{IMATRIX_PREFIX}file")
    if stated is not None and imatrix is None:
        report.notes.append(
            "low-bit tensors: their error alone is looked at, not every byte; the file names an importance matrix, "
            "which --imatrix FILE would give"
        )
        return None
    try:
        quantiser = find_quantiser(ggml_lib)
    except DeviceError as error:
        if ggml_lib is not None:
            raise
        report.notes.append(f"low-bit tensors: their error alone is looked at, not every byte; {error}")
        return None
    report.notes.append(f"low-bit tensors: made anew by ggml {quantiser.version}, and compared byte for byte")
    return quantiser


def _pieces(layout: str, output: Path, checkpoint: Checkpoint, report: Report, imatrix: Imatrix | None) -> list[Piece]:
    if layout == GGUF:
        model = open_gguf(output)
        content = gguf_content(model, checkpoint, report, imatrix)
        check_keys(model, content, checkpoint.folder, report, imatrix)
        check_split_keys(model, report)
        check_padding(model, report)
        return content.pieces
    if layout == SHARDS:
        return shard_pieces(output, checkpoint, report)
    if is_maxtext_folder(output):
        report.layout = MAXTEXT
        return maxtext_pieces(output, checkpoint, report)
    headers = read_folder_headers(output)
    if is_mlx(headers[0]):
        report.layout = MLX
        return mlx_pieces(output, headers, checkpoint, report)
    return folder_pieces(output, headers, checkpoint, report)


def _describe_wrong(result: TensorResult) -> str:
    index = "" if result.first_index is None else f", the first at {list(result.first_index)}"
    counted = f"{result.wrong:,} of {result.compared:,} elements"
    kinds = f"({result.source} to {result.output})"
    if result.largest_error == 0:
        return f"{counted} have the right values in other codes, scales or signs of zero {kinds}{index}"
    return f"{counted} are wrong {kinds}, largest error {result.largest_error:.3g}{index}"
