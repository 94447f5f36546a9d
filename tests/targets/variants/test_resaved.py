"""Folders that other tools saved again: the same weights under other names, in other shapes, with other configs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4convert.checkpoint import open_folder
from dsv4convert.checkpoint.renaming import official_name
from dsv4convert.errors import InventoryError
from dsv4convert.formats.e2m1 import quantise_fp4
from dsv4convert.model.tensors import LAYER_ROWS, TOP_ROWS, V3_COMPONENT_ALIASES, is_vision_name
from dsv4convert.verification import verify

from ...checkpoints import MakeCheckpoint
from ..sharding import shard
from .conversions import (
    MXFP4_BYTES,
    WIDE_EXPERTS,
    Raw,
    assert_same_values,
    gguf_keys,
    gguf_tensors,
    read_tensors,
    to_bf16,
    to_fp8,
    to_gguf,
    transformers_config,
    write_folder,
)

# Official names to transformers' module names, from the tables; tests hold some of them to literals.
MODULE = {row.name: row.transformers for row in LAYER_ROWS if row.transformers is not None}
TOP_MODULE = {row.name: row.transformers for row in TOP_ROWS if row.transformers is not None}
V3 = {official: alias for alias, official in V3_COMPONENT_ALIASES.items()}


def module_name(name: str, scale_suffix: str = ".weight_scale_inv") -> str:
    """Return what transformers calls a tensor of the trunk, experts one by one."""
    if name in TOP_MODULE:
        return TOP_MODULE[name]
    if not name.startswith("layers."):
        return name
    layers, number, rest = name.split(".", 2)
    stem, is_scale = (rest.removesuffix(".scale"), True) if rest.endswith(".scale") else (rest, False)
    if rest.startswith("ffn.experts."):
        for official, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            stem = stem.replace(f".{official}", f".{theirs}")
        stem = stem.replace("ffn.", "mlp.", 1)
        return f"model.{layers}.{number}.{stem}{scale_suffix if is_scale else ''}"
    if is_scale:
        return f"model.{layers}.{number}.{MODULE[stem + '.weight'].removesuffix('.weight')}{scale_suffix}"
    return f"model.{layers}.{number}.{MODULE.get(rest, rest)}"


def v3_name(name: str) -> str:
    """Return a name with V3-style components where there are any."""
    if is_vision_name(name):
        return name
    parts = name.split(".")
    if parts[-1] == "scale":
        parts[-1] = "weight_scale_inv"
    keep = {"bias", "scale"}
    return "model." + ".".join(V3.get(part, part) if part not in keep else part for part in parts)


def stacked(tensors: Mapping[str, Raw]) -> dict[str, Raw]:
    """Return the experts of each layer as transformers stacks them, gate above up, and all else by module name."""
    found: dict[str, Raw] = {}
    groups: dict[str, list[Raw]] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: _expert_order(item[0])):
        if ".ffn.experts." not in name or name.startswith("mtp."):
            found[module_name(name)] = tensor
            continue
        prefix, rest = name.split("ffn.experts.")
        _, part, leaf = rest.split(".")
        stack = "gate_up_proj" if part in ("w1", "w3") else "down_proj"
        suffix = "_scale_inv" if leaf == "scale" else ""
        groups.setdefault(f"model.{prefix}mlp.experts.{stack}{suffix}", []).append(tensor)
    for name, members in groups.items():
        parts = 2 if "gate_up" in name else 1
        rows, columns = members[0].shape
        shape = (len(members) // parts, parts * rows, columns)
        found[name] = Raw(members[0].dtype, shape, b"".join(member.data for member in members))
    return found


def _expert_order(name: str) -> tuple[str, int, str]:
    if ".experts." not in name or ".shared_experts." in name:
        return name, 0, ""
    prefix, rest = name.split(".experts.")
    expert, rest = rest.split(".", 1)
    return prefix, int(expert), rest


def renamed(rename: Callable[[str], str]) -> Callable[[Mapping[str, Raw]], dict[str, Raw]]:
    return lambda tensors: {rename(name): tensor for name, tensor in tensors.items()}


def half_restored(name: str) -> str:
    """Return what transformers 5 writes when it restores official names: a prefix, and one norm without its kind."""
    if name.startswith("layers."):
        return "model." + name.replace("attn.kv_norm.", "attn.norm.")
    return {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}.get(
        name, f"model.hc_head.{name.removeprefix('hc_head_')}" if name.startswith("hc_head_") else name
    ).replace("hc_head.", "hc_head.hc_")


SHAPES: dict[str, Callable[[Mapping[str, Raw]], dict[str, Raw]]] = {
    "as it is, in one file": renamed(lambda name: name),
    "model. prefix": renamed(lambda name: f"model.{name}"),
    "V3-style names": renamed(v3_name),
    "transformers' modules, single experts": renamed(module_name),
    "transformers' modules, scales called .scale": renamed(lambda name: module_name(name, ".scale")),
    "transformers' modules, stacked experts": stacked,
    "names that transformers half restored": renamed(half_restored),
}


@pytest.fixture(scope="module", params=["fp4", "fp8", "base", "bf16", "f32", "dspark", "vision"])
def source(
    request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a checkpoint of each way to store weights, in official names."""
    kind = request.param
    named = kind if kind in ("base", "dspark", "vision") else None
    made = make_checkpoint("tiny", variant=named, overrides=WIDE_EXPERTS)
    out = tmp_path_factory.mktemp("source") / kind
    if kind == "fp8":
        return to_fp8(made, out)
    if kind in ("bf16", "f32"):
        return to_bf16(made, out, dtype=kind)
    return made


