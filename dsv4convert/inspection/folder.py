"""Describing a checkpoint folder."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.folder import (
    DRAFT_NAME,
    DSPARK_MARKS,
    FolderHeaders,
    check_roles_of_tensors,
    read_folder_headers,
    stated_scale_fmt,
    vision_kind,
)
from ..checkpoint.layouts import companion_notes, known_layouts, name_layout
from ..checkpoint.meaning import check_meaning, config_notes
from ..checkpoint.packed import INPUT_SCALES, forms_of
from ..checkpoint.renaming import official_name, official_tensors, zero_name
from ..checkpoint.weights import Weight, pair
from ..containers.folder_names import CONFIG_NAME, INDEX_NAME
from ..containers.presence import is_file
from ..containers.safetensors import Stored, read_header
from ..containers.sources import shown
from ..containers.wide_scales import stored_dtype
from ..errors import ConfigError, Dsv4Error, InputMissingError, InputOutputError, InventoryError, UsageError, counted
from ..formats.nvfp4 import SCALES_PER_GROUP
from ..model.config import ModelConfig, load_config
from ..model.engram import check_rows
from ..model.tensors import UNUSED_DRAFT_SUFFIXES, Draft, expected_tensors, is_draft_alone, scale_name, vision_tensors
from ..scale_forms import Pairs
from .description import DRAFT_ALONE, Description, EncodingUse, EngramTable, Layer, ranges
from .naming import DEPTH_KEYS, EXPERTS, SHOWN_KEYS, WIDTH_KEYS, family_of, layer_of, name_variant
from .scales import Scales, count_scales


def describe_config(found: Description, config: ModelConfig) -> None:
    """Add what a config says: the keys shown, the kinds and roles of layers, and n-gram tables."""
    found.config = {key: getattr(config, key) for key in SHOWN_KEYS}
    found.layers = [
        Layer(
            number,
            config.attention(number).value,
            "hash" if config.is_hash_routed(number) else "learned",
        )
        for number in range(config.num_hidden_layers)
    ]
    candidates = () if config.candidates is None else (config.candidates.source_layer_id,)
    roles = {
        "KV sources": config.kv_source_layer_ids,
        "index sources": config.index_source_layer_ids,
        "candidate source": candidates,
    }
    found.roles = {role: list(layers) for role, layers in roles.items() if layers}
    if config.engram is not None:
        tables = zip(config.engram.layer_ids, config.engram.num_embeddings, strict=True)
        found.engram = [EngramTable(layer, rows, config.engram.head_dim) for layer, rows in tables]


def readable_headers(folder: Path, index: str) -> FolderHeaders | None:
    """Return the headers of a folder, None where something is wrong with them, which ``describe_folder`` says."""
    try:
        return read_folder_headers(folder, index)
    except Dsv4Error:
        return None


def describe_folder(folder: Path, index: str, headers: FolderHeaders | None) -> Description:
    """Return the description of a checkpoint folder; ``headers`` are those of ``readable_headers``.

    Raises:
        Dsv4Error: nothing there that can be read.
    """
    found = Description(shown(folder), "checkpoint folder")
    try:
        found = _described(found, folder, index, headers)
    except (UsageError, InputOutputError):
        raise
    except Dsv4Error as error:
        raise name_layout(folder, error) from None
    if found.unexpected:
        found.notes += [f"{layout.name}: {seen}; {layout.advice}" for layout, seen in known_layouts(folder)]
    else:
        found.notes += companion_notes(folder)
    return found


def _described(found: Description, folder: Path, index: str, headers: FolderHeaders | None) -> Description:
    config = lenient_config(folder, found)
    stored, files, notes = _lenient_headers(folder, found, index) if headers is None else headers
    found.files = len(files)
    found.notes += notes
    for name, tensor in stored.items():
        official = official_name(name)
        found.count(family_of(official), tensor.dtype, tensor.nbytes, layer_of(official))
    tensors: dict[str, Stored] = {}
    try:
        tensors = official_tensors(stored, (lambda is_draft: 0) if config is None else config.n_experts)
    except InventoryError as error:
        found.unexpected.append(str(error))
        tensors = {official_name(name): tensor for name, tensor in stored.items()}
    found.draft, found.draft_layers = draft_of(tensors, found)
    if config is None:
        found.elements = sum(math.prod(tensor.shape) for tensor in tensors.values())
        return found
    describe_config(found, config)
    try:
        if not is_draft_alone(tensors):
            check_roles_of_tensors(tensors, config, folder)
        if config.engram is not None:
            check_rows(config.engram, folder / CONFIG_NAME)
    except ConfigError as error:
        found.unexpected.append(str(error))
    _describe_meaning(found, config, _describe_weights(found, config, tensors), folder)
    name_variant(found, {key: getattr(config, key) for key in WIDTH_KEYS + DEPTH_KEYS})
    return found


def lenient_config(folder: Path, found: Description) -> ModelConfig | None:
    """Return a folder's config, or None where it cannot be read, which ``found`` then says."""
    try:
        return load_config(folder)
    except (ConfigError, InputMissingError) as error:
        found.unexpected.append(str(error))
        return None


