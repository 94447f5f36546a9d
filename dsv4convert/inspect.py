"""Describes a checkpoint folder, a GGUF or a folder of shards, from headers alone.

A description does not stop at the first thing that is wrong: whatever can be read is described, and what
does not belong or is not there is listed. Only files that cannot be read at all end in an error.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoint.folder import INDEX_NAME, read_folder_headers, vision_kind
from .checkpoint.gguf_file import GgufModelFile, is_gguf, open_gguf
from .checkpoint.renaming import official_name, official_tensors
from .checkpoint.safetensors_header import Stored, read_header
from .checkpoint.shards import is_shard_folder, open_shards
from .checkpoint.weights import Weight, pair
from .config import ATTENTION_BY_RATIO, ModelConfig, load_config
from .errors import ConfigError, InputMissingError, InventoryError, UsageError, escape_control
from .layouts.names import (
    DSPARK_ROWS,
    EXPERT_ROWS,
    LAYER_ROWS,
    MTP_ROWS,
    TOP_ROWS,
    UNUSED_DRAFT_SUFFIXES,
    VISION_BLOCK_ROWS,
    VISION_ROWS,
    Draft,
    Row,
    applies,
    expected_tensors,
    scale_name,
    vision_tensors,
)
from .layouts.parallel import SHARD_NAME

DRAFT_LAYER = re.compile(r"mtp\.(\d+)\.")
DSPARK_TENSORS = (".main_proj.weight", ".markov_head.markov_w1.weight")

MAX_LISTED = 20

# What a name contains, and the family that it then belongs to; the first match counts.
FAMILIES: tuple[tuple[str, str], ...] = (
    (r"^mtp\.", "draft"),
    (r"^(vision|aligner)\.|^image_", "vision"),
    (r"^embed\.", "embedding"),
    (r"^head\.", "head"),
    (r"\.experts\.", "routed experts"),
    (r"\.shared_experts\.", "shared experts"),
    (r"\.ffn\.gate\.", "router"),
    (r"\.indexer\.", "indexer"),
    (r"\.compressor\.", "compressor"),
    (r"(^|\.)hc_", "hyper-connections"),
    (r"norm\.weight$", "norms"),
    (r"\.attn\.", "attention"),
)
OTHER = "other"
EXPERTS = "routed experts"

# The config keys that make a model the size it is; the others of these may be cut down in a slice.
WIDTH_KEYS = (
    "hidden_size",
    "num_attention_heads",
    "head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "moe_intermediate_size",
    "index_n_heads",
    "index_head_dim",
)
DEPTH_KEYS = ("num_hidden_layers", "n_routed_experts", "vocab_size")
PUBLISHED_SIZES = {"V4-Flash": "v4-flash.json", "V4-Pro": "v4-pro.json"}
CUSTOM = "custom"

# What of the config a description shows.
SHOWN_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass
class Count:
    """Tensors and bytes of one kind."""

    tensors: int = 0
    bytes: int = 0

    def add(self, nbytes: int) -> None:
        """Count one more tensor."""
        self.tensors += 1
        self.bytes += nbytes


class Layer(NamedTuple):
    """A layer: its number, attention kind (sliding, CSA, HCA) and routing kind (hash, learned)."""

    number: int
    attention: str
    routing: str


class EncodingUse(NamedTuple):
    """How many weights of a family are stored in one way; ``block`` is what shares a scale."""

    family: str
    encoding: str
    scale: str | None
    block: tuple[int, int] | None
    weights: int


@dataclass
class Description:
    """What there is at ``path``; ``unexpected`` lists all that does not belong or is missing."""

    path: str
    kind: str
    variant: str = CUSTOM
    traits: list[str] = field(default_factory=list)
    files: int = 0
    tensors: int = 0
    bytes: int = 0
    elements: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    draft: str = Draft.NONE.value
    draft_layers: int = 0
    families: dict[str, Count] = field(default_factory=dict)
    dtypes: dict[str, Count] = field(default_factory=dict)
    encodings: list[EncodingUse] = field(default_factory=list)
    ranks: int | None = None
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def count(self, family: str, dtype: str, nbytes: int) -> None:
        """Count a tensor under its family and its dtype."""
        self.families.setdefault(family, Count()).add(nbytes)
        self.dtypes.setdefault(dtype, Count()).add(nbytes)
        self.tensors += 1
        self.bytes += nbytes

    def as_json(self) -> dict[str, Any]:
        """Return the description as plain JSON values (schemas/inspect.schema.json)."""
        values = asdict(self)
        values["layers"] = [layer._asdict() for layer in self.layers]
        values["encodings"] = [use._asdict() for use in self.encodings]
        return values

    def lines(self) -> Iterator[str]:
        """Yield the description as lines of text, control characters escaped."""
        return map(escape_control, self._lines())

    def _lines(self) -> Iterator[str]:
        traits = f" ({', '.join(self.traits)})" if self.traits else ""
        yield f"{self.path}: {self.kind}, {self.variant}{traits}"
        ranks = "" if self.ranks is None else f", {self.ranks} ranks"
        yield (
            f"{self.files} file{'s' if self.files != 1 else ''}{ranks}, {self.tensors:,} tensors, "
            f"{self.bytes:,} bytes, {self.elements:,} elements"
        )
        if self.config:
            yield "config: " + ", ".join(f"{key} {value}" for key, value in self.config.items())
        yield from (f"layers {span}" for span in _layer_spans(self.layers))
        if self.draft != Draft.NONE.value:
            yield f"draft: {self.draft}, {self.draft_layers} layer{'s' if self.draft_layers != 1 else ''}"
        for title, counts in (("family", self.families), ("dtype", self.dtypes)):
            for name, count in sorted(counts.items(), key=lambda item: -item[1].bytes):
                tensors = "1 tensor" if count.tensors == 1 else f"{count.tensors:,} tensors"
                yield f"{title} {name}: {tensors}, {count.bytes:,} bytes"
        for use in sorted(self.encodings, key=lambda use: use.family):
            scale = "" if use.scale is None else f", {use.scale} scales"
            block = "" if use.block is None else f", blocks {use.block[0]}x{use.block[1]}"
            weights = "1 weight" if use.weights == 1 else f"{use.weights:,} weights"
            yield f"encoding of {use.family}: {use.encoding}{scale}{block} ({weights})"
        for note in self.notes:
            yield f"note: {note}"
        for problem in self.unexpected[:MAX_LISTED]:
            yield f"unexpected: {problem}"
        if len(self.unexpected) > MAX_LISTED:
            yield f"unexpected: {len(self.unexpected) - MAX_LISTED} more (see --json)"
        if not self.unexpected:
            yield "nothing unexpected"


def inspect_path(path: Path) -> Description:
    """Describe what there is at ``path``: a checkpoint folder, a GGUF or a folder of shards.

    Raises:
        InputMissingError: nothing there, or nothing that is one of them.
        FileFormatError: a file with a header that cannot be read.
        UnsupportedError: another architecture.
    """
    if not path.exists():
        raise InputMissingError("no such file or folder", where=path)
    if path.is_file() and path.suffix == ".safetensors":
        path = path.parent
    if is_shard_folder(path):
        return _describe_shards(path)
    if is_gguf(path) and not (path.is_dir() and any(path.glob("*.safetensors"))):
        return _describe_gguf(path)
    if path.is_dir():
        return _describe_folder(path)
    raise InputMissingError(
        "neither a checkpoint folder nor a GGUF", where=path, hint="give a folder with config.json or a .gguf file"
    )


def family_of(name: str) -> str:
    """Return the family of a tensor by its official name.

    >>> family_of("layers.3.attn.compressor.norm.weight")
    'compressor'
    """
    for pattern, family in _compiled_families():
        if pattern.search(name):
            return family
    return OTHER


@cache
def _compiled_families() -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern), family) for pattern, family in FAMILIES)


def _layer_spans(layers: Iterable[Layer]) -> Iterator[str]:
    """Yield runs of like layers: ``2-41: CSA and HCA alternating, learned routing`` takes one line."""
    runs: list[tuple[list[int], str, str]] = []
    for layer in layers:
        for numbers, attention, routing in runs:
            if (attention, routing) == (layer.attention, layer.routing):
                numbers.append(layer.number)
                break
        else:
            runs.append(([layer.number], layer.attention, layer.routing))
    for numbers, attention, routing in runs:
        yield f"{_ranges(numbers)}: {attention} attention, {routing} routing ({len(numbers)})"


def _ranges(numbers: list[int]) -> str:
    """Return numbers as ranges, with the step where it is not one.

    >>> _ranges([0, 1, 2, 4, 6, 8, 11])
    '0-2,4-8/2,11'
    """
    spans: list[str] = []
    start = 0
    while start < len(numbers):
        end = start + 1
        step = numbers[end] - numbers[start] if end < len(numbers) else 1
        while end < len(numbers) and numbers[end] - numbers[end - 1] == step:
            end += 1
        if end - start < 3 and step != 1:
            end = start + 1
        first, last = numbers[start], numbers[end - 1]
        spans.append(str(first) if first == last else f"{first}-{last}" + (f"/{step}" if step != 1 else ""))
        start = end
    return ",".join(spans)


def _describe_config(found: Description, config: ModelConfig) -> None:
    found.config = {key: getattr(config, key) for key in SHOWN_KEYS}
    found.layers = [
        Layer(
            number,
            config.attention(number).value,
            "hash" if config.is_hash_routed(number) else "learned",
        )
        for number in range(config.num_hidden_layers)
    ]


def _name_variant(found: Description, sizes: Mapping[str, Any]) -> None:
    """Name the variant by its sizes, its draft, its vision tower and how its experts are stored."""
    experts = max((use for use in found.encodings if use.family == EXPERTS), key=lambda use: use.weights, default=None)
    size = _published_size(sizes)
    suffix = ""
    if experts is not None and experts.encoding == "fp8" and experts.scale == "F32":
        suffix = "-Base"
    if "vision" in found.families:
        suffix += " Vision-Exp"
        found.traits.append("vision tower")
    elif found.draft == Draft.DSPARK.value:
        suffix += "-0731"
    found.variant = size + suffix if size in PUBLISHED_SIZES else size
    if found.draft != Draft.NONE.value:
        found.traits.append(f"{found.draft} draft")
    if experts is not None:
        scales = f", {experts.scale} scales" if experts.scale is not None else ""
        found.traits.append(f"{experts.encoding} experts{scales}")


def _published_size(sizes: Mapping[str, Any]) -> str:
    """Return the published model whose sizes these are, or of which they are a slice, or "custom"."""
    for name, file in PUBLISHED_SIZES.items():
        text = (resources.files(__package__) / "configs" / file).read_text(encoding="utf-8")
        published = json.loads(text)
        if all(sizes.get(key) == published[key] for key in WIDTH_KEYS):
            whole = all(sizes.get(key) == published[key] for key in DEPTH_KEYS)
            return name if whole else f"slice of {name}"
    return CUSTOM


# Checkpoint folders


def _describe_folder(folder: Path) -> Description:
    found = Description(str(folder), "checkpoint folder")
    config = _lenient_config(folder, found)
    stored, files, notes = _lenient_headers(folder, found)
    found.files = len(files)
    found.notes += notes
    for name, tensor in stored.items():
        found.count(family_of(official_name(name)), tensor.dtype, tensor.nbytes)
    tensors: dict[str, Stored] = {}
    try:
        tensors = official_tensors(stored, 0 if config is None else config.n_routed_experts)
    except InventoryError as error:
        found.unexpected.append(str(error))
        tensors = {official_name(name): tensor for name, tensor in stored.items()}
    found.draft, found.draft_layers = _draft_of(tensors, found)
    if config is None:
        found.elements = sum(math.prod(tensor.shape) for tensor in tensors.values())
        return found
    _describe_config(found, config)
    _describe_weights(found, config, tensors)
    _name_variant(found, {key: getattr(config, key) for key in WIDTH_KEYS + DEPTH_KEYS})
    return found


def _lenient_config(folder: Path, found: Description) -> ModelConfig | None:
    try:
        return load_config(folder)
    except (ConfigError, InputMissingError) as error:
        found.unexpected.append(str(error))
        return None


def _lenient_headers(folder: Path, found: Description) -> tuple[dict[str, Stored], tuple[Path, ...], tuple[str, ...]]:
    """Return the headers of a folder; where index and files disagree, those of all files that are there."""
    try:
        return read_folder_headers(folder)
    except (InputMissingError, InventoryError) as error:
        files = tuple(sorted(folder.glob("*.safetensors")))
        if not files:
            raise
        found.unexpected.append(str(error))
        if not (folder / INDEX_NAME).is_file():
            found.notes.append("without an index, all safetensors files are taken to belong together")
    stored: dict[str, Stored] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in stored:
                found.unexpected.append(f"tensor {name}: in {stored[name].file.name} and in {file.name}")
            stored[name] = tensor
    return stored, files, ()


def _draft_of(names: Iterable[str], found: Description) -> tuple[str, int]:
    numbers: set[int] = set()
    is_dspark = False
    for name in names:
        match = DRAFT_LAYER.match(name)
        if match is not None:
            numbers.add(int(match[1]))
            is_dspark = is_dspark or name.endswith(DSPARK_TENSORS)
    if not numbers:
        return Draft.NONE.value, 0
    if len(numbers) != max(numbers) + 1:
        found.unexpected.append(f"draft layers {_ranges(sorted(numbers))}: not numbered from 0 without a gap")
    return (Draft.DSPARK if is_dspark else Draft.MTP).value, len(numbers)


def _describe_weights(found: Description, config: ModelConfig, tensors: Mapping[str, Stored]) -> None:
    """Hold the tensors against the tables: encodings of those that fit, a line for each that does not."""
    left = dict(tensors)
    weights: list[Weight] = []
    missing: list[str] = []
    has_vision, has_tower = vision_kind(tensors)
    expectations = expected_tensors(config, Draft(found.draft), found.draft_layers, has_vision)
    for expected in _chain(expectations, lambda: vision_tensors(config), has_tower, found):
        stored = left.pop(expected.name, None)
        if stored is None:
            missing.append(expected.name)
            continue
        scale = left.pop(scale_name(expected.name), None) if expected.name.endswith(".weight") else None
        try:
            weight = pair(expected, stored, scale)
        except InventoryError as error:
            found.unexpected.append(str(error))
            continue
        found.elements += math.prod(weight.shape)
        weights.append(weight)
    _count_encodings(found, weights)
    copies = [name for name in left if name.endswith(UNUSED_DRAFT_SUFFIXES) and DRAFT_LAYER.match(name)]
    if copies:
        found.notes.append(f"{', '.join(copies)}: the draft's copies of embedding and head, which nothing reads")
    found.unexpected += [f"tensor {name}: missing" for name in missing]
    found.unexpected += [f"tensor {name}: unknown" for name in left if name not in set(copies)]


def _chain(
    text: Iterable[Any], vision: Callable[[], Iterable[Any]], has_vision: bool, found: Description
) -> Iterator[Any]:
    yield from text
    if has_vision:
        try:
            yield from vision()
        except ConfigError as error:
            found.unexpected.append(str(error))


def _count_encodings(found: Description, weights: Iterable[Weight]) -> None:
    uses: Counter[tuple[str, str, str | None, tuple[int, int] | None]] = Counter()
    for weight in weights:
        family = EXPERTS if weight.expert is not None else family_of(weight.name)
        scale = None if weight.scale is None else weight.scale.dtype
        uses[family, weight.encoding.value, scale, weight.block] += 1
    found.encodings = [EncodingUse(*key, count) for key, count in uses.items()]


# GGUF


def _describe_gguf(path: Path) -> Description:
    model = open_gguf(path)
    found = Description(str(path), "GGUF")
    found.files = len(model.parts)
    architecture = model.architecture
    found.traits.append(f"architecture {architecture}")
    rows = _gguf_rows(architecture)
    numbers = _Numbers(model, found)
    blocks = numbers.get("block_count") or 0
    mtp_blocks = {int(name.split(".")[1]) for name in model.tensors if MTP_TENSOR.match(name)}
    uses: Counter[tuple[str, str]] = Counter()
    for name, tensor in model.tensors.items():
        family = _gguf_family(name, rows, min(mtp_blocks, default=None))
        if family is None:
            if rows:
                found.unexpected.append(f"tensor {name}: unknown to the {architecture} layout")
            family = OTHER
        found.count(family, tensor.type, tensor.nbytes)
        found.elements += math.prod(tensor.shape)
        uses[family, tensor.type] += 1
    found.encodings = [EncodingUse(family, kind, None, None, n) for (family, kind), n in uses.items()]
    if not rows:
        found.notes.append("no DeepSeek-V4 model: tensors are counted, and not held against a layout")
        return found
    if mtp_blocks:
        found.draft, found.draft_layers = Draft.MTP.value, len(mtp_blocks)
        if not any(BLOCK.match(name) and not name.startswith(f"blk.{max(mtp_blocks)}.") for name in model.tensors):
            found.notes.append("a draft's own file: the layers are those of the model that it belongs to")
    elif architecture == "dflash":
        found.draft, found.draft_layers = Draft.DSPARK.value, blocks
    if architecture in TEXT_ARCHITECTURES:
        _describe_blocks(found, model, numbers, blocks)
    sizes = {key: numbers.get(*suffixes) for key, suffixes in GGUF_SIZE_KEYS.items()}
    sizes["num_hidden_layers"] = len(found.layers)
    if sizes["vocab_size"] is None:  # llama.cpp's converter leaves it out
        tokens = model.metadata.get("tokenizer.ggml.tokens")
        sizes["vocab_size"] = len(tokens) if isinstance(tokens, list) else None
    found.config = {key: sizes[key] for key in SHOWN_KEYS if sizes.get(key)}
    _name_variant(found, sizes)
    return found


MTP_TENSOR = re.compile(r"blk\.\d{1,9}\.(?:nextn|mtp)\.")
BLOCK = re.compile(r"blk\.(\d{1,9})\.")

# Layers that a description lists; metadata that speak of more are not a model's.
MAX_LAYERS = 10_000

# config.json keys and what they are called below the architecture's name, in either dialect.
GGUF_SIZE_KEYS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("embedding_length",),
    "num_hidden_layers": ("block_count",),
    "num_attention_heads": ("attention.head_count",),
    "head_dim": ("attention.key_length",),
    "q_lora_rank": ("attention.q_lora_rank",),
    "o_groups": ("attention.output_group_count", "o_groups"),
    "o_lora_rank": ("attention.output_lora_rank", "o_lora_rank"),
    "moe_intermediate_size": ("expert_feed_forward_length",),
    "n_routed_experts": ("expert_count",),
    "num_experts_per_tok": ("expert_used_count",),
    "index_n_heads": ("attention.indexer.head_count",),
    "index_head_dim": ("attention.indexer.key_length",),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("context_length",),
}
TEXT_ARCHITECTURES = ("deepseek4", "deepseek-v4")


class _Numbers:
    """Integers of the metadata below the architecture's name; what is none is listed as unexpected."""

    def __init__(self, model: GgufModelFile, found: Description) -> None:
        self._model = model
        self._found = found

    def get(self, *suffixes: str) -> int | None:
        for suffix in suffixes:
            key = f"{self._model.architecture}.{suffix}"
            value = self._model.metadata.get(key)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
            if value is not None:
                self._found.unexpected.append(f"key {key}: no integer")
        return None

    def list(self, *suffixes: str) -> list[int]:
        for suffix in suffixes:
            value = self._model.metadata.get(f"{self._model.architecture}.{suffix}")
            if isinstance(value, list) and all(isinstance(item, int) for item in value):
                return value
        return []