@pytest.mark.parametrize("config", ["official config", "transformers' config"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_resaved_folder_is_the_same_checkpoint(source: Path, shape: str, config: str, tmp_path: Path) -> None:
    """Official names, other names and official names again: what is converted from both is the same."""
    change = transformers_config if config.startswith("transformers") else None
    again = write_folder(source, tmp_path / "again", SHAPES[shape](read_tensors(source)), change)
    original, found = open_folder(source), open_folder(again)
    assert found.n_tensors == len(SHAPES[shape](read_tensors(source)))
    assert found.weights.keys() == original.weights.keys()
    assert found.nbytes == original.nbytes
    assert found.config.compress_ratios == original.config.compress_ratios
    for weight, twin in zip(original.weights.values(), found.weights.values(), strict=True):
        assert (twin.shape, twin.encoding, twin.block) == (weight.shape, weight.encoding, weight.block)
        assert stored_bytes(twin.stored) == stored_bytes(weight.stored), weight.name
        assert (twin.scale is None) == (weight.scale is None)
        if twin.scale is not None and weight.scale is not None:
            assert stored_bytes(twin.scale) == stored_bytes(weight.scale), weight.name


def stored_bytes(stored: Any) -> bytes:
    with stored.file.open("rb") as file:
        file.seek(stored.offset)
        data: bytes = file.read(stored.nbytes)
    return data


@pytest.mark.parametrize("shape", ["transformers' modules, stacked experts", "names that transformers half restored"])
def test_every_conversion_of_a_resaved_folder_equals_the_originals(source: Path, shape: str, tmp_path: Path) -> None:
    again = write_folder(source, tmp_path / "again", SHAPES[shape](read_tensors(source)), transformers_config)
    for folder, name in ((source, "a"), (again, "b")):
        to_gguf(folder, tmp_path / f"{name}.gguf")
        to_bf16(folder, tmp_path / f"{name}-bf16")
        shard(folder, tmp_path / f"{name}-mp2", 2)
    assert gguf_tensors(tmp_path / "b.gguf") == gguf_tensors(tmp_path / "a.gguf")
    assert gguf_keys(tmp_path / "b.gguf") == gguf_keys(tmp_path / "a.gguf")
    assert read_tensors(tmp_path / "b-bf16") == read_tensors(tmp_path / "a-bf16")
    for rank in range(2):
        files = [tmp_path / f"{name}-mp2" / f"model{rank}-mp2.safetensors" for name in "ab"]
        assert files[0].read_bytes() == files[1].read_bytes()
    for output in ("b.gguf", "b-bf16", "b-mp2"):
        # Plain float32 stays, and a folder made of nothing else is called what was asked for.
        assert verify(again, tmp_path / output, ignore_keys=["general.name", "dtype", "torch_dtype"]).problems == []


def test_official_to_transformers_to_official_gives_the_same_bytes(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint("tiny")
    direct = to_bf16(source, tmp_path / "direct")
    modules = to_bf16(source, tmp_path / "modules", names="transformers")
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in read_tensors(modules))
    back = to_bf16(modules, tmp_path / "back")
    assert read_tensors(back) == read_tensors(direct)


# FP4 -> BF16 -> MXFP4


@pytest.mark.parametrize("names", ["official", "transformers"])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_floats_of_an_fp4_origin_lose_nothing_on_their_way_to_mxfp4(
    dtype: str, names: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint("tiny")
    floats = to_bf16(source, tmp_path / "floats", dtype=dtype, names=names)
    to_gguf(source, tmp_path / "direct.gguf")
    summary = to_gguf(floats, tmp_path / "floats.gguf", experts="mxfp4", dense="q8_0")
    assert not [entry for entry in summary.counted if "_exps" in entry["tensor"]]
    direct, found = gguf_tensors(tmp_path / "direct.gguf"), gguf_tensors(tmp_path / "floats.gguf")
    experts = {name for name in direct if "_exps" in name}
    assert_same_values({n: found[n] for n in experts}, {n: direct[n] for n in experts})
    if dtype == "bf16":
        assert_same_values(found, direct)


def test_experts_of_the_published_quantiser_get_their_codes_and_scales_back(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """But for blocks that can be told by no one: a largest code of 6 and neither 0.5 nor 1.5 beside it."""
    source = make_checkpoint("tiny")
    tensors = read_tensors(source)
    draw = np.random.default_rng(0)
    for name, tensor in list(tensors.items()):
        if tensor.dtype == "I8":
            rows, columns = tensor.shape[0], 2 * tensor.shape[1]
            values = draw.standard_normal((rows, columns), np.float32) * np.float32(0.05)
            codes, scales = quantise_fp4(values)
            tensors[name] = Raw("I8", tensor.shape, codes.tobytes())
            scale = name.removesuffix(".weight") + ".scale"
            tensors[scale] = Raw("F8_E8M0", tensors[scale].shape, scales.tobytes())
    origin = write_folder(source, tmp_path / "origin", tensors)
    to_gguf(origin, tmp_path / "direct.gguf")
    to_gguf(to_bf16(origin, tmp_path / "bf16"), tmp_path / "bf16.gguf", experts="mxfp4", dense="q8_0")
    direct, found = gguf_tensors(tmp_path / "direct.gguf"), gguf_tensors(tmp_path / "bf16.gguf")
    assert_same_values(found, direct)
    total = unlike = 0
    for name in direct:
        if "_exps" not in name:
            assert found[name] == direct[name]
            continue
        ours, theirs = (np.frombuffer(side[name][2], np.uint8).reshape(-1, MXFP4_BYTES) for side in (found, direct))
        differ = (ours != theirs).any(axis=1)
        magnitudes = np.concatenate([theirs[differ, 1:] & 7, theirs[differ, 1:] >> 4 & 7], axis=1)
        assert (magnitudes.max(axis=1) == 7).all()
        assert not np.isin(magnitudes, (1, 3)).any()
        total, unlike = total + len(ours), unlike + int(differ.sum())
    assert unlike <= total / 10_000


def test_bf16_experts_stay_bf16_unless_asked(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    bf16 = to_bf16(make_checkpoint("tiny"), tmp_path / "bf16")
    to_gguf(bf16, tmp_path / "m.gguf")
    kinds = {kind for name, (kind, _, _) in gguf_tensors(tmp_path / "m.gguf").items() if "_exps" in name}
    assert kinds == {"BF16"}
    assert gguf_keys(tmp_path / "m.gguf")["general.file_type"] == 32


# Names


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("model.layers.3.self_attn.q_a_proj.weight_scale_inv", "layers.3.attn.wq_a.scale"),
        ("model.layers.3.self_attn.compressor.indexer.q_b_proj.scale", "layers.3.attn.indexer.wq_b.scale"),
        ("layers.3.self_attn.compressor.kv_proj.weight", "layers.3.attn.compressor.wkv.weight"),
        ("model.layers.3.attn.norm.weight", "layers.3.attn.kv_norm.weight"),
        ("model.layers.3.attn.compressor.indexer.position_bias", "layers.3.attn.indexer.compressor.ape"),
        ("model.layers.3.attn.compressor.gate_proj.weight", "layers.3.attn.compressor.wgate.weight"),
        ("model.layers.3.attn.compressor.indexer.wq_b.weight", "layers.3.attn.indexer.wq_b.weight"),
        ("model.layers.3.mlp.gate.e_score_correction_bias", "layers.3.ffn.gate.bias"),
        ("model.layers.3.mlp.experts.7.down_proj.weight", "layers.3.ffn.experts.7.w2.weight"),
        ("model.layers.3.mlp.shared_experts.up_proj.weight_scale_inv", "layers.3.ffn.shared_experts.w3.scale"),
        ("model.embed_tokens.weight", "embed.weight"),
        ("lm_head.weight", "head.weight"),
        ("model.hc_head.hc_fn", "hc_head_fn"),
        ("model.norm.weight", "norm.weight"),
        ("model.mtp.0.norm.weight", "mtp.0.norm.weight"),
        ("mtp.2.markov_head.markov_w1.weight", "mtp.2.markov_head.markov_w1.weight"),
        ("model.vision.blocks.0.mlp.w1.weight", "vision.blocks.0.mlp.w1.weight"),
        ("aligner.w1.weight", "aligner.w1.weight"),
        ("layers.0.ffn.gate.bias_vl", "layers.0.ffn.gate.bias_vl"),
        ("something.else", "something.else"),
    ],
)
def test_official_name_of(name: str, official: str) -> None:
    assert official_name(name) == official


def test_official_names_stay(variant: Path) -> None:
    assert all(official_name(name) == name for name in read_tensors(variant))


# Bad input


def broken(source: Path, out: Path, change: Callable[[dict[str, Raw]], Any]) -> Path:
    tensors = stacked(read_tensors(source))
    change(tensors)
    return write_folder(source, out, tensors)


STACK = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture
def wide(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("tiny", variant="base", overrides=WIDE_EXPERTS)


def test_a_stack_with_an_expert_too_few_is_named(wide: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Raw]) -> None:
        dtype, shape, data = tensors[STACK]
        tensors[STACK] = Raw(dtype, (7, *shape[1:]), data[: len(data) * 7 // 8])

    with pytest.raises(InventoryError, match=rf"{STACK}: not a stack of 8 experts.*got \[7, 256, 160\]"):
        open_folder(broken(wide, tmp_path / "b", change))


def test_a_stack_that_lies_on_its_side_is_named(wide: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Raw]) -> None:
        dtype, shape, data = tensors[STACK]
        tensors[STACK] = Raw(dtype, (shape[0], shape[2], shape[1]), data)

    with pytest.raises(InventoryError, match=r"gate_up_proj_scale_inv|layers.1.ffn.experts.0.w1.weight: wrong shape"):
        open_folder(broken(wide, tmp_path / "b", change))


def test_scale_blocks_across_gate_and_up_are_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """96 rows each make 192, whose blocks of 128 would straddle the two."""
    source = make_checkpoint("tiny", variant="base")
    again = write_folder(source, tmp_path / "again", stacked(read_tensors(source)))
    with pytest.raises(InventoryError, match="scale blocks that may lie across"):
        open_folder(again)


def test_a_stack_beside_its_single_experts_is_named(wide: Path, tmp_path: Path) -> None:
    single = read_tensors(wide)["layers.1.ffn.experts.3.w1.weight"]
    again = broken(wide, tmp_path / "b", lambda t: t.update({"layers.1.ffn.experts.3.w1.weight": single}))
    with pytest.raises(InventoryError, match=r"layers\.1\.ffn\.experts\.3\.w1\.weight: stored under two names"):
        open_folder(again)


def test_scales_without_their_stack_are_named(wide: Path, tmp_path: Path) -> None:
    again = broken(wide, tmp_path / "b", lambda tensors: tensors.pop(STACK))
    with pytest.raises(InventoryError, match=rf"{STACK}_scale_inv: a scale without its weight"):
        open_folder(again)


def test_a_config_of_vision_without_any_of_its_tensors_is_noted(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    vision = make_checkpoint("tiny", variant="vision")
    text = {
        name: tensor
        for name, tensor in read_tensors(vision).items()
        if not name.startswith(("vision.", "aligner.", "image_"))
    }
    found = open_folder(write_folder(vision, tmp_path / "text", text))
    assert any("no tensor is of one" in note for note in found.notes)
    assert "layers.0.ffn.gate.bias_vl" in found.weights


def test_half_a_vision_tower_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    vision = make_checkpoint("tiny", variant="vision")
    tensors = {n: t for n, t in read_tensors(vision).items() if n != "aligner.w1.bias"}
    with pytest.raises(InventoryError, match=r"aligner\.w1\.bias is missing"):
        open_folder(write_folder(vision, tmp_path / "half", tensors))


def test_the_config_of_transformers_reads_like_the_official_one(variant: Path, tmp_path: Path) -> None:
    raw = json.loads((variant / "config.json").read_text())
    assert "compress_ratios" not in transformers_config(raw)
    again = write_folder(variant, tmp_path / "again", read_tensors(variant), transformers_config)
    assert open_folder(again).config == open_folder(variant).config
