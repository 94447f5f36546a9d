"""``dequantize`` and ``repack``: from a checkpoint folder to one without scales, or with FP8 experts."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint.folder import open_folder
from .convert import Summary, execute
from .engine.files import PARTIAL_SUFFIX, REPLACED_SUFFIX
from .engine.run import RunReport
from .errors import FileFormatError, InputMissingError, LossyError, UnsupportedError, UsageError
from .layouts.fp8 import FP4_TO_FP8
from .layouts.hf import (
    DEFAULT_MAX_FILE_BYTES,
    DTYPES,
    NAMES,
    dequantized_config,
    dequantized_tensors,
    hf_files,
    is_fp4_expert,
    repacked_config,
    repacked_tensors,
)
from .layouts.safetensors import whole_file
from .plan import OutputFile, Plan
from .reading import read_at_most

# What a folder holds beside config and weights that the weights are of no use without.
AUXILIARY_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
)

# Together; the published ones are 7 MB. They are held in memory with the plan.
MAX_AUXILIARY_BYTES = 64 * 2**20

DEQUANTIZE = "dequantize"
REPACK = "repack"
EXPERT_DTYPES = ("fp8",)


@dataclass(frozen=True)
class RepackSummary(Summary):
    """A ``Summary`` with how many elements of the routed experts there are, and how many changed."""

    expert_elements: int
    changed_elements: int


def plan_dequantize(
    source: Path,
    out: Path,
    *,
    dtype: str = "bf16",
    names: str = "official",
    max_file_bytes: int = DEFAULT_MAX_FILE_BYTES,
) -> Plan:
    """Plan ``dequantize``: the folder ``out`` with the weights of ``source`` in ``dtype``, without scales.

    Raises:
        UsageError: an unknown ``dtype`` or ``names``, or folders that overlap.
        Dsv4Error: whatever is wrong with the source.
    """
    _one_of("--dtype", dtype, tuple(DTYPES))
    _one_of("--names", names, NAMES)
    checkpoint = open_folder(source)
    out = check_apart(checkpoint.folder, checkpoint.files, out)
    config, source_bytes = checkpoint.config.raw, checkpoint.nbytes
    tensors, dropped, notes = dequantized_tensors(checkpoint, dtype, names)
    notes = (*checkpoint.notes, *notes)
    return Plan(
        target=DEQUANTIZE,
        source=source,
        destination=out,
        is_folder=True,
        files=(
            *hf_files(tensors, max_file_bytes),
            dequantized_config(config, dtype, names),
            *auxiliary_files(source),
        ),
        dropped=dropped,
        options={"dtype": dtype, "names": names, "max_file_bytes": max_file_bytes},
        source_bytes=source_bytes,
        notes=notes,
    )


def plan_repack(
    source: Path, out: Path, *, experts: str = "fp8", max_file_bytes: int = DEFAULT_MAX_FILE_BYTES
) -> Plan:
    """Plan ``repack``: the folder ``out`` with the FP4 experts of ``source`` in FP8, all else as it is.

    Raises:
        UsageError: an unknown ``experts``, or folders that overlap.
        UnsupportedError: the experts are not FP4.
        Dsv4Error: whatever is wrong with the source.
    """
    _one_of("--experts", experts, EXPERT_DTYPES)
    checkpoint = open_folder(source)
    out = check_apart(checkpoint.folder, checkpoint.files, out)
    if not any(is_fp4_expert(weight) for weight in checkpoint.weights.values()):
        held = {weight.encoding.value for weight in checkpoint.weights.values() if weight.expert is not None}
        raise UnsupportedError(
            "no packed FP4 experts to repack",
            where=source,
            expected="fp4",
            got=", ".join(sorted(held)),
            hint="dequantize makes BF16 of any checkpoint",
        )
    config, source_bytes, notes = checkpoint.config.raw, checkpoint.nbytes, checkpoint.notes
    tensors, dropped = repacked_tensors(checkpoint)
    return Plan(
        target=REPACK,
        source=source,
        destination=out,
        is_folder=True,
        files=(
            *hf_files(tensors, max_file_bytes),
            repacked_config(config),
            *auxiliary_files(source),
        ),
        dropped=dropped,
        options={"experts": experts, "max_file_bytes": max_file_bytes},
        source_bytes=source_bytes,
        notes=notes,
    )


def execute_repack(plan: Plan, **options: Any) -> RepackSummary:
    """Carry out a plan of ``plan_repack``; ``options`` are those of ``execute``."""
    summary = execute(plan, **options)
    elements = sum(
        math.prod(tensor.shape)
        for file in plan.files
        for tensor in file.tensors
        if any(segment.codec == FP4_TO_FP8 for segment in tensor.segments)
    )
    changed = summary.report.tally.changed
    share = "lossless" if not changed else f"{changed / elements:.2g} of them"
    verdict = f"{changed} of {elements} elements of the experts changed ({share})"
    fields = {**summary.__dict__, "notes": (*summary.notes, verdict)}
    return RepackSummary(**fields, expert_elements=elements, changed_elements=changed)


def refuse_loss(option: str) -> Callable[[RunReport], None]:
    """Return a ``before_finish`` hook that refuses a run in which any value changed.

    A NaN that stays a NaN is counted and does not count as a change. The hook raises LossyError, which
    names the worst tensor, while the output still has its temporary name.
    """

    def check(report: RunReport) -> None:
        lossy = [tensor for tensor in report.tensors if not tensor.tally.lossless]
        if not lossy:
            return
        worst = max(lossy, key=lambda t: t.tally.changed + t.tally.overflow + t.tally.underflow)
        counts = worst.tally
        kinds = {"overflow": counts.overflow, "underflow": counts.underflow, "changed": counts.changed}
        more = f" (and {len(lossy) - 1} more tensors)" if lossy[1:] else ""
        raise LossyError(
            f"tensor {worst.name}: not exact{more}",
            where=worst.file,
            expected="every element as in the source",
            got=", ".join(f"{count} {kind}" for kind, count in kinds.items() if count),
            hint=f"without {option} they are counted and listed",
        )

    return check


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{option}: unknown", expected=" or ".join(known), got=value)


def check_apart(folder: Path, files: Sequence[Path], out: Path) -> Path:
    """Return ``out`` as a path with a name, having made sure that replacing it leaves the source alone.

    Raises:
        UsageError: the source, or a file that it links to, lies inside the output, or the output inside it.
    """
    absolute = Path(os.path.abspath(out))
    if not absolute.name:
        raise UsageError("the output is no folder name", where=out)
    source = folder.resolve()
    # The output's own name, those under which it is made and an older one leaves.
    for suffix in ("", PARTIAL_SUFFIX, REPLACED_SUFFIX):
        target = absolute.with_name(absolute.name + suffix).resolve()
        for path in (source, *(file.resolve() for file in files)):
            if target == path or target in path.parents:
                raise UsageError(
                    "the source lies inside the output", where=out, got=path, hint="give another folder"
                )
        if source in target.parents:
            raise UsageError(
                "the output lies inside the source", where=out, got=source, hint="give another folder"
            )
    return out if out.name == absolute.name else absolute


def auxiliary_files(source: Path) -> list[OutputFile]:
    """Return the tokenizer, generation and licence files of ``source``, byte for byte.

    Raises:
        InputMissingError: one cannot be read.
        FileFormatError: together they are larger than ``MAX_AUXILIARY_BYTES``.
    """
    files: list[OutputFile] = []
    left = MAX_AUXILIARY_BYTES
    for name in AUXILIARY_FILES:
        path = source / name
        if not path.exists():
            continue
        try:
            content = read_at_most(path, left)
        except OSError as error:
            raise InputMissingError(f"cannot be read ({error.strerror})", where=path) from None
        left -= len(content)
        if left < 0:
            raise FileFormatError(
                "too large to be copied",
                where=path,
                expected=f"at most {MAX_AUXILIARY_BYTES} bytes of tokenizer and generation files",
                hint="is it what its name says?",
            )
        files.append(whole_file(name, content))
    return files