def _gguf_rows(architecture: str | None) -> dict[str, str]:
    """Return official names by GGUF name (below ``blk.N.`` for layers) of an architecture's layout."""

    def name_of(row: Row) -> str | None:
        return row.port if architecture == "deepseek-v4" else row.gguf

    rows: dict[str, str] = {}
    if architecture not in (*TEXT_ARCHITECTURES, "dflash", "clip"):
        return rows
    for row in TOP_ROWS:
        rows[name_of(row) or ""] = row.name
    for row in LAYER_ROWS:
        rows[name_of(row) or ""] = f"layers.0.{row.name}"
    for row in EXPERT_ROWS:
        rows[name_of(row) or ""] = f"layers.0.ffn.experts.0.{row.name}"
    for row in MTP_ROWS + (DSPARK_ROWS if architecture == "dflash" else ()):
        rows.setdefault(name_of(row) or "", f"mtp.0.{row.name}")
    if architecture == "clip":
        for row in VISION_ROWS + VISION_BLOCK_ROWS:
            for name in (row.gguf or "").split():
                rows[name] = f"vision.{row.name}"
    rows.pop("", None)
    return rows


def _gguf_family(name: str, rows: Mapping[str, str], first_draft: int | None) -> str | None:
    """Return the family of a GGUF tensor, None for one that the layout does not know."""
    block = re.match(r"(?:v\.)?blk\.(\d+)\.", name)
    official = rows.get(name[block.end() :] if block else name)
    if official is None:
        return None
    if block and first_draft is not None and int(block[1]) >= first_draft:
        return "draft"
    return family_of(official)


