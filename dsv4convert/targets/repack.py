"""``repack``: a checkpoint folder to one with FP8 experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.folder import BY_INDEX
from ..engine.conversion import Summary
from ..errors import UnsupportedError, check_choice
from ..plan import Fp4ToFp8Codes, Plan
from .companions import auxiliary_files, check_apart
from .drafts import KEEP, open_with_draft_option
from .hf_folder import DEFAULT_MAX_FILE_BYTES, hf_files, is_fp4_expert, repacked_config, repacked_tensors

REPACK = "repack"
EXPERT_DTYPES = ("fp8",)


@dataclass(frozen=True)
class RepackSummary(Summary):
    """A ``Summary`` with how many elements of the routed experts there are, and how many changed."""

    expert_elements: int
    changed_elements: int


def plan_repack(
    source: Path,
    out: Path,
    *,
    experts: str = "fp8",
    draft: str = KEEP,
    max_file_bytes: int = DEFAULT_MAX_FILE_BYTES,
    strict: bool = False,
    index: str = BY_INDEX,
) -> Plan:
    """Plan ``repack``: the folder ``out`` with the FP4 experts of ``source`` in FP8, all else as it is.

    Raises:
        UsageError: an unknown ``experts`` or ``draft``, or folders that overlap.
        UnsupportedError: the experts are not FP4.
        Dsv4Error: whatever is wrong with the source.
    """
    check_choice("--experts", experts, EXPERT_DTYPES)
    checkpoint, config, left_out = open_with_draft_option(source, draft, strict=strict, index=index)
    out = check_apart(checkpoint.folder, checkpoint.files, out)
    if not any(is_fp4_expert(weight) for weight in checkpoint.weights.values()):
        held = {weight.encoding.value for weight in checkpoint.weights.values() if weight.expert is not None}
        raise UnsupportedError(
            "no packed FP4 experts to repack",
            where=source,
            expected="fp4",
            got=", ".join(sorted(held)),
            hint="use dequantize for BF16",
        )
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
        dropped=(*dropped, *left_out),
        options={"experts": experts, "draft": draft, "max_file_bytes": max_file_bytes},
        source_bytes=checkpoint.nbytes,
        notes=checkpoint.notes,
    )


def summarize_repack(plans: Sequence[Plan], summary: Summary) -> RepackSummary:
    """Return the summary of plans of ``plan_repack`` with the experts' elements counted, as a note too."""
    elements = sum(
        math.prod(tensor.shape)
        for plan in plans
        for file in plan.files
        for tensor in file.tensors
        if any(isinstance(segment.operation, Fp4ToFp8Codes) for segment in tensor.segments)
    )
    changed = summary.report.tally.changed
    notes = summary.notes
    if summary.dry_run is None:
        share = "lossless" if not changed else f"{changed / elements:.2g} of them"
        notes = (*notes, f"{changed} of {elements} elements of the experts changed ({share})")
    fields = {**summary.__dict__, "notes": notes}
    return RepackSummary(**fields, expert_elements=elements, changed_elements=changed)