def _lenient_headers(folder: Path, found: Description, index: str) -> FolderHeaders:
    """Return the headers of a folder; where index and files disagree, those of all files that are there."""
    try:
        return read_folder_headers(folder, index)
    except (InputMissingError, InventoryError) as error:
        files = tuple(sorted(folder.glob("*.safetensors")))
        if not files:
            raise
        found.unexpected.append(str(error))
        if not is_file(folder / INDEX_NAME):
            found.notes.append("without an index, all safetensors files are taken to belong together")
    stored: dict[str, Stored] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in stored:
                found.unexpected.append(f"tensor {name}: in {stored[name].file.name} and in {file.name}")
            stored[name] = tensor
    return stored, files, ()


def draft_of(names: Iterable[str], found: Description) -> tuple[str, int]:
    """Return the kind of draft that tensors are of, and the number of its layers."""
    numbers: set[int] = set()
    is_dspark = False
    for name in names:
        match = DRAFT_NAME.match(name)
        if match is not None:
            numbers.add(int(match[1]))
            is_dspark = is_dspark or name.endswith(DSPARK_MARKS)
    if not numbers:
        return Draft.NONE.value, 0
    if len(numbers) != max(numbers) + 1:
        found.unexpected.append(f"draft layers {ranges(sorted(numbers))}: not numbered from 0 without a gap")
    return (Draft.DSPARK if is_dspark else Draft.MTP).value, len(numbers)


def _describe_meaning(found: Description, config: ModelConfig, weights: list[Weight], folder: Path) -> None:
    """Add what tables, small tensors and file tails mean, and what config.json says and is not so."""
    files = sorted({weight.stored.file for weight in weights})
    try:
        found.notes += check_meaning(config, weights, files, where=folder)
    except InventoryError as error:
        found.unexpected.append(str(error))
    found.notes += config_notes(config, weights, Draft(found.draft), found.draft_layers)


def _describe_weights(found: Description, config: ModelConfig, tensors: Mapping[str, Stored]) -> list[Weight]:
    """Hold the tensors against the tables: encodings of those that fit, a line for each that does not.

    Returns those that fit.
    """
    left = dict(tensors)
    weights: list[Weight] = []
    missing: list[str] = []
    has_vision, has_tower = vision_kind(tensors)
    expectations = expected_tensors(config, Draft(found.draft), found.draft_layers, has_vision)
    if is_draft_alone(tensors):
        found.notes.append(DRAFT_ALONE)
        expectations = (expected for expected in expectations if expected.is_draft)
    for expected in _chain(expectations, lambda: vision_tensors(config), has_tower, found):
        stored = left.pop(expected.name, None)
        if stored is None:
            missing.append(expected.name)
            continue
        scale = left.pop(scale_name(expected.name), None) if expected.name.endswith(".weight") else None
        try:
            zero = left.pop(zero_name(expected.name), None)
            weight = pair(expected, stored, scale, scale_fmt=stated_scale_fmt(config), zero=zero)
        except InventoryError as error:
            found.unexpected.append(str(error))
            continue
        found.elements += math.prod(weight.shape)
        weights.append(weight)
    count_encodings(found, weights)
    copies = [name for name in left if name.endswith(UNUSED_DRAFT_SUFFIXES) and DRAFT_NAME.match(name)]
    if copies:
        found.notes.append(f"{', '.join(copies)}: the draft's copies of embedding and head, which nothing reads")
    inputs = [name for name in left if name.endswith(INPUT_SCALES)]
    found.notes += forms_of(weights)
    if inputs:
        found.notes.append(f"not read: {counted(len(inputs), 'scale')} of activations")
    known = {*copies, *inputs}
    found.unexpected += [f"tensor {name} is missing" for name in missing]
    found.unexpected += [f"tensor {name}: unknown" for name in left if name not in known]
    return weights


def _chain(
    text: Iterable[Any], vision: Callable[[], Iterable[Any]], has_vision: bool, found: Description
) -> Iterator[Any]:
    yield from text
    if has_vision:
        try:
            yield from vision()
        except ConfigError as error:
            found.unexpected.append(str(error))


def _stored_block(weight: Weight) -> tuple[int, int] | None:
    """Return what shares a scale of the file: of NVFP4, two of its scales are one where the weight is read."""
    if weight.block is None or weight.scale is None or not isinstance(weight.scale.scale_form, Pairs):
        return weight.block
    height, width = weight.block
    return height, width // SCALES_PER_GROUP


def count_encodings(found: Description, weights: Iterable[Weight]) -> None:
    """Add how many weights of each family are stored in each way, and the exponents of their scales."""
    stored: list[Scales] = []
    uses: Counter[tuple[str, str, str | None, tuple[int, int] | None]] = Counter()
    for weight in weights:
        family = EXPERTS if weight.expert is not None else family_of(weight.name)
        scale = None if weight.scale is None else stored_dtype(weight.scale)
        uses[family, weight.encoding.value, scale, _stored_block(weight)] += 1
        if scale is not None and weight.scale is not None:
            stored.append(Scales(family, scale, weight.scale.file, weight.scale.offset, weight.scale.nbytes))
    found.encodings = [EncodingUse(*key, count) for key, count in uses.items()]
    found.scales = count_scales(stored)