def _describe_blocks(found: Description, model: GgufModelFile, numbers: _Numbers, blocks: int) -> None:
    """Describe the trunk's layers, and list tensors that they should have and keys that do not fit."""
    ratios = numbers.list("attention.compress_ratios", "compress_ratios")
    hash_layers = numbers.get("hash_layer_count", "n_hash_layers") or 0
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
    if found.draft == Draft.NONE.value or model.architecture == "deepseek-v4":
        wanted = _text_tensors(model, found.layers, ratios)
        found.unexpected += [f"tensor {name}: missing" for name in wanted if name not in model.tensors]


def _text_tensors(model: GgufModelFile, layers: Iterable[Layer], ratios: list[int]) -> Iterator[str]:
    """Yield the names of all tensors of a text model's trunk."""
    port = model.architecture == "deepseek-v4"
    has_vision = any("exp_probs_b_vl" in name for name in model.tensors)
    yield from (name for row in TOP_ROWS if (name := row.port if port else row.gguf) is not None)
    for layer in layers:
        for row in LAYER_ROWS + EXPERT_ROWS:
            name = row.port if port else row.gguf
            if name and applies(row.when, ratios[layer.number], layer.routing == "hash", has_vision):
                yield f"blk.{layer.number}.{name}"


# Shards


def _describe_shards(folder: Path) -> Description:
    found = Description(str(folder), "model-parallel shards")
    config = _lenient_config(folder, found)
    matches = [
        (path, match)
        for path in sorted(folder.glob("*.safetensors"))
        if (match := SHARD_NAME.fullmatch(path.name)) is not None
    ]
    found.files = len(matches)
    found.ranks = max(int(match[2]) for _, match in matches)
    names: set[str] = set()
    for path, _ in matches:
        for name, tensor in read_header(path).items():
            names.add(name)
            found.count(family_of(name), tensor.dtype, tensor.nbytes)
    found.draft, found.draft_layers = _draft_of(names, found)
    if config is not None:
        _describe_config(found, config)
        try:
            weights = open_shards(folder).weights.values()
        except (InputMissingError, InventoryError, UsageError) as error:
            found.unexpected.append(str(error))
        else:
            found.elements = sum(math.prod(weight.shape) for weight in weights)
            _count_encodings(found, (weight.parts[0] for weight in weights))
        _name_variant(found, {key: getattr(config, key) for key in WIDTH_KEYS + DEPTH_KEYS})
    return found
