"""A GGUF as a weight source: official names, config and locations through the name and key tables."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ...containers.gguf import GgufModelFile, GgufTensor
from ...errors import FileFormatError, InventoryError, UnsupportedError, either
from ...model.config import ARCHITECTURES, ModelConfig, Version, parse_config
from ...model.engram import INT64_MAX, EngramConstants
from ...model.gguf_keys import GATING_FUNCTIONS, KEYS, LLAMA_CPP_V41, NEXTN_KEY, YARN, key_name
from ...model.tensors import Draft, Expected, expected_tensors
from ...targets.engram_tables import SCALE_SUFFIX
from ...targets.gguf_tensors import DIALECTS as TENSOR_DIALECTS
from ...targets.gguf_tensors import DIALECTS_V41, NVFP4, SECOND_SUFFIX, SHARED_WITH_MTP, TensorDialect
from .decode import F32_BYTES, GGML_KINDS, ROW_SCALE_ELEMENTS, Factor, Matrix, Scale, gather_rows, read_rows
from .protocol import Array, NamedSource, no_engram_constants

# By architecture. The file of ds4 is one of llama.cpp's in other types.
READABLE = {
    dialect.architecture: dialect
    for dialect in (TENSOR_DIALECTS["llama.cpp"], TENSOR_DIALECTS["deepseek-v4"], DIALECTS_V41["llama.cpp"])
}

# config.json key by metadata key of V4.1, which files may lack, and the tensor that tells a source where they do.
SOURCE_KEYS = {
    "attention.kv_source_layers": ("kv_source_layer_ids", "attn_compressor_kv.weight"),
    "attention.index_source_layers": ("index_source_layer_ids", "indexer.attn_q_b.weight"),
}
CANDIDATE_KEYS = {
    f"attention.indexer.{key}": f"{key}{suffix}"
    for key, suffix in (("candidate_source_layer", "_id"), ("candidate_topk_blocks", ""), ("candidate_block_size", ""))
}

# The n-gram tables, by the end of their name, and ggml's type of those that keep the published bytes.
TABLE, I8 = "engram.embed.weight", "i8"

CLAMPS = ("swiglu_clamp_exp", "swiglu_clamp_shexp")


class Location(NamedTuple):
    """Where a weight lies: rows of a matrix, of which ``columns`` (all when None)."""

    matrix: Matrix
    shape: tuple[int, ...]
    columns: tuple[int, int] | None


class GgufSource(NamedSource[Location]):
    """Weights of a GGUF of ours or llama.cpp's, each decoded when it is asked for.

    Raises:
        UnsupportedError: another architecture, or a tensor type that is not decoded here.
        FileFormatError, ConfigError: metadata that are missing or make no model.
        InventoryError: a tensor of another shape than the metadata ask for.
    """

    def __init__(self, file: GgufModelFile) -> None:
        dialect, n_draft, self._engram, config = _read(file)
        super().__init__(config, _locations(file, dialect, config, n_draft), file.files[0])

    def _whole(self, held: Location) -> Array:
        return _cut(read_rows(held.matrix), held).reshape(held.shape)

    def _rows(self, held: Location, indices: Array) -> Array:
        return _cut(gather_rows(held.matrix, indices), held)

    def engram_constants(self) -> EngramConstants:
        """Return what finds the rows of V4.1's n-gram tables, as the key-values hold it.

        Raises:
            ConfigError: they do not.
        """
        if self._engram is None:
            raise no_engram_constants(self._where)
        return self._engram


def gguf_config(file: GgufModelFile) -> tuple[ModelConfig, int]:
    """Return the hyperparameters that a GGUF's key-values state, and its number of draft layers.

    Raises:
        UnsupportedError: another architecture.
        FileFormatError, ConfigError: metadata that are missing or make no model.
    """
    _, n_draft, _, config = _read(file)
    return config, n_draft


def _read(file: GgufModelFile) -> tuple[TensorDialect, int, EngramConstants | None, ModelConfig]:
    """Return the dialect, the number of draft layers, the constants of n-gram tables and the hyperparameters."""
    dialect = _dialect(file)
    fields = _Fields(file, dialect)
    n_draft = _draft_layers(fields, file, dialect)
    engram = _engram_constants(fields, file.files[0]) if dialect.architecture == LLAMA_CPP_V41 else None
    return dialect, n_draft, engram, _config(fields, file, n_draft, engram)


def _cut(rows: Array, location: Location) -> Array:
    if location.columns is None:
        return rows
    first, last = location.columns
    return rows[:, first:last]


def _dialect(file: GgufModelFile) -> TensorDialect:
    if file.architecture in READABLE:
        return READABLE[file.architecture]
    raise UnsupportedError(
        "unsupported architecture",
        where=file.files[0],
        expected=either(READABLE),
        got=repr(file.architecture)[:100],
    )


class _Fields:
    """Metadata by llama.cpp's names, whatever a dialect calls the key."""

    def __init__(self, file: GgufModelFile, dialect: TensorDialect) -> None:
        self._metadata = file.metadata
        self._architecture = dialect.architecture
        self._path = file.files[0]

    def key(self, name: str) -> str:
        return key_name(self._architecture, name)

    def get(self, name: str, default: Any = None) -> Any:
        return self._metadata.get(self.key(name), default)

    def __getitem__(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise FileFormatError(f"key {self.key(name)} is missing", where=self._path)
        return value


def _draft_layers(fields: _Fields, file: GgufModelFile, dialect: TensorDialect) -> int:
    """Return how many of the blocks are draft layers; the port counts them nowhere, but their names tell."""
    if dialect.mtp_inline:
        return sum(name.endswith(".mtp.enorm.weight") for name in file.tensors)
    count = fields.get(NEXTN_KEY.name, 0)
    return count if isinstance(count, int) else 0


def _config(fields: _Fields, file: GgufModelFile, n_draft: int, engram: EngramConstants | None) -> ModelConfig:
    """Return the config in its published form, validated as such."""
    path = file.files[0]
    blocks = fields["block_count"]
    if not isinstance(blocks, int) or not 0 <= n_draft < blocks:
        raise FileFormatError(f"key {fields.key('block_count')}: no count of layers", where=path, got=blocks)
    same = {key.in_config: key.name for key in KEYS if key.in_config is not None}
    scaling = {key.removeprefix(YARN): same.pop(key) for key in list(same) if key.startswith(YARN)}
    del same["vocab_size"]  # llama.cpp's converter leaves it to the embedding
    raw: dict[str, Any] = {key: fields[name] for key, name in same.items()}
    is_v41 = file.architecture == LLAMA_CPP_V41
    raw["architectures"] = [ARCHITECTURES[Version.V41 if is_v41 else Version.V4]]
    raw["num_hidden_layers"] = blocks - n_draft
    raw["num_nextn_predict_layers"] = n_draft
    raw["vocab_size"] = fields.get("vocab_size") or _rows_of(file, "token_embd.weight")
    raw["swiglu_limit"] = _clamp(fields, path)
    gating = fields["expert_gating_func"]
    raw["scoring_func"] = {number: name for name, number in GATING_FUNCTIONS.items()}.get(gating, gating)
    if fields.get("rope.scaling.type") is not None:
        raw["rope_scaling"] = {key: fields[name] for key, name in scaling.items()}
        raw["rope_scaling"]["type"] = fields["rope.scaling.type"]
    for role in ("bos", "eos"):
        raw[f"{role}_token_id"] = file.metadata.get(f"tokenizer.ggml.{role}_token_id")
    if is_v41:
        raw["compress_ratios"] = raw["compress_ratios"][:blocks]  # the draft's follow; it has its own file
        raw |= _v41_values(fields, file, blocks, engram)
    return parse_config(raw, path)


def _v41_values(fields: _Fields, file: GgufModelFile, blocks: int, engram: EngramConstants | None) -> dict[str, Any]:
    """Return V4.1's own config keys; the tensors tell the roles of layers where no key has them."""
    raw: dict[str, Any] = {}
    for name, (key, tensor) in SOURCE_KEYS.items():
        ids = fields.get(name)
        raw[key] = [n for n in range(blocks) if f"blk.{n}.{tensor}" in file.tensors] if ids is None else ids
    raw |= {key: fields[name] for name, key in CANDIDATE_KEYS.items() if fields.get(name) is not None}
    if engram is not None:
        raw |= {
            "engram_layer_ids": list(engram.layer_ids),
            "engram_num_embeddings": list(engram.rows),
            "engram_max_ngram_size": fields["engram.max_ngram_size"],
            "engram_vocab_size": engram.primes[0][0],
            "engram_n_heads": fields["engram.head_count"],
            "engram_head_dim": fields["engram.key_length"],
            "engram_pad_token_id": engram.token_map.tolist().index(engram.pad_id),
            "engram_compressed_vocab_size": int(engram.token_map.max()) + 1,
        }
    return raw


def _engram_constants(fields: _Fields, path: object) -> EngramConstants | None:
    """Return what finds the rows of n-gram tables, None where the file has none.

    Raises:
        FileFormatError: a key is missing, or its list is of another length than the others ask for, or leads
            outside the tables.
    """
    layers = fields.get("engram.layer_ids")
    if not layers:
        return None
    places = fields["engram.max_ngram_size"]
    columns = (places - 1) * fields["engram.head_count"]

    def by_layer(name: str, width: int) -> tuple[tuple[int, ...], ...]:
        values = fields[name]
        if width < 1 or len(values) != len(layers) * width:
            raise FileFormatError(
                f"key {fields.key(name)}: wrong length", where=path, expected=len(layers) * width, got=len(values)
            )
        return tuple(tuple(map(int, values[a : a + width])) for a in range(0, len(values), width))

    token_map = np.asarray(fields["engram.token_map"], np.int32)
    pad_id = int(fields["engram.pad_id"])
    if pad_id not in token_map:
        raise FileFormatError(f"key {fields.key('engram.pad_id')}: not in the token map", where=path, got=pad_id)
    if token_map.min() < 0:
        raise FileFormatError(
            f"key {fields.key('engram.token_map')}: no ids", where=path, expected="0 or more", got=int(token_map.min())
        )
    constants = EngramConstants(
        tuple(map(int, layers)),
        by_layer("engram.multipliers", places),
        by_layer("engram.primes", columns),
        by_layer("engram.offsets", columns),
        token_map,
        pad_id,
    )
    # The hash of a token is an int64, and so must be the products that it is made of.
    most = INT64_MAX // max(1, int(token_map.max()))
    for multiplier in (value for values in constants.multipliers for value in values):
        if not 0 <= multiplier <= most:
            raise FileFormatError(
                f"key {fields.key('engram.multipliers')}: products beyond int64",
                where=path,
                expected=f"at most {most}",
                got=multiplier,
            )
    for layer, primes, offsets in zip(constants.layer_ids, constants.primes, constants.offsets, strict=True):
        for prime, offset in zip(primes, offsets, strict=True):
            if prime < 1 or not 0 <= offset <= sum(primes) - prime:
                raise FileFormatError(
                    f"keys {fields.key('engram.primes')} and {fields.key('engram.offsets')}: rows outside the table",
                    where=path,
                    expected=f"runs within the {sum(primes)} rows of layer {layer}",
                    got=f"{prime} from {offset} on",
                )
    return constants


def _rows_of(file: GgufModelFile, name: str) -> int:
    """Return the rows of a tensor."""
    if name not in file.tensors:
        raise FileFormatError(f"tensor {name} is missing", where=file.files[0])
    return file.tensors[name].shape[0]


def _clamp(fields: _Fields, path: object) -> float:
    limits = {limit for name in CLAMPS for limit in fields[name]}
    if len(limits) != 1:
        raise UnsupportedError(
            f"key {fields.key(CLAMPS[0])}: a limit that differs by layer",
            where=path,
            got=sorted(limits)[:4],
        )
    return float(limits.pop())


def _locations(file: GgufModelFile, dialect: TensorDialect, config: ModelConfig, n_draft: int) -> dict[str, Location]:
    """Return where each weight lies, by official name; what the file lacks is left out."""
    is_mtp_file = n_draft > 0 and not dialect.mtp_inline
    locations: dict[str, Location] = {}
    for expected in expected_tensors(config, Draft.MTP if n_draft else Draft.NONE, n_draft):
        if is_mtp_file and expected.layer is None and expected.name not in SHARED_WITH_MTP:
            continue  # the names of the trunk's hc_head stand for the MTP's
        name = dialect.name_of(expected.row)
        if name is None:
            continue
        if expected.layer is not None and not (expected.is_draft and name.startswith("output")):
            shift = config.num_hidden_layers if expected.is_draft else 0
            name = f"blk.{expected.layer + shift}.{name}"
        tensor = file.tensors.get(name)
        if tensor is not None:
            if expected.name.endswith(TABLE) and tensor.type == I8:
                locations[expected.name] = _table_location(tensor, expected, file)
            else:
                locations[expected.name] = _location(tensor, expected, config, file)
    return locations


def _table_location(tensor: GgufTensor, expected: Expected, file: GgufModelFile) -> Location:
    """Return where an n-gram table lies that is stored as published: scales in its rows, or in a tensor of their own.

    Raises:
        InventoryError: its shape, or that of its scales, is another.
    """
    rows, columns = expected.shape
    n_scales = columns // ROW_SCALE_ELEMENTS
    scales = file.tensors.get(tensor.name.replace(".weight", f"{SCALE_SUFFIX}.weight"))
    kind, scale = "fp8/row", None
    if scales is not None:
        block = 1, ROW_SCALE_ELEMENTS
        kind, scale = "fp8", Scale(scales.file, scales.offset, "F8_E8M0", (rows, n_scales), block)
        if scales.shape != (rows, n_scales) or scales.type != I8:
            raise _wrong_shape(scales, [rows, n_scales])
    width = columns + (n_scales if scales is None else 0)
    if tensor.shape != (rows, width):
        raise _wrong_shape(tensor, [rows, width])
    return Location(Matrix(tensor.file, tensor.offset, kind, rows, columns, scale), expected.shape, None)


def _wrong_shape(tensor: GgufTensor, expected: list[int]) -> InventoryError:
    return InventoryError(
        f"tensor {tensor.name}: wrong shape",
        where=tensor.file,
        expected=expected,
        got=list(tensor.shape),
        hint="do the key-values and the tensors belong together?",
    )


def _location(tensor: GgufTensor, expected: Expected, config: ModelConfig, file: GgufModelFile) -> Location:
    """Return where a weight lies, with the second scales that NVFP4 experts have in a tensor of their own.

    Raises:
        UnsupportedError: a type that is not decoded here.
        InventoryError: the shape of either tensor is another.
    """
    if tensor.type not in GGML_KINDS:
        raise UnsupportedError(
            f"tensor {tensor.name}: {tensor.type} is not decoded",
            where=tensor.file,
            hint="convert the model again with a type of hf-to-gguf for this tensor",
        )
    rows, columns = expected.shape if len(expected.shape) == 2 else (1, expected.shape[0])
    stacked = config.n_routed_experts if expected.expert is not None else 1
    joined = 2 if "eh_proj" in tensor.name else 1
    elements = stacked * rows * columns * joined
    if math.prod(tensor.shape) != elements or tensor.shape[-1] != columns * joined:
        wanted = [rows, columns * joined]
        raise _wrong_shape(tensor, [stacked, *wanted] if stacked > 1 else wanted)
    matrix = Matrix(tensor.file, tensor.offset, tensor.type, stacked * rows, columns * joined)
    if expected.expert is not None:
        matrix = matrix.row_slice(expected.expert * rows, rows)
    second = file.tensors.get(tensor.name.removesuffix(".weight") + SECOND_SUFFIX)
    if tensor.type == NVFP4 and second is not None:
        if second.type != "f32" or second.shape != (stacked,):
            raise _wrong_shape(second, [stacked])
        matrix = matrix._replace(factor=Factor(second.file, second.offset + (expected.expert or 0) * F32_BYTES))
    half = None
    if joined > 1:
        start = 0 if expected.row.name.startswith("e_proj") else columns
        half = (start, start + columns)
    return Location(matrix, expected.shape, half)
