"""Synthetic checkpoints: their inventories, their files and what the bytes in them are good for."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors
from click.testing import CliRunner

from dsv4convert.errors import ConfigError, Dsv4Error, InputOutputError, OutputExistsError, SpaceError, UsageError
from dsv4convert.formats.e2m1 import VALUES as E2M1_VALUES
from dsv4convert.formats.e4m3 import e4m3_to_f32
from dsv4convert.formats.e8m0 import e8m0_to_f32
from dsv4convert.model.config import ModelConfig, load_config, parse_config
from dsv4convert.model.tensors import vision_dims, vision_tensors
from dsv4convert.reference import DictSource, Model
from dsv4convert.synth import presets
from dsv4convert.synth import values as synth_values
from dsv4convert.synth import write as synth
from dsv4convert.synth.presets import Cuts, synth_config
from dsv4convert.synth.write import plan_synth, write_plan, write_synth

# (preset, variant): tensors, payload bytes, tensors by dtype where they are published.
PUBLISHED = {
    ("flash", None): (
        69_187,
        159_609_485_896,
        {"I8": 33_792, "F8_E8M0": 34_167, "F8_E4M3": 375, "BF16": 433, "F32": 417, "I64": 3},
    ),
    ("pro", None): (
        145_116,
        864_704_792_696,
        {"I8": 71_424, "F8_E8M0": 71_952, "F8_E4M3": 528, "BF16": 619, "F32": 590, "I64": 3},
    ),
    ("flash", "base"): (69_187, 292_555_345_480, None),
    ("flash", "dspark"): (72_317, 166_878_536_440, None),
    ("flash", "vision"): (72_633, None, None),
}
PUBLISHED_IDS = ["flash", "pro", "flash-base", "flash-dspark", "flash-vision"]
VARIANTS = [None, "base", "dspark", "vision"]
VARIANT_IDS = ["plain", "base", "dspark", "vision"]

# Shapes that share no factor with the scale blocks, beside what FP4 groups (32) and the Hadamard
# rotation (a power of two) ask for.
ODD_SHAPES: list[dict[str, Any]] = [
    {"hidden_size": 288, "moe_intermediate_size": 32, "q_lora_rank": 160, "head_dim": 160, "o_lora_rank": 72},
    {
        "hidden_size": 96,
        "moe_intermediate_size": 224,
        "o_groups": 8,
        "n_routed_experts": 5,
        "vocab_size": 331,
    },
    {
        "num_attention_heads": 6,
        "o_groups": 3,
        "q_lora_rank": 32,
        "num_experts_per_tok": 1,
        "index_n_heads": 3,
    },
]

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return a safetensors header as it stands in the file, and where the data begins."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def read_tensors(folder: Path) -> Tensors:
    """Return every tensor of a folder, read by the safetensors library."""
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in safetensors.deserialize(path.read_bytes()):
            assert name not in found
            found[name] = (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
    return found


def array(tensor: tuple[str, tuple[int, ...], bytes]) -> npt.NDArray[Any]:
    """Return the values of a tensor; the codes of FP8 and FP4 as bytes."""
    dtype, shape, data = tensor
    if dtype == "BF16":
        bits = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    return np.frombuffer(data, {"F32": "<f4", "I64": "<i8"}.get(dtype, "u1")).reshape(shape)


def dequantised(tensors: Tensors) -> dict[str, npt.NDArray[Any]]:
    """Return every weight as float32, by the plain formula: value of the code times its scale."""
    values: dict[str, npt.NDArray[Any]] = {}
    for name, tensor in tensors.items():
        if name.endswith(".scale"):
            continue
        scale = tensors.get(name.removesuffix(".weight") + ".scale")
        if scale is None:
            values[name] = array(tensor)
            continue
        codes, factors = array(tensor), array(scale)
        if scale[0] == "F8_E8M0":
            factors = e8m0_to_f32(factors)
        if tensor[0] == "I8":
            nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(codes.shape[0], -1)
            values[name] = E2M1_VALUES[nibbles] * np.repeat(factors, 32, axis=1)
        else:
            spread = np.repeat(np.repeat(factors, 128, axis=0), 128, axis=1)
            values[name] = e4m3_to_f32(codes) * spread[: codes.shape[0], : codes.shape[1]]
    return values


@pytest.fixture(scope="module", params=VARIANTS, ids=VARIANT_IDS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synth") / "tiny"
    write_synth(folder, "tiny", variant=request.param, seed=3)
    return folder


# --- inventories ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "expected"), PUBLISHED.items(), ids=PUBLISHED_IDS)
def test_full_inventory_has_the_published_counts_and_bytes(what: tuple[str, str | None], expected: Any) -> None:
    preset, variant = what
    count, nbytes, by_dtype = expected
    tensors = [t for file in plan_synth(preset, variant=variant).files for t in file]
    assert len(tensors) == count
    assert len({t.name for t in tensors}) == count
    if nbytes is not None:
        assert sum(t.nbytes for t in tensors) == nbytes
    if by_dtype is not None:
        assert Counter(t.dtype for t in tensors) == by_dtype


def test_base_has_67612_tensors_beside_its_mtp_layer() -> None:
    tensors = [t for file in plan_synth("flash", variant="base").files for t in file]
    assert sum(not t.name.startswith("mtp.") for t in tensors) == 67_612


@pytest.mark.parametrize(("what", "expected"), PUBLISHED.items(), ids=PUBLISHED_IDS)
def test_headers_only_folder_holds_true_headers_and_tables_and_no_other_payload(
    what: tuple[str, str | None], expected: Any, tmp_path: Path
) -> None:
    preset, variant = what
    count, nbytes, by_dtype = expected
    out = tmp_path / "model"
    summary = write_synth(out, preset, variant=variant, headers_only=True)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    dtypes: Counter[str] = Counter()
    weight_map: dict[str, str] = {}
    payload = 0
    for path in sorted(out.glob("*.safetensors")):
        header, begin = read_header(path)
        assert begin % 8 == 0
        assert header.pop("__metadata__") == {"format": "pt"}
        at = 0
        for name, entry in header.items():
            size = math.prod(entry["shape"]) * synth.DTYPE_BYTES[entry["dtype"]]
            assert entry["data_offsets"] == [at, at + size]
            assert at % synth.DTYPE_BYTES[entry["dtype"]] == 0
            at += size
            dtypes[entry["dtype"]] += 1
            weight_map[name] = path.name
        assert path.stat().st_size == begin + at
        tables = sum(math.prod(e["shape"]) * 8 for name, e in header.items() if name.endswith(".tid2eid"))
        assert path.stat().st_blocks * 512 < begin + tables + 2**20
        payload += at
    assert (len(weight_map), summary.tensors) == (count, count)
    assert index == {"metadata": {"total_size": payload}, "weight_map": weight_map}
    assert payload == summary.payload_bytes == (payload if nbytes is None else nbytes)
    assert by_dtype is None or dtypes == by_dtype
    assert dict(dtypes) == summary.tensors_by_dtype


@pytest.mark.parametrize(
    ("preset", "variant", "files"),
    [
        ("flash", None, 46),
        ("pro", None, 64),
        ("flash", "base", 46),
        ("flash", "dspark", 48),
        ("flash", "vision", 48),
    ],
    ids=PUBLISHED_IDS,
)
def test_published_presets_have_the_published_number_of_files(preset: str, variant: str | None, files: int) -> None:
    assert len(plan_synth(preset, variant=variant).files) == files


def test_variant_keys_give_the_published_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    published = {variant: synth_config("flash", variant=variant) for variant in ("base", "dspark")}
    monkeypatch.setattr(presets, "PUBLISHED_CONFIGS", {("flash", None): "v4-flash.json"})
    for variant, config in published.items():
        assert synth_config("flash", variant=variant) == config


def test_nano_has_half_a_billion_parameters() -> None:
    plan = plan_synth("nano")
    per_byte = {"I8": 2}
    parameters = sum(
        math.prod(t.shape) * per_byte.get(t.dtype, 1) for f in plan.files for t in f if not t.name.endswith(".scale")
    )
    assert 0.45e9 < parameters < 0.6e9
    assert plan.raw["num_hidden_layers"] == 7
    assert plan.raw["n_routed_experts"] == 8


def test_tiny_holds_every_kind_of_layer() -> None:
    config = parse_config(synth_config("tiny"), "tiny")
    assert set(config.compress_ratios[: config.num_hidden_layers]) == {0, 4, 128}
    assert 0 < config.num_hash_layers < config.num_hidden_layers
    assert config.n_draft_ratios == 1
    plan = plan_synth("tiny")
    assert 2e6 < plan.payload_bytes < 8e6
    ragged = [t for f in plan.files for t in f if t.dtype == "F8_E4M3" and any(n % 128 for n in t.shape)]
    assert ragged


def test_flash_slice_of_the_benchmark_is_about_four_and_a_half_gigabytes() -> None:
    plan = plan_synth("flash", ratios=[0, 4, 128, 4], experts=48, vocab=32768)
    assert plan.raw["compress_ratios"] == [0, 4, 128, 4, 0]
    assert 4.4e9 < plan.payload_bytes < 4.6e9


# --- cuts ----------------------------------------------------------------------------------------


def test_cuts_are_typed_as_the_config_takes_them() -> None:
    keywords = signature(synth_config).parameters.values()
    taken = {keyword.name: keyword.annotation for keyword in keywords if keyword.kind is Parameter.KEYWORD_ONLY}
    assert {name: kind.__forward_arg__ for name, kind in Cuts.__annotations__.items()} == taken
    with pytest.raises(TypeError, match="unexpected keyword argument 'layer'"):
        plan_synth("tiny", layer=2)  # type: ignore[call-arg]


def test_layers_keeps_the_leading_layers_and_the_draft() -> None:
    config = synth_config("flash", layers=5)
    assert config["compress_ratios"] == [0, 0, 4, 128, 4, 0]
    assert (config["num_hidden_layers"], config["num_hash_layers"]) == (5, 3)
    assert synth_config("flash", layers=2)["num_hash_layers"] == 2


def test_no_mtp_leaves_no_draft_behind() -> None:
    for variant in VARIANTS:
        plan = plan_synth("tiny", variant=variant, mtp=False)
        assert plan.raw["num_nextn_predict_layers"] == 0
        assert len(plan.raw["compress_ratios"]) == plan.raw["num_hidden_layers"]
        assert not [key for key in plan.raw if key.startswith("dspark_")]
        assert not [t for f in plan.files for t in f if t.name.startswith("mtp.")]


def test_fewer_experts_than_a_token_takes_lowers_that_number() -> None:
    assert synth_config("flash", experts=4)["num_experts_per_tok"] == 4
    assert synth_config("flash", experts=48)["num_experts_per_tok"] == 6


def test_dspark_drafts_read_the_last_three_layers() -> None:
    config = synth_config("flash", variant="dspark", layers=7, vocab=32768)
    assert config["dspark_target_layer_ids"] == [4, 5, 6]
    assert config["dspark_noise_token_id"] == 32767


@pytest.mark.parametrize("overrides", ODD_SHAPES, ids=["wide", "five-experts", "six-heads"])
@pytest.mark.parametrize("variant", VARIANTS, ids=VARIANT_IDS)
def test_odd_shapes_fill_their_files(overrides: dict[str, Any], variant: str | None, tmp_path: Path) -> None:
    summary = write_synth(tmp_path / "m", "tiny", variant=variant, overrides=overrides, seed=11)
    tensors = read_tensors(tmp_path / "m")
    assert len(tensors) == summary.tensors
    assert sum(len(data) for _, _, data in tensors.values()) == summary.payload_bytes
    for name, value in dequantised(tensors).items():
        assert np.isfinite(value).all(), name
    load_config(tmp_path / "m")


# --- files ---------------------------------------------------------------------------------------


def test_one_file_is_called_model_and_has_no_index(tmp_path: Path) -> None:
    write_synth(tmp_path / "m", "tiny", files=1)
    assert [p.name for p in (tmp_path / "m").glob("model*")] == ["model.safetensors"]


def test_some_weight_lies_in_another_file_than_its_scale(tiny: Path) -> None:
    weight_map = json.loads((tiny / "model.safetensors.index.json").read_text())["weight_map"]
    parted = [
        name
        for name, file in weight_map.items()
        if name.endswith(".scale") and weight_map[name.removesuffix(".scale") + ".weight"] != file
    ]
    assert parted


@pytest.mark.parametrize("files", [2, 3, 7, 427])
def test_files_share_the_bytes_and_none_is_empty(files: int) -> None:
    plan = plan_synth("tiny", files=files)
    assert len(plan.files) == files
    assert all(plan.files)
    if files < 10:
        largest = max(sum(t.nbytes for t in f) for f in plan.files)
        assert largest < 1.5 * plan.payload_bytes / files


def test_config_tokenizer_and_generation_config_come_along(tiny: Path) -> None:
    config = load_config(tiny)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        json.loads((tiny / name).read_text(encoding="utf-8"))
    assert config.vocab_size == 512


# --- bytes ---------------------------------------------------------------------------------------

# Files that others made from a seed stay comparable only while these hold. A change needs a line in the
# CHANGELOG.
TINY_SHA256: dict[str | None, str] = {
    None: "81ceb8453b209cab57f49f8ba155d810fd223e19e2ab7801dfa9b2f5d9055be3",
    "base": "a0ec6cc623e00060f0dfda2a9cb263c69be5e23a2525e1ff5eef9e5c7a0ba9a0",
    "dspark": "6b9d1725c965cf5b5bd97d846af69b8f5071eb2fe1ff4c4f2e616ae8cf134bfd",
    "vision": "3567495105f7e37bad3cad5da7a01f51a7ea75ccee603c9f7dbb362aaeea20a8",
}


def payload_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name, (dtype, shape, data) in sorted(read_tensors(folder).items()):
        digest.update(f"{name} {dtype} {shape}".encode())
        digest.update(data)
    return digest.hexdigest()


@pytest.mark.parametrize("variant", VARIANTS, ids=VARIANT_IDS)
def test_tiny_bytes_are_the_recorded_ones(variant: str | None, tmp_path: Path) -> None:
    write_synth(tmp_path / "m", "tiny", variant=variant)
    assert payload_digest(tmp_path / "m") == TINY_SHA256[variant]


def test_a_tensor_depends_on_seed_name_and_shape_alone(tmp_path: Path) -> None:
    write_synth(tmp_path / "a", "tiny", seed=5)
    write_synth(tmp_path / "b", "tiny", seed=5, files=5, mtp=False)
    a, b = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    assert set(b) < set(a)
    assert all(a[name] == b[name] for name in b)


def test_variants_share_the_trunk(tmp_path: Path) -> None:
    write_synth(tmp_path / "a", "tiny", seed=5)
    write_synth(tmp_path / "b", "tiny", seed=5, variant="vision")
    a, b = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    trunk = [name for name in a if not name.startswith("mtp.")]
    assert trunk
    assert all(a[name] == b[name] for name in trunk)


def test_another_seed_changes_every_tensor(tmp_path: Path) -> None:
    write_synth(tmp_path / "a", "tiny", seed=0)
    write_synth(tmp_path / "b", "tiny", seed=1)
    a, b = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    same = [name for name in a if a[name][2] == b[name][2]]
    # A scale tensor of two or three bytes with three likely values can come out the same.
    assert all(len(a[name][2]) <= 16 for name in same)
    assert len(same) < 40


def test_no_two_large_tensors_are_alike(tiny: Path) -> None:
    large = [data for _, _, data in read_tensors(tiny).values() if len(data) > 64]
    assert len(set(large)) == len(large)


def test_codes_and_scales_hold_no_nan(tiny: Path) -> None:
    for name, tensor in read_tensors(tiny).items():
        values = array(tensor)
        if tensor[0] == "F8_E4M3":
            assert not np.isin(values, (0x7F, 0xFF)).any(), name
        elif tensor[0] == "F8_E8M0":
            assert values.min() > 64, name
            assert values.max() < 192, name
        elif tensor[0] in ("F32", "BF16"):
            assert np.isfinite(values).all(), name
            assert values.any(), name


def test_codes_use_the_whole_format(tmp_path: Path) -> None:
    write_synth(tmp_path / "m", "tiny")
    codes: dict[str, set[int]] = {"F8_E4M3": set(), "I8": set()}
    for tensor in read_tensors(tmp_path / "m").values():
        if tensor[0] in codes:
            codes[tensor[0]] |= set(np.unique(array(tensor)).tolist())
    assert {c & 15 for c in codes["I8"]} == {c >> 4 for c in codes["I8"]} == set(range(16))
    # All finite codes but the few subnormals that a gaussian hardly meets.
    assert len(codes["F8_E4M3"]) > 200
    assert {0x7E, 0xFE} <= codes["F8_E4M3"]


def test_weights_have_about_unit_gain(tmp_path: Path) -> None:
    write_synth(tmp_path / "m", "nano", layers=1, vocab=1024, mtp=False)
    tensors = read_tensors(tmp_path / "m")
    quantised = [name for name in tensors if name.removesuffix(".weight") + ".scale" in tensors]
    values = dequantised({name: t for name, t in tensors.items() if not name.startswith("embed")})
    assert len(quantised) > 30
    for name in quantised:
        gain = values[name].std() * math.sqrt(values[name].shape[1])
        # Where a tensor has a handful of blocks, their few scales decide.
        few = math.prod(tensors[name.removesuffix(".weight") + ".scale"][1]) < 32
        assert (0.4 < gain < 2) if few else (0.8 < gain < 1.25), name
        assert abs(values[name].mean()) < 0.02 * values[name].std(), name


def test_scales_vary_within_a_tensor(tmp_path: Path) -> None:
    write_synth(tmp_path / "m", "tiny")
    tensors = read_tensors(tmp_path / "m")
    scale = array(tensors["layers.0.ffn.experts.0.w1.scale"])
    assert len(np.unique(scale)) == len(set(synth_values.GROUP_SCALE_STEPS))
    assert len(np.unique(array(tensors["layers.0.attn.wq_b.scale"]))) == 3


@pytest.mark.parametrize("power_of_two", [True, False], ids=["powers", "any"])
def test_base_scales_are_powers_of_two_unless_asked_otherwise(power_of_two: bool, tmp_path: Path) -> None:
    write_synth(tmp_path / "m", "tiny", variant="base", power_of_two_scales=power_of_two)
    scales = [array(t) for name, t in read_tensors(tmp_path / "m").items() if name.endswith(".scale")]
    assert all(scale.dtype == np.float32 for scale in scales)
    mantissas = np.concatenate([np.frexp(scale)[0].ravel() for scale in scales])
    assert np.all(mantissas == 0.5) if power_of_two else np.all(mantissas != 0.5)


def test_hash_tables_name_distinct_experts_and_all_of_them(tiny: Path) -> None:
    config = load_config(tiny)
    tensors = read_tensors(tiny)
    for layer in range(config.num_hash_layers):
        table = array(tensors[f"layers.{layer}.ffn.gate.tid2eid"])
        assert table.shape == (config.vocab_size, config.num_experts_per_tok)
        assert all(len(set(row)) == len(row) for row in table.tolist())
        assert set(table.ravel().tolist()) == set(range(config.n_routed_experts))


@pytest.mark.parametrize(
    ("experts", "taken"), [(8, 3), (256, 6), (8, 6), (7, 6), (6, 6), (5, 2), (1, 1)], ids=lambda n: str(n)
)
@pytest.mark.parametrize("bias", ["bias", "bias_vl"])
def test_routers_choose_by_token_with_clear_margins(experts: int, taken: int, bias: str) -> None:
    hidden, tokens = 160, 2000
    rows = synth_values._router_rows("layers.4.ffn.gate.weight", (experts, hidden), taken, seed=1)
    offsets = synth_values._router_bias(f"layers.4.ffn.gate.{bias}", experts, taken, bias == "bias_vl", seed=1)
    x = np.random.default_rng(2).standard_normal((tokens, hidden)).astype(np.float32)
    logits = x @ rows.T
    scores = np.sqrt(np.logaddexp(0, logits)) + offsets
    order = np.argsort(-scores, axis=1)
    if taken < experts:
        ranked = np.take_along_axis(scores, order, axis=1)
        margin = ranked[:, taken - 1] - ranked[:, taken]
        assert np.median(margin) > 0.3
        assert np.mean(margin < 1e-3) < 0.01
        choices = {tuple(sorted(row[:taken])) for row in order.tolist()}
        pairs = min(taken, experts - taken)
        assert len(choices) == 2**pairs
    weights = np.take_along_axis(np.sqrt(np.logaddexp(0, logits)), order[:, :taken], axis=1).sum(axis=1)
    assert weights.min() > 0.05 if taken == experts else weights.min() > 0.5


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("overrides", [{}, *ODD_SHAPES], ids=["tiny", "wide", "five-experts", "six-heads"])
def test_forward_pass_stays_finite_and_of_ordinary_size(seed: int, overrides: dict[str, Any], tmp_path: Path) -> None:
    write_synth(tmp_path / "m", "tiny", seed=seed, overrides=overrides)
    config = load_config(tmp_path / "m")
    model = Model(DictSource(config, dequantised(read_tensors(tmp_path / "m"))))
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, 140)
    for name, value in model.activations(tokens):
        if value.dtype.kind == "f" and not name.endswith("indexer.score"):  # -inf marks what is not visible
            assert np.isfinite(value).all(), name
            assert 1e-3 < np.abs(value).max() < 1e3, name


# --- vision --------------------------------------------------------------------------------------


def vision_config(**changes: Any) -> ModelConfig:
    return parse_config({**synth_config("tiny", variant="vision"), **changes}, "vision")


def test_vision_tower_of_flash_has_267_tensors() -> None:
    config = parse_config(synth_config("flash", variant="vision"), "vision")
    assert len(list(vision_tensors(config))) == 267
    shapes = {expected.name: expected.shape for expected in vision_tensors(config)}
    assert shapes["vision.patch_embed.proj.weight"] == (1024, 588)
    assert shapes["aligner.w1.weight"] == (4096, 9216)
    assert shapes["vision.blocks.31.mlp.w1.weight"] == (5632, 1024)


def test_vision_names_of_gguf_are_distinct() -> None:
    names = [
        (f"v.blk.{e.layer}." if e.layer is not None else "") + part
        for e in vision_tensors(vision_config())
        for part in (e.row.gguf or "").split()
    ]
    assert len(set(names)) == len(names)
    assert len(names) == 11 + 3 * 9


@pytest.mark.parametrize("value", [None, 0, "3", True, 2.5], ids=str)
def test_bad_vision_key_is_named(value: object) -> None:
    with pytest.raises(ConfigError, match="vision_dim"):
        vision_dims(vision_config(vision_dim=value))


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (
            {"preset": "huge"},
            UsageError,
            "unknown preset: expected tiny, nano, flash, pro, v41-tiny or v41-flash, got huge",
        ),
        ({"variant": "audio"}, UsageError, "unknown variant"),
        ({"layers": 0}, UsageError, "--layers outside the model: expected 1 to 4, got 0"),
        ({"layers": 5}, UsageError, "expected 1 to 4, got 5"),
        ({"layers": 3, "ratios": [0, 4]}, UsageError, "--layers"),
        ({"ratios": []}, UsageError, "--ratios is empty"),
        ({"ratios": [0, 7]}, ConfigError, "compress_ratios[1]"),
        ({"files": 0}, UsageError, "--files out of range"),
        ({"files": 10**6}, UsageError, "--files out of range: expected 1 to 427"),
        ({"vocab": 3}, UsageError, "vocabulary too small"),
        ({"overrides": {"hidden_size": 100}}, UsageError, "hidden_size cannot hold FP4 blocks"),
        ({"overrides": {"hiden_size": 128}}, UsageError, "unknown config key hiden_size"),
        ({"overrides": {"hidden_size": "big"}}, ConfigError, "hidden_size"),
        ({"overrides": {"o_groups": 3}}, ConfigError, "o_groups"),
        ({"variant": "dspark", "layers": 2}, UsageError, "expected at least 3, got 2; pass --draft drop"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_what_makes_no_model_is_refused_by_name(
    options: dict[str, Any], error: type[Dsv4Error], says: str, tmp_path: Path
) -> None:
    options = dict(options)
    with pytest.raises(error) as caught:
        write_synth(tmp_path / "m", options.pop("preset", "tiny"), **options)
    assert says in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept_without_overwrite(tmp_path: Path) -> None:
    write_synth(tmp_path / "m", "tiny", seed=1)
    before = payload_digest(tmp_path / "m")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        write_synth(tmp_path / "m", "tiny", seed=2)
    assert payload_digest(tmp_path / "m") == before
    write_synth(tmp_path / "m", "tiny", seed=2, files=3, overwrite=True)
    assert payload_digest(tmp_path / "m") != before
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 3


@pytest.mark.parametrize("kind", ["foreign file", "subfolder", "no config", "file", "link"])
def test_overwrite_removes_nothing_but_a_checkpoint(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "m"
    if kind == "file":
        out.write_text("mine")
    elif kind == "link":
        write_synth(tmp_path / "other", "tiny")
        out.symlink_to(tmp_path / "other")
    elif kind == "no config":
        out.mkdir()
        (out / "notes.json").write_text("{}")
    else:
        write_synth(out, "tiny")
        if kind == "subfolder":
            (out / "sub").mkdir()
        else:
            (out / "thesis.tex").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputExistsError, match=r"(not replaced: (contains|has no)|and is no folder)"):
        write_synth(out, "tiny", overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_interrupted_run_leaves_the_old_folder_and_no_partial_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_synth(tmp_path / "m", "tiny", seed=1)
    before = payload_digest(tmp_path / "m")

    def stop(done: int) -> None:
        if done > 10_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_plan(plan_synth("tiny"), tmp_path / "m", seed=2, overwrite=True, progress=stop)
    assert payload_digest(tmp_path / "m") == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_takes_the_name_during_the_run_stays(overwrite: bool, tmp_path: Path) -> None:
    out, thesis = tmp_path / "m", tmp_path / "m" / "thesis.json"
    if overwrite:
        write_synth(out, "tiny", seed=1)

    def put(done: int) -> None:
        out.mkdir(exist_ok=True)
        thesis.write_text("three years of work")

    with pytest.raises(OutputExistsError, match="appeared or changed during the conversion and is left in place"):
        write_plan(plan_synth("tiny"), out, seed=2, overwrite=overwrite, progress=put)
    assert thesis.read_text() == "three years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_unfinished_work_of_a_conversion_is_no_stale_folder(tmp_path: Path) -> None:
    (tmp_path / "m.partial").mkdir()
    (tmp_path / "m.partial" / "config.json").write_text("{}")
    (tmp_path / "m.journal").write_text("unfinished")
    with pytest.raises(OutputExistsError, match="unfinished work of a conversion; finish it"):
        write_synth(tmp_path / "m", "tiny")
    assert (tmp_path / "m.partial" / "config.json").read_text() == "{}"


def test_a_stale_partial_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "m.partial").mkdir()
    (tmp_path / "m.partial" / "config.json").write_text("{}")
    write_synth(tmp_path / "m", "tiny")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_no_room_on_the_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SpaceError, match="bytes free, got 1000"):
        write_synth(tmp_path / "m", "tiny")
    assert not list(tmp_path.iterdir())
    write_synth(tmp_path / "m", "tiny", headers_only=True)


def test_a_failed_write_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputOutputError, match="cannot be written"):
        write_synth(tmp_path / "file" / "m", "tiny")


# --- bounds and the command ----------------------------------------------------------------------


def test_memory_stays_below_300_mib_whatever_the_size(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from dsv4convert.synth.write import write_synth\n"
        "write_synth(Path(sys.argv[1]) / 'nano', 'nano')\n"
        "write_synth(Path(sys.argv[1]) / 'pro', 'pro', headers_only=True)\n"
        # Not getrusage: its peak outlives exec, and so would be that of the process that runs the tests.
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 300 * 1024


def test_command_writes_what_the_library_writes(tmp_path: Path) -> None:
    from dsv4convert.cli import app

    arguments = [
        "synth",
        str(tmp_path / "a"),
        *("--variant", "base", "--ratios", "0,4", "--routed-experts", "4", "--vocab", "400", "--files", "3"),
        *("--seed", "7", "--draft", "drop", "--any-scales", "--set", "q_lora_rank=64", "--json"),
    ]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    write_synth(
        tmp_path / "b",
        "tiny",
        variant="base",
        ratios=[0, 4],
        experts=4,
        vocab=400,
        files=3,
        seed=7,
        mtp=False,
        power_of_two_scales=False,
        overrides={"q_lora_rank": 64},
    )
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }
    assert json.loads(result.stdout)["files"] == 3


@pytest.mark.parametrize(
    ("argument", "says"),
    [("--ratios=0,x", "--ratios: not a list"), ("--set=hidden_size", "--set: not a setting")],
)
def test_command_refuses_malformed_lists(argument: str, says: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dsv4convert", "synth", str(tmp_path / "m"), argument],
        capture_output=True,
        text=True,
    )
    assert done.returncode == UsageError.exit_code
    assert done.stderr.startswith("error: " + says)
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
