"""ModelConfig: a frozen view of config.json, validated against the schema, in each of its forms.

The published form says ``compress_ratios``, ``num_hash_layers`` and ``rope_scaling``; the transformers
form says ``layer_types``, ``mlp_layer_types`` and ``rope_parameters``; that of V4.1 nests the keys of text
and vision in objects of their own. All are read into one view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from ..containers.folder_names import CONFIG_NAME
from ..containers.json_object import read_json_object, validate_schema
from ..containers.presence import is_file, is_folder
from ..errors import ConfigError, InputMissingError, UnsupportedError, UsageError, either
from .agreement import (
    RATIO_BY_LAYER_TYPE,
    check_hash_layers,
    check_ratios,
    check_rotary_factor,
    check_spellings,
    disagree,
)
from .config_v41 import (
    Candidates,
    EngramConfig,
    candidates,
    check_roles,
    engram_config,
    flat_view,
    source_before,
)


class Version(str, Enum):
    """A generation of the architecture."""

    V4 = "V4"
    V41 = "V4.1"


# Our chat templates, files of this package.
CHAT_TEMPLATES = {Version.V4: "chat_template.jinja", Version.V41: "chat_template_v41.jinja"}
ARCHITECTURES = {Version.V4: "DeepseekV4ForCausalLM", Version.V41: "DeepseekV41ForCausalLM"}
VERSION_BY_ARCHITECTURE = {name: version for version, name in ARCHITECTURES.items()}


class Attention(str, Enum):
    """What a layer attends to besides its sliding window, by its compress ratio."""

    SLIDING = "sliding"
    CSA = "CSA"
    HCA = "HCA"
    # V4.1: compressed sparse attention over the entries of a KV source, one for every token or two.
    SHARED_CSA_1 = "CSA/1"
    SHARED_CSA_2 = "CSA/2"


ATTENTION_BY_RATIO = {
    0: Attention.SLIDING,
    1: Attention.SHARED_CSA_1,
    2: Attention.SHARED_CSA_2,
    4: Attention.CSA,
    128: Attention.HCA,
}

# Keys that must be there, and are taken as they are; the latter ones may be spelled as whole numbers.
PLAIN_KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "q_lora_rank", "o_groups", "o_lora_rank",
    "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "sliding_window", "index_n_heads",
    "index_head_dim", "index_topk", "hc_mult", "hc_sinkhorn_iters", "vocab_size", "max_position_embeddings",
)  # fmt: skip
FLOAT_KEYS = ("routed_scaling_factor", "swiglu_limit", "hc_eps", "rms_norm_eps")
DEFAULT_ROPE_THETA = 10000.0
DEFAULT_COMPRESS_ROPE_THETA = 160000.0


@dataclass(frozen=True)
class YarnScaling:
    """YaRN parameters of the layers with a compressor; ``factor`` 1 means no scaling."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True)
