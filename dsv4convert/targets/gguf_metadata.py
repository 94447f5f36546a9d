"""The GGUF key-values of a DeepSeek-V4 model: which keys, their types, their values, their bytes.

Keys, value types and the derivation of the ``general.*`` ones follow llama.cpp's converter; those that follow from
config.json are the table of ``model/gguf_keys.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from pathlib import PurePath
from typing import Any

from gguf import GGUFValueType

from ..checkpoint.model_card import ORIGIN_PARTS, ModelCard
from ..checkpoint.tokenizer import Tokenizer
from ..containers.gguf_write import ARRAY, BOOL, F32, I32, STRING, U32, U64, KeyValue
from ..errors import ConfigError, UnsupportedError
from ..model.config import ModelConfig, Version
from ..model.engram import EngramConstants
from ..model.gguf_keys import (
    COMMON_KEYS,
    DRAFT,
    ENGRAM_ENCODING,
    ENGRAM_KEYS,
    KEYS,
    LLAMA_CPP_V41,
    NEXTN_KEY,
    ROLE_KEYS,
    TOWER,
    GgufKey,
    KeyType,
    key_name,
)

# The version of ggml's quantisation formats, which every quantised file names.
QUANTIZATION_VERSION = 2

# general.file_type by the type of most weights (llama.cpp's LlamaFileType), with its name in file names.
# Almost all parameters of these models are in the routed experts, so their type decides.
FILE_NUMBERS = {
    "f32": 0, "f16": 1, "q8_0": 7, "bf16": 32, "mxfp4": 38, "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9, "q2_k": 10,
    "q3_k": 12, "q4_k": 15, "q5_k": 17, "q6_k": 18, "iq2_xxs": 19, "iq2_xs": 20, "iq3_xxs": 23, "iq1_s": 24,
    "iq4_nl": 25, "iq3_s": 26, "iq2_s": 28, "iq4_xs": 30, "iq1_m": 31, "tq1_0": 36, "tq2_0": 37, "nvfp4": 39,
    "q1_0": 40, "q2_0": 41,
}  # fmt: skip
OTHER_FILE_NAMES = {"mxfp4": "MXFP4_MOE", "q3_k": "Q3_K_M", "q4_k": "Q4_K_M", "q5_k": "Q5_K_M"}
FILE_TYPES = {kind: (number, OTHER_FILE_NAMES.get(kind, kind.upper())) for kind, number in FILE_NUMBERS.items()}


@dataclass(frozen=True)
class ParameterCounts:
    """Elements of the output tensors: all, outside expert stacks, of one expert, and how many experts."""

    total: int
    shared: int
    expert: int
    expert_count: int


# Value types, and element types of lists, by what the table of keys calls them.
VALUE_TYPES: Mapping[KeyType, tuple[GGUFValueType, GGUFValueType | None]] = {
    "bool": (BOOL, None),
    "u32": (U32, None),
    "f32": (F32, None),
    "str": (STRING, None),
    "[i32]": (ARRAY, I32),
    "[f32]": (ARRAY, F32),
    "[u64]": (ARRAY, U64),
}

# What the key values of vision towers mean, and what the file states besides config keys:
# the tower's own epsilon, not the text model's, and how pixels are normalised where no file says otherwise.
MMPROJ_PROJECTOR = "deepseek4v"
MMPROJ_EPSILON = 1e-6
IMAGE_MEAN = IMAGE_STD = (0.5, 0.5, 0.5)
MMPROJ_PROJECTOR_V41 = "deepseek41v"
# llama.cpp's program has no key for these and takes them as here.
MMPROJ_FIXED: Mapping[Version, Mapping[str, int | None]] = {
    Version.V4: {"vision_max_n_token": 384, "vision_max_wh_ratio": 8},
    Version.V41: {"vision_max_n_token": 1024, "vision_max_wh_ratio": None},
}
# image_size is only what a warm-up uses: so many patches wide, merged ones.
WARM_UP_PATCHES = 16

F32_MAX = (2 - 2**-23) * 2.0**127

# generation_config.json key, GGUF key, type. A later row for the same GGUF key is a second spelling.
SAMPLING_KEYS: tuple[tuple[str, str, GGUFValueType], ...] = (
    ("sequence", "general.sampling.sequence", STRING),
    ("top_k", "general.sampling.top_k", I32),
    ("top_p", "general.sampling.top_p", F32),
    ("min_p", "general.sampling.min_p", F32),
    ("xtc_probability", "general.sampling.xtc_probability", F32),
    ("xtc_threshold", "general.sampling.xtc_threshold", F32),
    ("temperature", "general.sampling.temp", F32),
    ("penalty_last_n", "general.sampling.penalty_last_n", I32),
    ("penalty_repeat", "general.sampling.penalty_repeat", F32),
    ("repetition_penalty", "general.sampling.penalty_repeat", F32),
    ("mirostat", "general.sampling.mirostat", I32),
    ("mirostat_tau", "general.sampling.mirostat_tau", F32),
    ("mirostat_eta", "general.sampling.mirostat_eta", F32),
)

# Attribute of gguf.Metadata and the key it goes to; all of them texts.
_AUTHORSHIP_KEYS: tuple[tuple[str, str], ...] = (
    ("name", "general.name"),
    ("author", "general.author"),
    ("version", "general.version"),
    ("organization", "general.organization"),
    ("finetune", "general.finetune"),
    ("basename", "general.basename"),
    ("description", "general.description"),
    ("quantized_by", "general.quantized_by"),
    ("size_label", "general.size_label"),
    ("license", "general.license"),
    ("license_name", "general.license.name"),
    ("license_link", "general.license.link"),
    ("url", "general.url"),
    ("doi", "general.doi"),
    ("uuid", "general.uuid"),
    ("repo_url", "general.repo_url"),
    ("source_url", "general.source.url"),
    ("source_doi", "general.source.doi"),
    ("source_uuid", "general.source.uuid"),
    ("source_repo_url", "general.source.repo_url"),
)
# What file names are built of, and how long a part of one may be: names of 255 bytes have suffixes to come.
NOT_IN_FILE_NAMES = re.compile(r"[^A-Za-z0-9._+-]+")
MAX_NAME_CHARACTERS, MAX_PART_CHARACTERS = 80, 32


def file_type(experts: str) -> int:
    """Return ``general.file_type`` for routed experts of type ``experts`` ("mxfp4", "q8_0", ...).

    Raises:
        UnsupportedError: no file type for these experts.
    """
    return _file_type(experts)[0]


def _file_type(experts: str) -> tuple[int, str]:
    if experts not in FILE_TYPES:
        raise UnsupportedError("no GGUF file type for these experts", expected="/".join(FILE_TYPES), got=experts)
    return FILE_TYPES[experts]


def count_parameters(tensors: Iterable[tuple[str, Sequence[int]]]) -> ParameterCounts:
    """Count the elements of output tensors, given as (GGUF name, row-major shape).

    Expert stacks are the tensors with ``_exps.`` in their name, [experts, ...] (llama.cpp's rule).
    """
    total = shared = expert = stacks = experts = 0
    for name, shape in tensors:
        size = prod(shape)
        total += size
        if "_exps." in name and len(shape) > 2:
            expert += size // shape[0]
            experts += shape[0]
            stacks += 1
        else:
            shared += size
    return ParameterCounts(total, shared, expert, experts // stacks if stacks else 0)


def model_keys(
    config: ModelConfig,
    architecture: str,
    block_count: int,
    *,
    mtp: bool = False,
    engram: EngramConstants | None = None,
    engram_encoding: str | None = None,
) -> list[KeyValue]:
    """Return the key-values that follow from a text model's config.

    ``block_count`` counts the draft layers of an MTP file too. ``engram`` finds the rows of V4.1's n-gram tables, and
    ``engram_encoding`` names their bytes where they are no type of ggml's.

    Raises:
        ConfigError: a value that the key's type cannot hold.
    """
    if config.version is Version.V4:
        return [*_config_keys(config, architecture, block_count, (*KEYS, NEXTN_KEY) if mtp else KEYS)]
    common, roles = (_config_keys(config, architecture, block_count, keys) for keys in (COMMON_KEYS, ROLE_KEYS))
    return [*common, *_engram_keys(config, architecture, engram, engram_encoding), *roles]


def dspark_keys(config: ModelConfig) -> list[KeyValue]:
    """Return the key-values that follow from the config of a DSpark draft, which has the draft's stages for layers.

    Raises:
        ConfigError: a ``dspark_*`` key is missing, or a value that the key's type cannot hold.
    """
    targets = config.flat.get("dspark_target_layer_ids")
    if not isinstance(targets, list) or not all(type(layer) is int and layer >= 0 for layer in targets):
        raise ConfigError("key dspark_target_layer_ids is missing or not a list of layers", got=targets)
    # V4 records the outputs of these layers, which are the inputs of the ones behind them; V4.1 their inputs.
    targets = [layer + (config.version is Version.V4) for layer in targets]
    keys = [
        *_config_keys(config, DRAFT, config.num_hidden_layers, COMMON_KEYS),
        _entry(DRAFT, "block_size", "u32", _dspark_value(config, "dspark_block_size", 1)),
        _entry(DRAFT, "target_layers", "[i32]", targets),
    ]
    if config.version is Version.V41:
        keys.append(_entry(DRAFT, "target_model_architecture", "str", LLAMA_CPP_V41))
    return keys


def text_metadata(
    architecture: str,
    config: ModelConfig,
    config_keys: Sequence[KeyValue],
    tokenizer: Tokenizer,
    card: ModelCard,
    *,
    counts: ParameterCounts,
    file_type: int,
    chat_template: str | None,
    name: str | None = None,
    mask_token: int | None = None,
) -> list[KeyValue]:
    """Return the key-values of a text model's file, in order; those that say how a file is split are not among them.

    ``config_keys`` are those that follow from its config. ``name`` overrides the model's name, ``mask_token`` the
    tokenizer's. ``chat_template`` is used unless the tokenizer's folder has one of its own.
    """
    vocabulary = _vocabulary(tokenizer)
    if mask_token is not None:
        vocabulary = [entry for entry in vocabulary if entry.key != MASK_TOKEN_KEY]
        vocabulary.append(KeyValue(MASK_TOKEN_KEY, U32, mask_token))
    return [
        *_head(architecture, "model", config, card, counts, name),
        *config_keys,
        KeyValue("general.file_type", U32, file_type),
        KeyValue("general.quantization_version", U32, QUANTIZATION_VERSION),
        *vocabulary,
        *_chat_templates(tokenizer, chat_template),
    ]


def noise_token(config: ModelConfig) -> int:
    """Return the token that stands for those which a DSpark draft is to guess.

    Raises:
        ConfigError: the config has none.
    """
    return _dspark_value(config, "dspark_noise_token_id", 0)


def _dspark_value(config: ModelConfig, key: str, least: int) -> int:
    value = config.flat.get(key)
    if type(value) is not int or value < least:
        raise ConfigError(f"key {key} is missing or not a number", expected=f"{least} or more", got=value)
    return value


def mmproj_metadata(
    config: ModelConfig,
    card: ModelCard,
    *,
    counts: ParameterCounts,
    file_type: int,
    image_mean: Sequence[float] = IMAGE_MEAN,
    image_std: Sequence[float] = IMAGE_STD,
    name: str | None = None,
) -> list[KeyValue]:
    """Return the key-values of the vision tower's file.

    Raises:
        ConfigError: a ``vision_*`` key is missing or no number.
        UnsupportedError: a value that llama.cpp takes for granted is another.
    """
    raw = config.flat
    for key, fixed in MMPROJ_FIXED[config.version].items():
        if raw.get(key) != fixed:
            raise UnsupportedError(
                f"key {key}: llama.cpp's vision code supports only one value", expected=fixed, got=raw.get(key)
            )

    def size(key: str) -> int:
        value = raw.get(key)
        if type(value) is not int or value < 1:
            raise ConfigError(f"key {key} is missing or not a size", expected="a positive integer", got=value)
        return value

    patch, merge = size("vision_patch_size"), size("vision_downsample_ratio")
    own = (
        ("has_vision_encoder", BOOL, True),
        ("vision.projection_dim", U32, config.hidden_size),
        ("vision.image_size", U32, patch * merge * WARM_UP_PATCHES),
        ("vision.patch_size", U32, patch),
        ("vision.embedding_length", U32, size("vision_dim")),
        ("vision.feed_forward_length", U32, size("vision_inter_dim")),
        ("vision.block_count", U32, size("vision_n_layers")),
        ("vision.attention.head_count", U32, size("vision_n_heads")),
        ("vision.image_mean", ARRAY, list(image_mean)),
        ("vision.image_std", ARRAY, list(image_std)),
        ("projector_type", STRING, MMPROJ_PROJECTOR if config.version is Version.V4 else MMPROJ_PROJECTOR_V41),
        ("vision.attention.layer_norm_epsilon", F32, MMPROJ_EPSILON),
        ("use_silu", BOOL, True),
        ("vision.projector.scale_factor", U32, merge),
        ("vision.image_min_pixels", U32, size("vision_min_pixels")),
    )
    return [
        *_head(TOWER, "mmproj", config, card, counts, name),
        KeyValue("general.file_type", U32, file_type),
        *(KeyValue(f"{TOWER}.{key}", kind, value, F32 if kind == ARRAY else None) for key, kind, value in own),
        KeyValue("general.quantization_version", U32, QUANTIZATION_VERSION),
    ]


def _head(
    architecture: str, kind: str, config: ModelConfig, card: ModelCard, counts: ParameterCounts, name: str | None
) -> list[KeyValue]:
    return [
        KeyValue("general.architecture", STRING, architecture),
        KeyValue("general.type", STRING, kind),
        *_sampling(card.generation),
        *_authorship(_describe(config, card, counts, name)),
    ]


def default_output_name(
    config: ModelConfig,
    card: ModelCard,
    counts: ParameterCounts,
    *,
    experts: str,
    prefix: str = "",
    name: str | None = None,
) -> str:
    """Return the file name of the GGUF naming convention, as llama.cpp's converter chooses it.

    What belongs to a model is named after it, with a ``prefix`` and without its own size:
    ``mtp-NAME-TYPE.gguf``. ``experts`` is the type of most parameters.

    Raises:
        UnsupportedError: no file type for these experts.
    """
    about = _describe(config, card, counts, name)
    size = None if prefix else about.size_label
    parts = (about.basename or about.name, size, about.finetune, about.version, _file_type(experts)[1])
    limits = (MAX_NAME_CHARACTERS, *(MAX_PART_CHARACTERS for _ in parts[1:]))
    safe = [file_name_part(str(part), most) for part, most in zip(parts, limits, strict=True) if part is not None]
    return f"{prefix}{'-'.join(part for part in safe if part) or 'model'}.gguf"


def file_name_part(text: str, most: int) -> str:
    """Return a part of a file name: letters, digits and a few signs of ASCII, "-" for all else, at most ``most``.

    Parts come out of cards, configs and folder names, and must not lead out of the folder.

    >>> file_name_part("Flash/../../../secret/planted", 40)
    'Flash-..-..-..-secret-planted'
    """
    return NOT_IN_FILE_NAMES.sub("-", text.strip())[:most].lstrip(".-").rstrip("-")


def _describe(config: ModelConfig, card: ModelCard, counts: ParameterCounts, name: str | None) -> Any:
    """Return a gguf.Metadata with what card, config and folder name tell about the model's identity."""
    from gguf import Metadata, size_label

    about = Metadata.apply_metadata_heuristic(
        Metadata(), deepcopy(dict(card.front_matter)), dict(config.raw), PurePath(card.folder_name), counts.total
    )
    if name is not None:
        about.name = name
    if about.name is None:
        about.name = card.folder_name
    if about.size_label is None and counts.total > 0:
        about.size_label = size_label(counts.total, counts.shared, counts.expert, counts.expert_count)
    return about


def _sampling(generation: Mapping[str, Any]) -> list[KeyValue]:
    found: dict[str, KeyValue] = {}
    for source, key, kind in SAMPLING_KEYS:
        value: Any = generation.get(source)
        usable = isinstance(value, str) if kind == STRING else _is_number(value, kind)
        if usable and key not in found:
            found[key] = KeyValue(key, kind, int(value) if kind == I32 else value)
    return list(found.values())


def _is_number(value: object, kind: GGUFValueType) -> bool:
    """Return whether ``value`` is a number that a key of ``kind`` can hold."""
    most = 2**31 - 1 if kind == I32 else F32_MAX
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= most


def _authorship(about: Any) -> list[KeyValue]:
    entries: list[KeyValue] = []
    for attribute, key in _AUTHORSHIP_KEYS:
        value = getattr(about, attribute)
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            if text:
                entries.append(KeyValue(key, STRING, text))
    entries += _origins(about.base_models, "general.base_model")
    entries += _origins(about.datasets, "general.dataset")
    for attribute in ("tags", "languages"):
        values = getattr(about, attribute)
        if values:
            entries.append(KeyValue(f"general.{attribute}", ARRAY, [str(v) for v in values], STRING))
    return entries


def _origins(origins: Sequence[Mapping[str, Any]] | None, prefix: str) -> list[KeyValue]:
    if origins is None:
        return []
    entries = [KeyValue(f"{prefix}.count", U32, len(origins))]
    for i, origin in enumerate(origins):
        for part in ORIGIN_PARTS:
            if origin.get(part):
                entries.append(KeyValue(f"{prefix}.{i}.{part}", STRING, str(origin[part])))
    return entries


def _entry(architecture: str, name: str, kind: KeyType, value: Any) -> KeyValue:
    value_type, element_type = VALUE_TYPES[kind]
    return KeyValue(key_name(architecture, name), value_type, value, element_type)


def _config_keys(
    config: ModelConfig, architecture: str, block_count: int, keys: Iterable[GgufKey]
) -> Iterator[KeyValue]:
    for key in keys:
        value = key.of(config, block_count)
        if value is not None:
            yield _entry(architecture, key.name, key.type, value)


def _engram_keys(
    config: ModelConfig, architecture: str, constants: EngramConstants | None, encoding: str | None
) -> list[KeyValue]:
    engram = config.engram
    if engram is None or constants is None:
        return []
    entries = [_entry(architecture, name, kind, value(engram, constants)) for name, kind, value in ENGRAM_KEYS]
    return entries if encoding is None else [*entries, _entry(architecture, ENGRAM_ENCODING, "str", encoding)]


# What the roles of special tokens are called in keys ("seperator" is how the key is spelled).
_ROLE_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
_ADDED_ROLES = ("bos", "eos", "sep")
MASK_TOKEN_KEY = "tokenizer.ggml.mask_token_id"


def _vocabulary(tokenizer: Tokenizer) -> list[KeyValue]:
    entries = [
        KeyValue("tokenizer.ggml.model", STRING, tokenizer.model),
        KeyValue("tokenizer.ggml.pre", STRING, tokenizer.pre),
        KeyValue("tokenizer.ggml.tokens", ARRAY, tokenizer.tokens, STRING),
        KeyValue("tokenizer.ggml.token_type", ARRAY, tokenizer.token_types, I32),
        KeyValue("tokenizer.ggml.merges", ARRAY, tokenizer.merges, STRING),
    ]
    for role, token_id in tokenizer.special_ids.items():
        if role in _ROLE_KEYS:
            entries.append(KeyValue(f"tokenizer.ggml.{_ROLE_KEYS[role]}_token_id", U32, token_id))
    for role, add in tokenizer.add_special.items():
        if role in _ADDED_ROLES:
            entries.append(KeyValue(f"tokenizer.ggml.add_{role}_token", BOOL, add))
    return entries


def _chat_templates(tokenizer: Tokenizer, chat_template: str | None) -> list[KeyValue]:
    named = dict(tokenizer.chat_templates)
    main = named.pop("default", chat_template)
    entries = [KeyValue(f"tokenizer.chat_template.{n}", STRING, t) for n, t in named.items()]
    if named:
        entries.append(KeyValue("tokenizer.chat_templates", ARRAY, list(named), STRING))
    if main is not None:
        entries.append(KeyValue("tokenizer.chat_template", STRING, main))
    return entries
