"""``shard`` and ``unshard``: a checkpoint folder becomes a folder of model-parallel shards, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.folder import BY_INDEX, Checkpoint
from ..checkpoint.meaning import check_meaning, config_notes
from ..checkpoint.shards import ShardCheckpoint, is_shard_folder, open_shards
from ..containers.folder_names import CONFIG_NAME
from ..containers.json_object import MAX_CONFIG_BYTES, plain_json, read_json_object
from ..containers.presence import is_file
from ..containers.untrusted import read_whole
from ..engine.conversion import Summary
from ..errors import UsageError
from ..model.config import Version
from ..model.config_v41 import inference_config
from ..model.tensors import Store
from ..plan import OutputFile, Plan
from .companions import auxiliary_files, check_apart, folder_plan
from .drafts import KEEP, choose_draft, open_with_draft_option
from .hf_folder import DEFAULT_MAX_FILE_BYTES, hf_files, json_file, repacked_config
from .safetensors_files import whole_file
from .segments import check_stored
from .shard_tensors import ShardCosts, ShardOptions, shard_files, unshard_tensors

SHARD = "shard"
UNSHARD = "unshard"

# V4.1's config in the published inference code's own form.
INFERENCE_CONFIG_NAME = "inference_config.json"

# Files without which the model in the folder cannot be run.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ShardSummary(Summary):
    """A ``Summary`` with what the division costs."""

    costs: ShardCosts

    def as_json(self) -> dict[str, Any]:
        """Return the summary as plain JSON values."""
        return {**super().as_json(), "costs": self.costs.as_json()}


class ShardPlan(NamedTuple):
    """The plan of ``shard``, and what the division costs."""

    plan: Plan
    costs: ShardCosts


def plan_shards(
    source: Path, out: Path, options: ShardOptions, *, strict: bool = False, index: str = BY_INDEX
) -> ShardPlan:
    """Plan ``shard``: the folder ``out`` with the shards of the chosen ranks, config and tokenizer next to them.

    Raises:
        UsageError: ranks that cannot share the model, an expert dtype that it cannot have, or folders
            that overlap.
        Dsv4Error: whatever is wrong with the source.
    """
    if is_shard_folder(source):
        raise UsageError("already a folder of shards", where=source, hint="run unshard first")
    checkpoint, config, left_out = open_with_draft_option(source, options.draft, strict=strict, index=index)
    out = check_apart(checkpoint.folder, checkpoint.files, out)
    check_stored(checkpoint.weights.values(), "shards")
    configs = [_shard_config(checkpoint, config, options)]
    if checkpoint.config.version is Version.V41:
        configs.append(_inference_config(checkpoint, options))
    files, dropped, costs = shard_files(checkpoint, options)
    files += (*configs, *auxiliary_files(source))
    chosen = {**asdict(options), "ranks": list(options.ranks) if options.ranks is not None else None}
    notes = _missing_tokenizer(source)
    return ShardPlan(folder_plan(SHARD, checkpoint, out, files, (*dropped, *left_out), chosen, notes), costs)


def plan_unshard(
    source: Path,
    out: Path,
    *,
    wo_a: str = "bf16",
    draft: str = KEEP,
    max_file_bytes: int = DEFAULT_MAX_FILE_BYTES,
    strict: bool = False,
) -> Plan:
    """Plan ``unshard``: the checkpoint folder ``out`` from the complete set of shards in ``source``.

    Raises:
        InputMissingError: a rank or the config is not there.
        InventoryError: a mixed set, or one that does not belong to the config.
        UsageError: folders that overlap, or an unknown ``wo_a`` or ``draft``.
        Dsv4Error: whatever else is wrong with the source.
    """
    shards = open_shards(source)
    out = check_apart(shards.folder, shards.files, out)
    parts = (part for weight in shards.weights.values() for part in weight.parts)
    found = check_meaning(shards.config, parts, shards.files, where=source, strict=strict)
    found = (*config_notes(shards.config, shards.weights.values(), shards.draft, shards.n_draft), *found)
    shards, config, left_out = choose_draft(shards, draft)
    tensors, notes = unshard_tensors(shards, wo_a)
    files = (*hf_files(tensors, max_file_bytes), _config_file(shards, config), *auxiliary_files(source))
    options = {"wo_a": wo_a, "draft": draft, "max_file_bytes": max_file_bytes}
    notes = (*found, *notes, *_missing_tokenizer(source))
    return folder_plan(UNSHARD, shards, out, files, left_out, options, notes)


def _shard_config(checkpoint: Checkpoint, config: Mapping[str, Any], options: ShardOptions) -> OutputFile:
    """Return config.json of shards, which says where FP4 experts are FP8 now."""
    has_fp4 = any(w.row.store is Store.EXPERT and w.encoding.value == "fp4" for w in checkpoint.weights.values())
    return repacked_config(config) if options.experts == "fp8" and has_fp4 else _config_file(checkpoint, config)


def _config_file(source: Checkpoint | ShardCheckpoint, config: Mapping[str, Any]) -> OutputFile:
    """Return config.json: the source's own bytes, or what is true of the output where that differs."""
    path = source.folder / CONFIG_NAME
    found = read_json_object(path)
    if config is not source.config.raw or found != config:
        return json_file(CONFIG_NAME, config)
    # As plain JSON where other readers would stumble over its very bytes.
    content = read_whole(path, MAX_CONFIG_BYTES)
    return whole_file(CONFIG_NAME, content) if content == plain_json(content) else json_file(CONFIG_NAME, found)


def _inference_config(checkpoint: Checkpoint, options: ShardOptions) -> OutputFile:
    """Return V4.1's config in the flat form that the published inference code reads."""
    encodings = {w.encoding.value for w in checkpoint.weights.values() if w.row.store is Store.EXPERT}
    experts = options.experts or ("fp4" if "fp4" in encodings else "fp8")
    flat = inference_config(checkpoint.config.flat, experts, with_draft=checkpoint.n_draft > 0)
    return json_file(INFERENCE_CONFIG_NAME, flat)


def _missing_tokenizer(source: Path) -> tuple[str, ...]:
    return tuple(
        f"the source has no {name}, so that the output has none either"
        for name in TOKENIZER_FILES
        if not is_file(source / name)
    )