class ModelConfig:
    """The hyperparameters of a DeepSeek-V4 or V4.1 model, under the names that config.json uses.

    ``compress_ratios`` holds one entry per trunk layer and per draft layer, trunk first.
    ``num_nextn_predict_layers`` is what the file says; how many draft layers there really are is a
    matter of the tensors (V4's DSpark folders hold three and say 1). ``raw`` is the parsed file, ``flat``
    the same under the names of V4's flat form. KV sources, index sources, ``candidates`` and ``engram``
    are V4.1's; ``draft_`` counts are those of draft layers, which V4 has like the trunk's.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    num_hash_layers: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    scoring_func: str
    swiglu_limit: float
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    yarn: YarnScaling | None
    compress_ratios: tuple[int, ...]
    num_nextn_predict_layers: int
    vocab_size: int
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_id: int | None
    version: Version = Version.V4
    draft_n_routed_experts: int = 0
    draft_num_experts_per_tok: int = 0
    kv_source_layer_ids: tuple[int, ...] = ()
    index_source_layer_ids: tuple[int, ...] = ()
    candidates: Candidates | None = None
    engram: EngramConfig | None = None
    raw: Mapping[str, Any] = field(repr=False, compare=False, default_factory=dict)
    flat: Mapping[str, Any] = field(repr=False, compare=False, default_factory=dict)

    @property
    def n_draft_ratios(self) -> int:
        """Return how many entries of ``compress_ratios`` belong to draft layers."""
        return len(self.compress_ratios) - self.num_hidden_layers

    @property
    def is_dspark(self) -> bool:
        """Return whether the config names a DSpark draft (the tensors have the last word)."""
        return any(key.startswith("dspark_") for key in self.flat)

    @property
    def has_vision(self) -> bool:
        """Return whether the config describes a vision tower."""
        return bool(self.flat.get("vision_n_layers", 0))

    def n_experts(self, is_draft: bool) -> int:
        """Return the routed experts of a layer of the trunk, or of the draft."""
        return self.draft_n_routed_experts if is_draft else self.n_routed_experts

    def kv_source(self, layer: int) -> int | None:
        """Return the layer whose compressed entries trunk layer ``layer`` reads, None where it sees its window only."""
        return source_before(layer, self.kv_source_layer_ids) if self.compress_ratios[layer] else None

    def index_source(self, layer: int) -> int | None:
        """Return the layer whose choice of entries trunk layer ``layer`` uses, None where it sees its window only."""
        return source_before(layer, self.index_source_layer_ids) if self.compress_ratios[layer] else None

    @cached_property
    def dims(self) -> dict[str, int]:
        """Return the symbolic dimensions that the name tables use, by symbol.

        D hidden, H heads, d head, V vocabulary, E experts, I expert width, K experts per token,
        G output groups, Hi and di the indexer's heads and width, hc streams, ng and ed the table rows that
        a token looks up and their width.
        """
        engram = self.engram
        markov = int(self.flat.get("dspark_markov_rank", 0))
        heads_out = self.num_attention_heads * self.head_dim
        return {
            "D": self.hidden_size,
            "V": self.vocab_size,
            "H": self.num_attention_heads,
            "d": self.head_dim,
            "2d": 2 * self.head_dim,
            "E": self.n_routed_experts,
            "I": self.moe_intermediate_size,
            "Is": self.moe_intermediate_size * self.n_shared_experts,
            "K": self.num_experts_per_tok,
            "q_lora": self.q_lora_rank,
            "Hd": heads_out,
            "G*o_lora": self.o_groups * self.o_lora_rank,
            "Hd/G": heads_out // self.o_groups,
            "Hi": self.index_n_heads,
            "Hi*di": self.index_n_heads * self.index_head_dim,
            "di": self.index_head_dim,
            "2di": 2 * self.index_head_dim,
            "hc": self.hc_mult,
            "hc*D": self.hc_mult * self.hidden_size,
            "(2+hc)*hc": (2 + self.hc_mult) * self.hc_mult,
            "1": 1,
            "3": 3,
            "4": 4,
            "128": 128,
            "targets*D": len(self.flat.get("dspark_target_layer_ids", (0, 0, 0))) * self.hidden_size,
            "markov": markov,
            "D+markov": self.hidden_size + markov,
            "(hc+1)*D": (self.hc_mult + 1) * self.hidden_size,
            "ed": engram.head_dim if engram else 0,
            "ng*ed": engram.rows_per_token * engram.head_dim if engram else 0,
        }

    def attention(self, layer: int) -> Attention:
        """Return the attention kind of trunk layer ``layer``."""
        return ATTENTION_BY_RATIO[self.compress_ratios[layer]]

    def is_hash_routed(self, layer: int) -> bool:
        """Return whether trunk layer ``layer`` routes by the token-id table."""
        return layer < self.num_hash_layers

    def of_draft(self, stages: int) -> ModelConfig:
        """Return the config of ``stages`` draft stages as the layers of a model, which see their window only."""
        return replace(
            self,
            num_hidden_layers=stages,
            num_hash_layers=0,
            compress_ratios=(0,) * stages,
            n_routed_experts=self.draft_n_routed_experts,
            num_experts_per_tok=self.draft_num_experts_per_tok,
            kv_source_layer_ids=(),
            index_source_layer_ids=(),
            candidates=None,
            engram=None,
        )

    def sliced(self, first: int, last: int) -> ModelConfig:
        """Return the config of trunk layers ``first``..``last`` inclusive, without draft layers; all are this one.

        Raises:
            UsageError: the range is empty or outside the model, or leaves out the KV source of one of its layers.
        """
        if not 0 <= first <= last < self.num_hidden_layers:
            raise UsageError(
                "layers outside the model",
                expected=f"a range within 0-{self.num_hidden_layers - 1}",
                got=f"{first}-{last}",
            )
        if last - first + 1 == self.num_hidden_layers:
            return self
        for layer in range(first, last + 1):
            source = self.kv_source(layer)
            if source is not None and source < first:
                raise UsageError(
                    f"layers without their KV source: layer {layer} reads the entries of layer {source}",
                    expected=f"a range such as {source}-{last}",
                    got=f"{first}-{last}",
                )
        kv_sources, index_sources = (
            tuple(layer - first for layer in ids if first <= layer <= last)
            for ids in (self.kv_source_layer_ids, self.index_source_layer_ids)
        )
        found = self.candidates
        if found is not None:
            kept = first <= found.source_layer_id <= last
            found = replace(found, source_layer_id=found.source_layer_id - first) if kept else None
        return replace(
            self,
            num_hidden_layers=last - first + 1,
            num_hash_layers=max(0, min(self.num_hash_layers, last + 1) - first),
            compress_ratios=self.compress_ratios[first : last + 1],
            num_nextn_predict_layers=0,
            kv_source_layer_ids=kv_sources,
            index_source_layer_ids=index_sources,
            candidates=found,
            engram=None if self.engram is None else self.engram.sliced(first, last),
        )


def load_config(folder: Path) -> ModelConfig:
    """Read and validate ``config.json`` of ``folder``.

    Raises:
        InputMissingError: no folder, or no ``config.json`` in it.
        ConfigError: the file is malformed or inconsistent; the key is named.
        UnsupportedError: another architecture.
    """
    if not is_folder(folder):
        raise InputMissingError("no such folder", where=folder, hint="pass the folder that holds config.json")
    path = folder / CONFIG_NAME
    if not is_file(path):
        raise InputMissingError(
            "config.json is missing", where=folder, hint="is this a checkpoint folder, fully downloaded?"
        )
    return parse_config(read_json_object(path), path)


def parse_config(raw: Mapping[str, Any], where: object) -> ModelConfig:
    """Turn a parsed ``config.json`` of either form into a ModelConfig.

    Raises:
        ConfigError: a key is missing, of the wrong type, or does not fit the others.
        UnsupportedError: another architecture.
    """
    version = _version(raw, where)
    file, raw = raw, flat_view(raw, where) if version is Version.V41 else raw
    validate_schema(raw, "config.schema.json", where)
    check_spellings(raw, where)
    check_rotary_factor(raw, where)
    layers = raw["num_hidden_layers"]
    ratios = _compress_ratios(raw, version, where)
    theta, compress_theta, yarn = _rope(raw, where)
    eos = raw.get("eos_token_id")
    plain: dict[str, Any] = {**{key: raw[key] for key in PLAIN_KEYS}, **{key: float(raw[key]) for key in FLOAT_KEYS}}
    config = ModelConfig(
        **plain,
        qk_rope_head_dim=_rope_head_dim(raw, where),
        n_shared_experts=raw.get("n_shared_experts", 1),
        num_hash_layers=_num_hash_layers(raw, where) if version is Version.V4 else 0,
        norm_topk_prob=raw.get("norm_topk_prob", True),
        scoring_func=raw.get("scoring_func", "sqrtsoftplus"),
        rope_theta=theta,
        compress_rope_theta=compress_theta,
        yarn=yarn,
        compress_ratios=ratios,
        num_nextn_predict_layers=raw.get("num_nextn_predict_layers", 0),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=eos[0] if isinstance(eos, list) else eos,
        version=version,
        draft_n_routed_experts=raw.get("dspark_n_routed_experts", raw["n_routed_experts"]),
        draft_num_experts_per_tok=raw.get("dspark_num_experts_per_tok", raw["num_experts_per_tok"]),
        kv_source_layer_ids=tuple(raw.get("kv_source_layer_ids", ())),
        index_source_layer_ids=tuple(raw.get("index_source_layer_ids", ())),
        candidates=candidates(raw, where) if version is Version.V41 else None,
        engram=engram_config(raw, where) if version is Version.V41 else None,
        raw=file,
        flat=raw,
    )
    _check_divisions(config, where)
    _check_named(config, where)
    if version is Version.V41:
        check_roles(
            ratios[:layers], config.kv_source_layer_ids, config.index_source_layer_ids, config.candidates, where
        )
    return config


def _version(raw: Mapping[str, Any], where: object) -> Version:
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise ConfigError(
            "key architectures is missing or not a list",
            where=where,
            expected=either(f'["{name}"]' for name in VERSION_BY_ARCHITECTURE),
        )
    for name in map(str, architectures):
        if name in VERSION_BY_ARCHITECTURE:
            return VERSION_BY_ARCHITECTURE[name]
    raise UnsupportedError(
        "unsupported architecture",
        where=where,
        expected=either(VERSION_BY_ARCHITECTURE),
        got=", ".join(map(str, architectures))[:100],
    )


def _compress_ratios(raw: Mapping[str, Any], version: Version, where: object) -> tuple[int, ...]:
    """Return the ratio of every layer, trunk first; draft layers that have no entry are ratio 0, as all of them are."""
    layers: int = raw["num_hidden_layers"]
    if "compress_ratios" in raw:
        key, ratios = "compress_ratios", tuple(raw["compress_ratios"])
    elif "layer_types" in raw:
        key, ratios = "layer_types", tuple(RATIO_BY_LAYER_TYPE[kind] for kind in raw["layer_types"])
    else:
        raise ConfigError("key compress_ratios is missing", where=where, hint="layer_types is accepted instead")
    if version is Version.V4:
        # One entry a token is not compressed: some folders say 1 where the published ones say 0.
        ratios = tuple(0 if ratio == 1 else ratio for ratio in ratios)
    if len(ratios) < layers:
        raise ConfigError(
            f"key {key}: list too short",
            where=where,
            expected=f"at least {layers} entries (num_hidden_layers)",
            got=len(ratios),
        )
    if any(ratios[layers:]):
        raise ConfigError(
            f"key {key}: draft layers have no compressor", where=where, expected=0, got=max(ratios[layers:])
        )
    if version is Version.V4:
        check_ratios(raw, ratios[:layers], where)
    needed: int = layers + raw.get("num_nextn_predict_layers", 0)
    return ratios + (0,) * (needed - len(ratios))


def _num_hash_layers(raw: Mapping[str, Any], where: object) -> int:
    layers: int = raw["num_hidden_layers"]
    check_hash_layers(raw, where)
    if "num_hash_layers" in raw:
        count: int = raw["num_hash_layers"]
        if count > layers:
            raise ConfigError(
                "key num_hash_layers: more than num_hidden_layers",
                where=where,
                expected=f"at most {layers}",
                got=count,
            )
        return count
    kinds = raw.get("mlp_layer_types")
    if kinds is None:
        raise ConfigError("key num_hash_layers is missing", where=where, hint="mlp_layer_types is accepted instead")
    count = kinds.count("hash_moe")
    if len(kinds) != layers or kinds[:count] != ["hash_moe"] * count:
        raise ConfigError(
            "key mlp_layer_types: hash layers come first, one entry per layer",
            where=where,
            expected=layers,
            got=len(kinds),
        )
    return count


def _rope_head_dim(raw: Mapping[str, Any], where: object) -> int:
    if "qk_rope_head_dim" in raw:
        return int(raw["qk_rope_head_dim"])
    factor = raw.get("partial_rotary_factor")
    if factor is None:
        raise ConfigError(
            "key qk_rope_head_dim is missing", where=where, hint="partial_rotary_factor is accepted instead"
        )
    return int(raw["head_dim"] * factor)


def _rope(raw: Mapping[str, Any], where: object) -> tuple[float, float, YarnScaling | None]:
    """Return (rope_theta, compress_rope_theta, YaRN of the compressed layers)."""
    scaling, parameters = raw.get("rope_scaling"), raw.get("rope_parameters")
    main = compress = None
    if isinstance(parameters, dict) and parameters:
        main, compress = parameters.get("main"), parameters.get("compress")
        if not isinstance(main, dict) or not isinstance(compress, dict):
            raise ConfigError("key rope_parameters: needs the objects main and compress", where=where)
    theta = float(raw.get("rope_theta", (main or {}).get("rope_theta", DEFAULT_ROPE_THETA)))
    compress_theta = float(
        raw.get("compress_rope_theta", (compress or {}).get("rope_theta", DEFAULT_COMPRESS_ROPE_THETA))
    )
    found = [
        (key, _yarn(values, key, where))
        for key, values in (("rope_scaling", scaling), ("rope_parameters.compress", compress))
        if values is not None
    ]
    if not found:
        return theta, compress_theta, None
    (left, yarn), (right, other) = found[0], found[-1]
    if yarn != other:
        for name in YarnScaling.__dataclass_fields__ if yarn is not None and other is not None else ():
            if getattr(yarn, name) != getattr(other, name):
                disagree(f"{left}.{name}", getattr(yarn, name), f"{right}.{name}", getattr(other, name), where)
        disagree(left, "yarn" if yarn else "no scaling", right, "yarn" if other else "no scaling", where)
    return theta, compress_theta, yarn


def _yarn(scaling: Mapping[str, Any], key: str, where: object) -> YarnScaling | None:
    """Return the YaRN parameters that ``key`` holds, None where it says that nothing is scaled."""
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind in (None, "default"):
        return None
    if kind != "yarn":
        raise ConfigError(f"key {key}.type: unknown", where=where, expected="yarn", got=kind)
    missing = [name for name in ("factor", "original_max_position_embeddings") if name not in scaling]
    if missing:
        raise ConfigError(f"key {key}.{missing[0]} is missing", where=where)
    return YarnScaling(
        factor=float(scaling["factor"]),
        original_max_position_embeddings=int(scaling["original_max_position_embeddings"]),
        beta_fast=float(scaling.get("beta_fast", 32)),
        beta_slow=float(scaling.get("beta_slow", 1)),
    )


def _check_named(config: ModelConfig, where: object) -> None:
    """Check that tokens and layers which keys name are there: a reader of the output would look them up."""
    for key in ("dspark_noise_token_id", "image_token_id"):
        token = config.flat.get(key)
        if token is not None and not 0 <= token < config.vocab_size:
            raise ConfigError(
                f"key {key}: no token", where=where, expected=f"below vocab_size {config.vocab_size}", got=token
            )
    targets, layers = config.flat.get("dspark_target_layer_ids", ()), config.num_hidden_layers
    if len(set(targets)) != len(targets) or any(layer >= layers for layer in targets):
        raise ConfigError(
            "key dspark_target_layer_ids: not layers of the model",
            where=where,
            expected=f"different ones of 0-{layers - 1}",
            got=list(targets),
        )


def _check_divisions(config: ModelConfig, where: object) -> None:
    c, heads, rotary, experts = config, config.num_attention_heads, config.qk_rope_head_dim, config.n_routed_experts
    is_rotary = rotary % 2 == 0 and rotary <= min(c.head_dim, c.index_head_dim)
    rotary_room = f"even, at most head_dim {c.head_dim} and index_head_dim {c.index_head_dim}"
    taken, draft_taken, draft_experts = c.num_experts_per_tok, c.draft_num_experts_per_tok, c.draft_n_routed_experts
    draft_room = f"at most dspark_n_routed_experts {draft_experts}"
    for key, got, fits, expected in (
        ("o_groups", c.o_groups, heads % c.o_groups == 0, f"a divisor of num_attention_heads {heads}"),
        ("qk_rope_head_dim", rotary, is_rotary, rotary_room),
        ("num_experts_per_tok", taken, taken <= experts, f"at most n_routed_experts {experts}"),
        ("dspark_num_experts_per_tok", draft_taken, draft_taken <= draft_experts, draft_room),
    ):
        if not fits:
            raise ConfigError(f"key {key}: does not fit the other keys", where=where, expected=expected, got=got)
