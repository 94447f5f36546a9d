"""``dequantize``: a checkpoint folder to one without scales."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.folder import BY_INDEX
from ..errors import UnsupportedError, UsageError, check_choice
from ..model.config import Version
from ..plan import Plan
from .companions import auxiliary_files, check_apart, folder_plan
from .drafts import KEEP, ONLY, open_with_draft_option
from .hf_folder import DEFAULT_MAX_FILE_BYTES, DTYPES, NAMES, dequantized_config, dequantized_tensors, hf_files

DEQUANTIZE = "dequantize"


def plan_dequantize(
    source: Path,
    out: Path,
    *,
    dtype: str = "bf16",
    names: str = "official",
    draft: str = KEEP,
    max_file_bytes: int = DEFAULT_MAX_FILE_BYTES,
    strict: bool = False,
    index: str = BY_INDEX,
) -> Plan:
    """Plan ``dequantize``: the folder ``out`` with the weights of ``source`` in ``dtype``, without scales.

    Raises:
        UsageError: an unknown ``dtype``, ``names`` or ``draft``, a draft alone under transformers' names, or folders
            that overlap.
        UnsupportedError: transformers' names, which V4.1 does not have.
        Dsv4Error: whatever is wrong with the source.
    """
    check_choice("--dtype", dtype, DTYPES)
    check_choice("--names", names, NAMES)
    checkpoint, config, left_out = open_with_draft_option(source, draft, strict=strict, index=index)
    if names != NAMES[0] and checkpoint.config.version is Version.V41:
        raise UnsupportedError("--names transformers: transformers has no modules for DeepSeek-V4.1", where=source)
    if names != NAMES[0] and draft == ONLY:
        raise UsageError(
            f"--names {names}: transformers has no draft",
            where=source,
            hint="write the draft by a second run, with --names official --draft only",
        )
    out = check_apart(checkpoint.folder, checkpoint.files, out)
    tensors, dropped, notes = dequantized_tensors(checkpoint, dtype, names)
    files = (
        *hf_files(tensors, max_file_bytes),
        dequantized_config(config, dtype, names),
        *auxiliary_files(source),
    )
    options = {"dtype": dtype, "names": names, "draft": draft, "max_file_bytes": max_file_bytes}
    return folder_plan(DEQUANTIZE, checkpoint, out, files, (*dropped, *left_out), options, notes)
