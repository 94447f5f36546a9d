"""Seeded synthetic checkpoints in the published on-disk layout: tiny, nano, and slices of flash and pro."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoint.engram import read_token_map
from ..checkpoint.tokenizer import TOKENIZER_NAME
from ..containers.folder_names import CONFIG_NAME, INDEX_NAME, file_names
from ..containers.safetensors_write import PYTORCH_METADATA, safetensors_header
from ..engine.new_folder import NewFolder
from ..engine.outputs import free_bytes
from ..errors import SpaceError, UsageError
from ..model.config import ModelConfig, Version, parse_config
from ..model.config_v41 import TEXT
from ..model.tensors import TOP_ROWS, Draft, Expected, Store, When, expected_tensors, scale_name, vision_tensors
from .presets import BYTES_PER_FILE, PUBLISHED_FILES, PUBLISHED_VOCABULARY, V41_TOKEN_KEYS, Cuts, synth_config
from .tokenizer import write_synth_tokenizer
from .values import Kind, Recipe, fp4_recipes, fp8_recipes, tensor_stream

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The sides of the blocks that share a scale.
FP8_BLOCK = {Version.V4: 128, Version.V41: 32}
ENGRAM_BLOCK = 32
FP4_BLOCK = 32
FP4_PER_BYTE = 2

DTYPE_BYTES = {"I64": 8, "F32": 4, "BF16": 2, "F8_E8M0": 1, "F8_E4M3": 1, "I8": 1}
# The order in which the safetensors library lays tensors out in a file: by dtype, widest first, then by name.
DTYPE_ORDER = {dtype: number for number, dtype in enumerate(DTYPE_BYTES)}

ENGRAM_DTYPE_ORDER = {dtype: number for number, dtype in enumerate(("BF16", "F8_E4M3", "F8_E8M0"))}

EMBEDDING_STD = 1.0
SMALL_STD = 0.1
MEDIUM_STD = 0.5


class SynthTensor(NamedTuple):
    """One tensor to write: name, safetensors dtype and shape, and how its bytes come about."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    recipe: Recipe

    @property
    def nbytes(self) -> int:
        """Return the size of the tensor in bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class SynthSummary:
    """What was written: the folder, how many files and tensors, payload bytes, and tensors by dtype."""

    folder: Path
    files: int
    tensors: int
    payload_bytes: int
    tensors_by_dtype: Mapping[str, int] = field(default_factory=dict)
    headers_only: bool = False


def synth_tensors(config: ModelConfig, *, power_of_two_scales: bool = True) -> Iterator[SynthTensor]:
    """Yield every tensor of a synthetic checkpoint in the published order, each scale after its weight.

    ``expert_dtype`` "fp8" in the config makes a Base checkpoint: FP8 experts, float32 scales, which are
    powers of two unless ``power_of_two_scales`` is false.

    Raises:
        UsageError: a dimension of 0, or one that packed FP4 cannot hold.
    """
    base = config.flat.get("expert_dtype") == "fp8"
    if not base:
        for key in ("hidden_size", "moe_intermediate_size"):
            if config.flat[key] % FP4_BLOCK:
                raise UsageError(
                    f"{key} cannot hold FP4 blocks",
                    expected=f"a multiple of {FP4_BLOCK}",
                    got=config.flat[key],
                )
    n_draft = config.n_draft_ratios
    draft = (Draft.DSPARK if config.is_dspark else Draft.MTP) if n_draft else Draft.NONE
    for expected in expected_tensors(config, draft, n_draft, config.has_vision):
        if 0 in expected.shape:
            raise UsageError(
                f"tensor {expected.name} has a dimension of 0 by this config",
                expected=" x ".join(expected.row.shape),
                got=" x ".join(map(str, expected.shape)),
            )
        taken = config.draft_num_experts_per_tok if expected.is_draft else config.num_experts_per_tok
        if expected.row.store is Store.ENGRAM:
            yield from _table(expected)
        elif expected.row.store in (Store.DENSE, Store.EXPERT):
            yield from _quantised(expected, FP8_BLOCK[config.version], base, power_of_two_scales)
        else:
            yield _plain(expected, taken, config.n_routed_experts)
    if config.has_vision:
        for expected in vision_tensors(config):
            yield _plain(expected, config.num_experts_per_tok, config.n_routed_experts)


@dataclass(frozen=True)
class SynthPlan:
    """What a synthetic checkpoint will hold: its config.json, and its tensors file by file.

    ``as_v41``: the files lie and look like those of the published V4.1.
    """

    raw: Mapping[str, Any]
    files: Sequence[Sequence[SynthTensor]]
    payload_bytes: int
    as_v41: bool = False


class SynthOptions(Cuts, total=False):
    """The keywords of ``plan_synth``."""

    files: int | None
    power_of_two_scales: bool


def plan_synth(
    preset: str, *, files: int | None = None, power_of_two_scales: bool = True, **cuts: Unpack[Cuts]
) -> SynthPlan:
    """Decide every tensor of a synthetic checkpoint and the file that it lies in; ``synth_config`` takes the ``cuts``.

    Raises:
        UsageError: a cut that leaves no model, a shape that FP4 cannot hold, or more files than tensors.
        ConfigError: the config with its cuts and overrides does not hold together.
    """
    raw = synth_config(preset, **cuts)
    config = parse_config(raw, f"synthetic {CONFIG_NAME}")
    tensors = list(synth_tensors(config, power_of_two_scales=power_of_two_scales))
    total = sum(tensor.nbytes for tensor in tensors)
    whole = not any(cuts.get(name) for name in ("layers", "ratios", "experts", "vocab", "engram_rows", "overrides"))
    if files is None and whole and cuts.get("mtp", True) and preset == "v41-flash":
        return SynthPlan(raw, _published_v41_files(tensors, config), total, as_v41=True)
    if files is None:
        files = _default_files(preset, cuts.get("variant"), total, whole=whole)
    return SynthPlan(raw, _into_files(tensors, files), total)


def write_synth(
    out: Path,
    preset: str,
    *,
    seed: int = 0,
    headers_only: bool = False,
    overwrite: bool = False,
    **options: Unpack[SynthOptions],
) -> SynthSummary:
    """Write a synthetic checkpoint folder: ``plan_synth``, which takes the ``options``, and ``write_plan`` in one.

    Raises:
        Dsv4Error: what either of them raises.
    """
    return write_plan(plan_synth(preset, **options), out, seed=seed, headers_only=headers_only, overwrite=overwrite)


def write_plan(
    plan: SynthPlan,
    out: Path,
    *,
    seed: int = 0,
    headers_only: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> SynthSummary:
    """Write the checkpoint folder ``out``; it appears under its name when it is complete.

    One file is named model.safetensors and has no index, several are numbered and have one.
    ``headers_only`` leaves the files sparse: true headers, sizes and routing tables, zeros for all other payload.
    ``progress`` is told the payload bytes written so far.

    Raises:
        UsageError: a vocabulary too small for a tokenizer.
        OutputExistsError: ``out`` exists and ``overwrite`` is not set, or it is no checkpoint folder.
        SpaceError: no room on the disk.
        InputOutputError: a write failed.
    """
    folder = NewFolder(out, CONFIG_NAME, _may_hold, overwrite=overwrite)
    free = free_bytes(out.parent)
    if not headers_only and free < plan.payload_bytes:
        raise SpaceError(
            "not enough disk space", where=out.parent, expected=f"{plan.payload_bytes} bytes free", got=free
        )
    with folder.written() as partial:
        _write_json(partial / CONFIG_NAME, plan.raw)  # by which the folder is known, should the run be killed
        text = plan.raw.get(TEXT)
        if text is None:
            write_synth_tokenizer(partial, plan.raw["vocab_size"], seed)
        else:
            write_synth_tokenizer(partial, text["vocab_size"], seed, v41=True)
            _write_json(partial / CONFIG_NAME, _fitted_to_tokenizer(plan.raw, partial))
        _write_files(partial, plan, seed, headers_only, progress)
    by_dtype = Counter(tensor.dtype for group in plan.files for tensor in group)
    dtypes = dict(sorted(by_dtype.items()))
    return SynthSummary(out, len(plan.files), by_dtype.total(), plan.payload_bytes, dtypes, headers_only)


def _fitted_to_tokenizer(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return V4.1's config.json with what depends on the tokenizer in ``folder``: ids, and the token map's size."""
    text = dict(raw[TEXT])
    found = {**raw, TEXT: text}
    tokens = json.loads((folder / TOKENIZER_NAME).read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in tokens}
    for key, content in V41_TOKEN_KEYS.items():
        holder = text if key in text else found
        # A vocabulary of the published size has the published ids.
        if key in holder and text["vocab_size"] != PUBLISHED_VOCABULARY:
            holder[key] = ids[content]
    if text.get("engram_layer_ids"):
        text["engram_compressed_vocab_size"] = int(read_token_map(folder, text["vocab_size"]).max()) + 1
    return found


