"""``repack``: a checkpoint folder to one with FP8 or NVFP4 experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.folder import BY_INDEX, Checkpoint
from ..containers.folder_names import CONFIG_NAME
from ..engine.conversion import Summary
from ..errors import UnsupportedError, UsageError, check_choice
from ..plan import Dropped, Fp4ToFp8Codes, Fp4ToNvfp4Codes, OutputFile, OutputTensor, Plan, operation_of
from .claims import Claims
from .companions import auxiliary_files, check_apart, folder_plan
from .drafts import KEEP, open_with_draft_option
from .fp8_segments import CODES_PER_BYTE
from .hf_folder import (
    DEFAULT_MAX_FILE_BYTES,
    hf_files,
    is_fp4_expert,
    json_file,
    repacked_config,
    repacked_tensors,
    stored_tensors,
)
from .nvfp4 import DEFAULT_INPUT_SCALE, InputScales, is_cast, nvfp4_configs, nvfp4_tensors
from .segments import check_stored

REPACK = "repack"
FP8, NVFP4 = EXPERT_DTYPES = ("fp8", "nvfp4")


@dataclass(frozen=True)
class RepackSummary(Summary):
    """A ``Summary`` with how many elements of the routed experts there are, and how many changed."""

    expert_elements: int
    changed_elements: int


def plan_repack(
    source: Path,
    out: Path,
    *,
    experts: str = FP8,
    draft_experts: bool = False,
    input_scale: str | None = None,
    draft: str = KEEP,
    max_file_bytes: int = DEFAULT_MAX_FILE_BYTES,
    strict: bool = False,
    index: str = BY_INDEX,
) -> Plan:
    """Plan ``repack``: the folder ``out`` with the FP4 experts of ``source`` in FP8 or NVFP4, all else as it is.

    Of NVFP4 alone: ``draft_experts`` converts those of the draft as well, and ``input_scale`` is what
    ``InputScales.parse`` reads.

    Raises:
        UsageError: an unknown ``experts`` or ``draft``, an option of another kind of experts, or folders that overlap.
        UnsupportedError: the experts are not FP4.
        Dsv4Error: whatever is wrong with the source.
    """
    check_choice("--experts", experts, EXPERT_DTYPES)
    for name, given in (("--draft-experts", draft_experts), ("--input-scale", input_scale is not None)):
        if given and experts != NVFP4:
            raise UsageError(f"{name}: of NVFP4 only", expected=f"--experts {NVFP4}", got=f"--experts {experts}")
    scales = InputScales.parse(DEFAULT_INPUT_SCALE if input_scale is None else input_scale)
    checkpoint, config, left_out = open_with_draft_option(source, draft, strict=strict, index=index)
    out = check_apart(checkpoint.folder, checkpoint.files, out)
    if scales.where is not None:
        check_apart(scales.where, (), out)
    check_stored(checkpoint.weights.values(), "a folder of repack")
    if not any(is_fp4_expert(weight) for weight in checkpoint.weights.values()):
        held = {weight.encoding.value for weight in checkpoint.weights.values() if weight.expert is not None}
        raise UnsupportedError(
            "no packed FP4 experts to repack",
            where=source,
            expected="fp4",
            got=", ".join(sorted(held)),
            hint="run requantize first" if held & {"bf16", "f16", "f32"} else "use dequantize for BF16",
        )
    configs: tuple[OutputFile, ...]
    options: dict[str, object] = {"experts": experts, "draft": draft, "max_file_bytes": max_file_bytes}
    if experts == NVFP4:
        tensors, dropped = _with_nvfp4_experts(checkpoint, scales, draft_experts=draft_experts)
        cast = [weight for weight in checkpoint.weights.values() if is_cast(weight, draft_experts=draft_experts)]
        # A draft by itself, whose experts stay FP4, has none.
        configs = nvfp4_configs(config, checkpoint, cast) if cast else (json_file(CONFIG_NAME, config),)
        options |= {"draft_experts": draft_experts, "input_scale": scales.option(input_scale or DEFAULT_INPUT_SCALE)}
    else:
        tensors, dropped = repacked_tensors(checkpoint)
        configs = (repacked_config(config),)
    files = (*hf_files(tensors, max_file_bytes), *configs, *auxiliary_files(source))
    return folder_plan(REPACK, checkpoint, out, files, (*dropped, *left_out), options)


def _with_nvfp4_experts(
    checkpoint: Checkpoint, scales: InputScales, *, draft_experts: bool
) -> tuple[list[OutputTensor], tuple[Dropped, ...]]:
    """Return the tensors of ``checkpoint`` with NVFP4 experts, all else as it is, and what they leave out."""
    weights = checkpoint.weights
    scales.check_names(weight for weight in weights.values() if is_cast(weight, draft_experts=draft_experts))
    claims = Claims(checkpoint)
    tensors: list[OutputTensor] = []
    for weight in weights.values():
        claims.take(weight)
        if is_cast(weight, draft_experts=draft_experts):
            tensors += nvfp4_tensors(weight, weights, scales)
        else:
            tensors += stored_tensors(weight)
    return tensors, claims.close()


def summarize_repack(plans: Sequence[Plan], summary: Summary) -> RepackSummary:
    """Return the summary of plans of ``plan_repack`` with the experts' elements counted, as a note too."""
    elements = sum(
        math.prod(tensor.shape) * (CODES_PER_BYTE if isinstance(operation, Fp4ToNvfp4Codes) else 1)
        for plan in plans
        for tensor in plan.tensors()
        if isinstance(operation := operation_of(tensor.segments), Fp4ToFp8Codes | Fp4ToNvfp4Codes)
    )
    changed = summary.report.tally.changed
    notes = summary.notes
    if summary.dry_run is None:
        share = "lossless" if not changed else f"{changed / elements:.2g} of them"
        notes = (*notes, f"{changed:,} of {elements:,} elements of the experts changed ({share})")
    fields = {**summary.__dict__, "notes": notes}
    return RepackSummary(**fields, expert_elements=elements, changed_elements=changed)
