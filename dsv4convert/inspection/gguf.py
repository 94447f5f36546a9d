"""Describing a GGUF file."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..containers.gguf import GgufModelFile, open_gguf
from ..containers.imatrix import CHUNKS_KEY, DATASETS_KEY, IMATRIX_TYPE, SUMS, TYPE_KEY
from ..containers.sources import shown
from ..errors import counted
from ..model.config import ATTENTION_BY_RATIO, Version
from ..model.gguf_keys import DRAFT, KEYS, LLAMA_CPP, LLAMA_CPP_V41, PORT, TOWER, key_name
from ..model.tensors import (
    DSPARK_ROWS,
    EXPERT_ROWS,
    MTP_ROWS,
    TABLES,
    VISION_BLOCK_ROWS,
    VISION_ROWS,
    Draft,
    LayerKind,
    Row,
    Tables,
    applies,
)
from ..targets.ds4_v41 import NAMES as DS4_NAMES
from ..targets.gguf_tensors import SECOND_SUFFIX
from .description import DRAFT_ALONE, Description, EncodingUse, EngramTable, Layer
from .naming import DRAFT_FAMILY, OTHER, SHOWN_KEYS, family_of, name_variant
from .scales import Scales, count_scales


def describe_gguf(path: Path) -> Description:
    """Return the description of a GGUF, all parts of a split one.

    Raises:
        Dsv4Error: nothing there that can be read.
    """
    model = open_gguf(path)
    found = Description(shown(path), "GGUF")
    found.files = len(model.parts)
    architecture = model.architecture
    found.traits.append(f"architecture {architecture}")
    rows = official_rows(architecture)
    numbers = _Numbers(model, found)
    blocks = numbers.get("block_count", "num_hidden_layers") or 0
    mtp_blocks = {int(name.split(".")[1]) for name in model.tensors if MTP_TENSOR.match(name)}
    uses: Counter[tuple[str, str]] = Counter()
    scales: list[Scales] = []
    for name, tensor in model.tensors.items():
        family = gguf_family(name, rows, min(mtp_blocks, default=None))
        if family is None:
            if rows:
                found.unexpected.append(f"tensor {name}: unknown to the {architecture} layout")
            family = OTHER
        block = BLOCK.match(name)
        is_in_layer = block is not None and architecture in TEXT_ARCHITECTURES and family not in (DRAFT_FAMILY, OTHER)
        found.count(family, tensor.type, tensor.nbytes, int(block[1]) if block and is_in_layer else None)
        found.elements += math.prod(tensor.shape)
        uses[family, tensor.type] += 1
        if tensor.type in BLOCKS_OF_SCALES:
            scales.append(Scales(family, tensor.type, tensor.file, tensor.offset, tensor.nbytes))
    found.encodings = [EncodingUse(family, kind, None, None, n) for (family, kind), n in uses.items()]
    found.scales = count_scales(scales)
    if not rows:
        none_of_ours = "no DeepSeek-V4 model: tensors are counted, and not held against a layout"
        found.notes.append(_describe_imatrix(model) or none_of_ours)
        return found
    if mtp_blocks:
        found.draft, found.draft_layers = Draft.MTP.value, len(mtp_blocks)
        if not any(BLOCK.match(name) and not name.startswith(f"blk.{max(mtp_blocks)}.") for name in model.tensors):
            found.notes.append(DRAFT_ALONE)
    elif architecture == DRAFT:
        found.draft, found.draft_layers = Draft.DSPARK.value, blocks
    if architecture in TEXT_ARCHITECTURES:
        _describe_blocks(found, model, numbers, blocks)
    sizes = {key: numbers.get(name, key) for key, name in SIZE_KEYS.items()}
    sizes["num_hidden_layers"] = len(found.layers)
    if sizes["vocab_size"] is None:  # llama.cpp's converter leaves it out
        tokens = model.metadata.get("tokenizer.ggml.tokens")
        sizes["vocab_size"] = len(tokens) if isinstance(tokens, list) else None
    found.config = {key: sizes[key] for key in SHOWN_KEYS if sizes.get(key)}
    name_variant(found, sizes)
    return found


def _describe_imatrix(model: GgufModelFile) -> str | None:
    """Return what an importance matrix is, None for any other file."""
    if model.metadata.get(TYPE_KEY) != IMATRIX_TYPE:
        return None
    entries = sum(name.endswith(SUMS) for name in model.tensors)
    chunks, texts = model.metadata.get(CHUNKS_KEY), model.metadata.get(DATASETS_KEY)
    run = f", from {counted(chunks, 'chunk')}" if isinstance(chunks, int) else ""
    text = f" of {texts[0]}" if isinstance(texts, list) and texts else ""
    return f"an importance matrix of {counted(entries, 'tensor')}{run}{text}: hf-to-gguf takes it as --imatrix"


MTP_TENSOR = re.compile(r"blk\.\d{1,9}\.(?:nextn|mtp)\.")
TABLE = re.compile(r"blk\.\d{1,9}\.engram_embd\.weight")
BLOCK = re.compile(r"blk\.(\d{1,9})\.")

# Types of which each block begins with its scale, in ``scales.FORMATS``.
BLOCKS_OF_SCALES = ("mxfp4", "q8_0")

# Layers that a description lists; metadata that speak of more are not a model's.
MAX_LAYERS = 10_000

TEXT_ARCHITECTURES = (LLAMA_CPP, PORT, LLAMA_CPP_V41)

# Sizes, by what config.json calls them.
SIZE_KEYS = {key.in_config: key.name for key in KEYS if key.in_config is not None and key.type == "u32"}


class _Numbers:
    """Integers of the metadata by llama.cpp's names, or other ones; what is no integer is listed as unexpected."""

    def __init__(self, model: GgufModelFile, found: Description) -> None:
        self._model = model
        self._found = found

    def _values(self, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
        for key in dict.fromkeys(key_name(self._model.architecture or "", name) for name in names):
            if key in self._model.metadata:
                yield key, self._model.metadata[key]

    def get(self, *names: str) -> int | None:
        for key, value in self._values(names):
            if isinstance(value, int) and not isinstance(value, bool):
                return value
            self._found.unexpected.append(f"key {key}: no integer")
        return None

    def list(self, *names: str) -> list[int]:
        for _, value in self._values(names):
            if isinstance(value, list) and all(isinstance(item, int) for item in value):
                return value
        return []


# The scales of an n-gram table whose bytes are stored as published, in a tensor of their own.
TABLE_SCALES = "engram_embd_scale.weight"


def _tables(architecture: str | None) -> Tables:
    return TABLES[Version.V41 if architecture == LLAMA_CPP_V41 else Version.V4]


def official_rows(architecture: str | None) -> dict[str, str]:
    """Return official names by GGUF name (below ``blk.N.`` for layers) of an architecture's layout."""

    def name_of(row: Row) -> str | None:
        return row.port if architecture == PORT else row.gguf

    rows: dict[str, str] = {}
    if architecture not in (*TEXT_ARCHITECTURES, DRAFT, TOWER):
        return rows
    tables = _tables(architecture)
    layer = "layers.0."
    for prefix, group in (("", tables.top), (layer, tables.layer), (f"{layer}ffn.experts.0.", EXPERT_ROWS)):
        rows |= {name_of(row) or "": prefix + row.name for row in group}
    if architecture == LLAMA_CPP_V41:
        rows[TABLE_SCALES] = f"{layer}engram.embed.scale"
        rows |= {other: rows[name] for name, other in DS4_NAMES.items()}
    for row in MTP_ROWS + (DSPARK_ROWS if architecture == DRAFT else ()):
        rows.setdefault(name_of(row) or "", f"mtp.0.{row.name}")
    if architecture == TOWER:
        for row in VISION_ROWS + VISION_BLOCK_ROWS:
            for name in (row.gguf or "").split():
                rows[name] = f"vision.{row.name}"
    rows.pop("", None)
    return rows


def gguf_family(name: str, rows: Mapping[str, str], first_draft: int | None) -> str | None:
    """Return the family of a GGUF tensor, None for one that the layout does not know."""
    block = re.match(r"(?:v\.)?blk\.(\d+)\.", name)
    base = name[block.end() :] if block else name
    official = rows.get(base)
    if official is None and base.endswith(SECOND_SUFFIX):  # second scales, of NVFP4 experts
        official = rows.get(base.removesuffix(SECOND_SUFFIX) + ".weight", "")
        official = official if ".experts." in official else None
    if official is None:
        return None
    if block and first_draft is not None and int(block[1]) >= first_draft:
        return DRAFT_FAMILY
    return family_of(official)


def _describe_blocks(found: Description, model: GgufModelFile, numbers: _Numbers, blocks: int) -> None:
    """Describe the trunk's layers, and list tensors that they should have and keys that do not fit."""
    ratios = numbers.list("attention.compress_ratios", "compress_ratios")
    hash_layers = numbers.get("hash_layer_count") or 0
    trunk = max(0, blocks - found.draft_layers)
    present = [int(match[1]) for name in model.tensors if (match := BLOCK.match(name))]
    if max(present, default=0) >= max(blocks, 1):
        found.unexpected.append(f"block {max(present)}: beyond block_count {blocks}")
    if len(ratios) < trunk:
        found.unexpected.append(f"compress_ratios: expected at least {trunk} entries, got {len(ratios)}")
    if trunk > MAX_LAYERS:
        found.unexpected.append(f"block_count {blocks}: more layers than any model has")
    for number, ratio in enumerate(ratios[: min(trunk, MAX_LAYERS)]):
        kind = ATTENTION_BY_RATIO.get(ratio)
        if kind is None:
            found.unexpected.append(f"compress_ratios: layer {number} has the unknown ratio {ratio}")
        attention = kind.value if kind is not None else f"ratio {ratio}"
        found.layers.append(Layer(number, attention, "hash" if number < hash_layers else "learned"))
    if model.architecture == LLAMA_CPP_V41:
        _describe_roles(found, model, numbers)
    if found.draft == Draft.NONE.value or model.architecture == PORT:
        wanted = _text_tensors(model, found.layers, ratios, found.roles, numbers.list("engram.layer_ids"))
        found.unexpected += [f"tensor {name} is missing" for name in wanted if name not in model.tensors]


def _describe_roles(found: Description, model: GgufModelFile, numbers: _Numbers) -> None:
    """Describe V4.1's sources and tables; where no keys say which layers are sources, the tensors do."""
    for role, suffixes, mark in (
        ("KV sources", ("attention.kv_source_layers", "kv_source_layer_ids"), "attn_compressor_kv.weight"),
        ("index sources", ("attention.index_source_layers", "index_source_layer_ids"), "indexer.proj.weight"),
    ):
        told = [int(match[1]) for name in model.tensors if (match := BLOCK.match(name)) and name.endswith("." + mark)]
        said = numbers.list(*suffixes)
        if said and sorted(told) != sorted(said):
            found.unexpected.append(f"key {suffixes[0]}: {said}, and the tensors are those of {sorted(told)}")
        if said or told:
            found.roles[role] = said or sorted(told)
    source = numbers.get("attention.indexer.candidate_source_layer", "candidate_source_layer_id")
    if source is not None:
        found.roles["candidate source"] = [source]
    found.unexpected += _wrong_engram_keys(model, numbers)
    for layer in numbers.list("engram.layer_ids"):
        table = model.tensors.get(f"blk.{layer}.engram_embd.weight")
        if table is not None:
            # A row that ends in its scales has one for 32 elements.
            width = numbers.get("engram.key_length") or table.shape[1] * 32 // 33
            found.engram.append(EngramTable(layer, table.shape[0], width))


# What finds the rows of an n-gram table: a factor for each place of an n-gram, a prime for each of its columns.
ENGRAM_LISTS = ("multipliers", "primes", "token_map")


def _wrong_engram_keys(model: GgufModelFile, numbers: _Numbers) -> Iterator[str]:
    """Yield what of the n-gram tables' keys is missing or does not fit together, in llama.cpp's form and in ds4's."""
    layers = numbers.list("engram.layer_ids")
    tables = sorted(int(name.split(".")[1]) for name in model.tensors if TABLE.fullmatch(name))
    if sorted(layers) != tables:
        yield f"key engram.layer_ids: {layers}, and the tables are of {tables}"
    if not layers:
        return
    lists = {name: numbers.list(f"engram.{name}") for name in ENGRAM_LISTS}
    for name, values in lists.items():
        if not values:
            yield f"key engram.{name}: missing, or no list of integers"
    pad_id = numbers.get("engram.pad_id")
    if pad_id is None:
        yield "key engram.pad_id is missing"
    elif lists["token_map"] and pad_id not in lists["token_map"]:
        yield f"key engram.pad_id: {pad_id} is not in the token map"
    for name in ("multipliers", "primes"):
        if len(lists[name]) % len(layers):
            entries = counted(len(lists[name]), "entry", "entries")
            yield f"key engram.{name}: {entries} for {counted(len(layers), 'table')}"
    places, heads = numbers.get("engram.max_ngram_size"), numbers.get("engram.head_count")
    if places is not None and heads is not None:
        wanted = {"multipliers": places, "primes": (places - 1) * heads}
        for name, each in wanted.items():
            if lists[name] and len(lists[name]) != each * len(layers):
                yield f"key engram.{name}: expected {each * len(layers)} entries, got {len(lists[name])}"
    width = len(lists["primes"]) // len(layers)
    for at, layer in enumerate(layers):
        table = model.tensors.get(f"blk.{layer}.engram_embd.weight")
        rows = sum(lists["primes"][at * width : (at + 1) * width])
        if table is not None and lists["primes"] and rows != table.shape[0]:
            yield f"key engram.primes: {counted(rows, 'row')} for layer {layer}, whose table has {table.shape[0]}"


def _text_tensors(
    model: GgufModelFile, layers: Iterable[Layer], ratios: list[int], roles: Mapping[str, list[int]], engram: list[int]
) -> Iterator[str]:
    """Yield the names of all tensors of a text model's trunk."""
    port = model.architecture == PORT
    has_vision = any("exp_probs_b_vl" in name for name in model.tensors)
    tables = _tables(model.architecture)
    yield from (name for row in tables.top if (name := row.port if port else row.gguf) is not None)
    for layer in layers:
        kind = LayerKind(
            ratios[layer.number],
            layer.routing == "hash",
            has_vision,
            kv_source=layer.number in roles.get("KV sources", ()),
            index_source=layer.number in roles.get("index sources", ()),
            engram=layer.number in engram,
        )
        for row in tables.layer + EXPERT_ROWS:
            name = row.port if port else row.gguf
            if name in DS4_NAMES and f"blk.{layer.number}.{DS4_NAMES[name]}" in model.tensors:
                name = DS4_NAMES[name]
            if name and applies(row.when, kind):
                yield f"blk.{layer.number}.{name}"