def _table(expected: Expected) -> Iterator[SynthTensor]:
    """Yield an n-gram table, whose rows have scales of their own, and those scales."""
    rows, columns = expected.shape
    if columns % ENGRAM_BLOCK:
        raise UsageError(
            "engram_head_dim cannot hold scale blocks", expected=f"a multiple of {ENGRAM_BLOCK}", got=columns
        )
    codes, scales = fp8_recipes(columns, Kind.E8M0_GROUP)
    yield SynthTensor(expected.name, "F8_E4M3", expected.shape, codes)
    yield SynthTensor(scale_name(expected.name), "F8_E8M0", (rows, columns // ENGRAM_BLOCK), scales)


def _quantised(expected: Expected, block: int, base: bool, power_of_two: bool) -> Iterator[SynthTensor]:
    rows, columns = expected.shape
    if expected.row.store is Store.EXPERT and not base:
        codes, scales = fp4_recipes(columns)
        yield SynthTensor(expected.name, "I8", (rows, columns // FP4_PER_BYTE), codes)
        yield SynthTensor(scale_name(expected.name), "F8_E8M0", (rows, columns // FP4_BLOCK), scales)
        return
    kind = (Kind.F32_POWER if power_of_two else Kind.F32_ANY) if base else Kind.E8M0_BLOCK
    codes, scales = fp8_recipes(columns, kind)
    blocks = (-(-rows // block), -(-columns // block))
    yield SynthTensor(expected.name, "F8_E4M3", expected.shape, codes)
    yield SynthTensor(scale_name(expected.name), "F32" if base else "F8_E8M0", blocks, scales)


def _plain(expected: Expected, taken: int, experts: int) -> SynthTensor:
    """Return an unquantised tensor; what it plays in the model shows in its row's name and shape."""
    name, row, shape = expected.name, expected.row, expected.shape
    gate = GATE_KINDS.get(row.name)
    if gate is not None:
        # The hash table needs the number of experts, which its shape does not tell.
        size = experts if gate is Kind.HASH_TABLE else taken
        return SynthTensor(name, STORE_DTYPES[row.store], shape, Recipe(gate, size))
    wide = Kind.BF16 if row.store is Store.BF16 else Kind.F32
    if row.name.endswith("_scale"):
        recipe = Recipe(Kind.F32_UNIFORM)
    elif "norm" in row.name or row.when is When.ENGRAM:
        recipe = Recipe(Kind.BF16_NORM)
    elif row is TOP_ROWS[0] or row.name.startswith("image_"):
        recipe = Recipe(wide, EMBEDDING_STD)
    elif row.name.endswith(".ape"):
        recipe = Recipe(wide, MEDIUM_STD)
    elif len(shape) == 1:
        recipe = Recipe(wide, SMALL_STD if row.name.endswith(".bias") else MEDIUM_STD)
    else:
        recipe = Recipe(wide, shape[1] ** -0.5)
    return SynthTensor(name, STORE_DTYPES[row.store], shape, recipe)


STORE_DTYPES = {Store.BF16: "BF16", Store.F32: "F32", Store.TABLE: "I64"}
GATE_KINDS = {
    "ffn.gate.weight": Kind.ROUTER,
    "ffn.gate.bias": Kind.ROUTER_BIAS,
    "ffn.gate.bias_vl": Kind.ROUTER_BIAS_IMAGE,
    "ffn.gate.tid2eid": Kind.HASH_TABLE,
}


def _default_files(preset: str, variant: str | None, total: int, *, whole: bool) -> int:
    published = PUBLISHED_FILES.get((preset, variant), PUBLISHED_FILES.get((preset, None)))
    if whole and published is not None:
        return published
    return max(2, -(-total // BYTES_PER_FILE))


def _published_v41_files(tensors: Sequence[SynthTensor], config: ModelConfig) -> list[list[SynthTensor]]:
    """Return the published V4.1's files: tower, embedding, each layer, head, each draft stage, each n-gram table."""
    layers, stages = config.num_hidden_layers, config.n_draft_ratios
    tables = config.engram.layer_ids if config.engram is not None else ()
    files: list[list[SynthTensor]] = [[] for _ in range(2 + layers + 1 + stages + len(tables))]
    for tensor in tensors:
        part, _, rest = tensor.name.partition(".")
        number = int(rest.partition(".")[0]) if part in ("layers", "mtp") else 0
        if ".engram." in tensor.name:
            place = 3 + layers + stages + tables.index(number)
        elif part in ("layers", "mtp"):
            place = 2 + number if part == "layers" else 3 + layers + number
        else:
            place = {"vision": 0, "aligner": 0, "head": 2 + layers, "norm": 2 + layers}.get(part, 1)
        files[place].append(tensor)
    return files


def _into_files(tensors: list[SynthTensor], files: int) -> list[list[SynthTensor]]:
    """Cut the list into ``files`` runs of about equal bytes; every other cut parts a weight from its scale.

    Raises:
        UsageError: fewer tensors than files, or no file at all.
    """
    if not 1 <= files <= len(tensors):
        raise UsageError("--files out of range", expected=f"1 to {len(tensors)} (one tensor each)", got=files)
    total = sum(tensor.nbytes for tensor in tensors)
    cuts: list[int] = []
    position, reached = 0, 0
    for number in range(1, files):
        while position < len(tensors) and reached * files < total * number:
            reached += tensors[position].nbytes
            position += 1
        cut = max(position, cuts[-1] + 1 if cuts else 1)
        if number % 2:
            scales = (i for i in range(cut, len(tensors)) if tensors[i].name.endswith(".scale"))
            cut = next(scales, cut)
        cuts.append(min(cut, len(tensors) - (files - number)))
    return [tensors[start:end] for start, end in zip([0, *cuts], [*cuts, len(tensors)], strict=True)]


def _write_files(
    folder: Path, plan: SynthPlan, seed: int, headers_only: bool, progress: Callable[[int], None] | None
) -> None:
    weight_map: dict[str, str] = {}
    done = 0
    for name, group in zip(file_names(len(plan.files)), plan.files, strict=True):
        # Another writer than that of the other files made the published tables' files.
        by_name = plan.as_v41 and any(".engram." in tensor.name for tensor in group)
        order = ENGRAM_DTYPE_ORDER if by_name else DTYPE_ORDER
        ordered = sorted(group, key=lambda tensor: (order[tensor.dtype], tensor.name))
        metadata = None if plan.as_v41 and not by_name else PYTORCH_METADATA
        weight_map.update((tensor.name, name) for tensor in group)
        with (folder / name).open("wb", buffering=0) as file:
            header, _ = safetensors_header(((t.name, t.dtype, t.shape, t.nbytes) for t in ordered), metadata)
            _write_all(file.write, memoryview(header))
            if headers_only:
                file.truncate(len(header) + sum(tensor.nbytes for tensor in ordered))
            for tensor in ordered:
                if headers_only and tensor.recipe.kind is not Kind.HASH_TABLE:
                    file.seek(tensor.nbytes, os.SEEK_CUR)
                    continue
                for piece in tensor_stream(tensor.recipe, tensor.name, tensor.shape, seed):
                    _write_all(file.write, piece)
                    done += len(piece)
                    if progress is not None:
                        progress(done)
    if len(plan.files) > 1:
        total = {"total_size": plan.payload_bytes}
        _write_json(folder / INDEX_NAME, {"metadata": total, "weight_map": dict(sorted(weight_map.items()))})


def _write_all(write: Callable[[memoryview], int | None], piece: memoryview) -> None:
    while piece:
        piece = piece[write(piece) or 0 :]


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _may_hold(name: str) -> bool:
    return name.endswith((".json", ".safetensors"))
