"""Facts that several keys of config.json state: the keys agree, or the config says two things at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ..errors import ConfigError

# Pairs of keys, dotted where they lie in objects, that are two spellings of one value.
SPELLINGS = (
    ("n_routed_experts", "num_local_experts"),
    ("torch_dtype", "dtype"),
    ("expert_dtype", "quantization_config.expert_dtype"),
    ("scale_fmt", "quantization_config.scale_fmt"),
    ("rope_theta", "rope_parameters.main.rope_theta"),
    ("compress_rope_theta", "rope_parameters.compress.rope_theta"),
    ("rope_scaling.type", "rope_scaling.rope_type"),
    ("rope_parameters.compress.type", "rope_parameters.compress.rope_type"),
)

# transformers' names of the kinds of layers, the ratio of each, and the older key of that ratio.
RATIO_BY_LAYER_TYPE = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}
RATE_KEYS = {"compress_rate_csa": 4, "compress_rate_hca": 128}

HASH_ROUTED = "hash_moe"


def check_spellings(raw: Mapping[str, Any], where: object) -> None:
    """Compare keys that spell one value twice.

    Raises:
        ConfigError: two of them differ; names both.
    """
    for left, right in SPELLINGS:
        a, b = _value(raw, left), _value(raw, right)
        if a is not None and b is not None and a != b:
            disagree(left, a, right, b, where)


def check_ratios(raw: Mapping[str, Any], ratios: Sequence[int], where: object) -> None:
    """Compare ``compress_ratios`` of the trunk with ``layer_types`` and the rates of transformers' form.

    Raises:
        ConfigError: they differ, or a rate is not one that the architecture has.
    """
    kinds = raw.get("layer_types")
    if kinds is not None and "compress_ratios" in raw:
        other = [RATIO_BY_LAYER_TYPE[kind] for kind in kinds[: len(ratios)]]
        for layer, ratio in enumerate(ratios):
            if layer >= len(other) or other[layer] != ratio:
                got = kinds[layer] if layer < len(other) else "no entry"
                disagree(f"compress_ratios[{layer}]", ratio, f"layer_types[{layer}]", got, where)
    rates = raw.get("compress_rates")
    if isinstance(rates, list):
        # As in the ratios, 1 is another word for 0.
        if [0 if rate == 1 else rate for rate in rates[: len(ratios)]] != list(ratios):
            disagree("compress_ratios", list(ratios), "compress_rates", rates, where)
    elif isinstance(rates, Mapping):
        for kind, rate in rates.items():
            if kind in RATIO_BY_LAYER_TYPE and rate != RATIO_BY_LAYER_TYPE[kind]:
                _other_rate(f"compress_rates.{kind}", RATIO_BY_LAYER_TYPE[kind], rate, where)
    elif rates is not None:
        raise ConfigError("key compress_rates: neither an object nor a list", where=where, got=rates)
    for key, rate in RATE_KEYS.items():
        if raw.get(key, rate) != rate:
            _other_rate(key, rate, raw[key], where)


def _other_rate(key: str, expected: int, got: object, where: object) -> NoReturn:
    raise ConfigError(
        f"key {key}: not the ratio of this architecture's layers, which compress_ratios counts in",
        where=where,
        expected=expected,
        got=got,
    )


def check_hash_layers(raw: Mapping[str, Any], where: object) -> None:
    """Compare ``num_hash_layers`` with ``mlp_layer_types``.

    Raises:
        ConfigError: they differ.
    """
    count, kinds = raw.get("num_hash_layers"), raw.get("mlp_layer_types")
    if count is None or kinds is None:
        return
    if [kind == HASH_ROUTED for kind in kinds] != [layer < count for layer in range(len(kinds))]:
        disagree("num_hash_layers", count, "mlp_layer_types", f"{kinds.count(HASH_ROUTED)} x {HASH_ROUTED}", where)


def check_rotary_factor(raw: Mapping[str, Any], where: object) -> None:
    """Compare ``qk_rope_head_dim`` with ``partial_rotary_factor``, which is its part of ``head_dim``.

    Raises:
        ConfigError: they differ.
    """
    width = raw.get("qk_rope_head_dim")
    places = ("partial_rotary_factor", *(f"rope_parameters.{p}.partial_rotary_factor" for p in ("main", "compress")))
    for key in places:
        factor = _value(raw, key)
        if width is None or factor is None:
            continue
        if not isinstance(factor, (int, float)) or abs(raw["head_dim"] * factor - width) >= 1:
            disagree("qk_rope_head_dim", width, key, f"{factor} of head_dim {raw['head_dim']}", where)


def disagree(left: str, a: object, right: str, b: object, where: object) -> NoReturn:
    """Refuse a config in which two keys that state one fact differ.

    Raises:
        ConfigError: always; names both keys and both values.
    """
    raise ConfigError(
        f"keys {left} and {right} disagree",
        where=where,
        expected=f"one value in both ({left} is {a})",
        got=f"{right} {b}",
        hint="correct or remove the wrong key",
    )


def _value(raw: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path, None where there is none."""
    value: Any = raw
    for key in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value
