"""FP8 experts: Base with its F32 scales, and FP4 experts that somebody repacked as FP8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from dsv4convert.checkpoint import open_folder

from ...checkpoints import MakeCheckpoint
from ..sharding import shard, unshard
from .conversions import Raw, assert_same_values, gguf_tensors, read_tensors, to_bf16, to_fp8, to_gguf, write_folder

Array = np.ndarray[Any, Any]
BLOCK = 128


def decoded(weight: Raw, scale: Raw) -> Array:
    """Return e4m3 codes times their scales in float32, by ml_dtypes."""
    codes = np.frombuffer(weight.data, ml_dtypes.float8_e4m3fn).reshape(weight.shape).astype(np.float32)
    kind = np.float32 if scale.dtype == "F32" else ml_dtypes.float8_e8m0fnu
    scales = np.frombuffer(scale.data, kind).reshape(scale.shape).astype(np.float32)
    rows, columns = weight.shape
    return codes * scales.repeat(BLOCK, 0)[:rows].repeat(BLOCK, 1)[:, :columns]


@pytest.fixture(scope="module", params=["powers of two", "any scales", "e8m0 repack"])
def source(
    request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    if request.param == "e8m0 repack":
        return to_fp8(make_checkpoint("tiny"), tmp_path_factory.mktemp("repack") / "fp8")
    return make_checkpoint("tiny", variant="base", power_of_two_scales=request.param == "powers of two")


def expert_stacks(source: Path) -> dict[str, Array]:
    """Return the decoded experts of each trunk layer and matrix, stacked, by GGUF name."""
    tensors = read_tensors(source)
    config = open_folder(source).config
    stacks = {}
    for layer in range(config.num_hidden_layers):
        for part, name in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            stems = [f"layers.{layer}.ffn.experts.{e}.{part}" for e in range(config.n_routed_experts)]
            stacks[f"blk.{layer}.ffn_{name}_exps.weight"] = np.stack(
                [decoded(tensors[f"{stem}.weight"], tensors[f"{stem}.scale"]) for stem in stems]
            )
    return stacks


def test_experts_become_q8_0_as_if_decoded_in_float32_and_quantised_plainly(source: Path, tmp_path: Path) -> None:
    to_gguf(source, tmp_path / "m.gguf")
    found = gguf_tensors(tmp_path / "m.gguf")
    for name, stack in expert_stacks(source).items():
        kind, _, data = found[name]
        assert kind == "Q8_0"
        assert data == quantize(stack, GGMLQuantizationType.Q8_0).tobytes(), name


def test_dense_weights_become_q8_0_likewise(source: Path, tmp_path: Path) -> None:
    to_gguf(source, tmp_path / "m.gguf")
    found, tensors = gguf_tensors(tmp_path / "m.gguf"), read_tensors(source)
    names = {"attn.wq_a": "attn_q_a", "attn.wo_b": "attn_output_b", "ffn.shared_experts.w2": "ffn_down_shexp"}
    for official, name in names.items():
        values = decoded(tensors[f"layers.1.{official}.weight"], tensors[f"layers.1.{official}.scale"])
        assert found[f"blk.1.{name}.weight"][2] == quantize(values, GGMLQuantizationType.Q8_0).tobytes(), name


def test_mxfp4_experts_round_and_every_changed_element_is_counted(source: Path, tmp_path: Path) -> None:
    summary = to_gguf(source, tmp_path / "m.gguf", experts="mxfp4")
    found = gguf_tensors(tmp_path / "m.gguf")
    counted = {entry["tensor"]: entry["changed"] + entry["underflow"] for entry in summary.counted}
    for name, stack in expert_stacks(source).items():
        kind, _, data = found[name]
        assert kind == "MXFP4"
        blocks = np.frombuffer(data, np.uint8).reshape(-1, 17)
        values = dequantize(blocks, GGMLQuantizationType.MXFP4).reshape(stack.shape)
        assert counted.get(name, 0) == np.count_nonzero(values != stack), name
    assert any("--experts mxfp4 rounds fp8 experts" in note for note in summary.notes)


def test_fp8_of_an_fp4_origin_loses_nothing_on_its_way_to_mxfp4(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    flash = make_checkpoint("tiny")
    to_gguf(flash, tmp_path / "fp4.gguf")
    summary = to_gguf(to_fp8(flash, tmp_path / "fp8"), tmp_path / "fp8.gguf", experts="mxfp4")
    assert not summary.counted
    assert_same_values(gguf_tensors(tmp_path / "fp8.gguf"), gguf_tensors(tmp_path / "fp4.gguf"))


def test_bf16_is_exact_for_powers_of_two_and_else_rounds_once_and_says_so(source: Path, tmp_path: Path) -> None:
    from dsv4convert.engine.conversion import execute
    from dsv4convert.targets.dequantize import plan_dequantize

    summary = execute(plan_dequantize(source, tmp_path / "bf16"), threads=2)
    tensors, found = read_tensors(source), read_tensors(tmp_path / "bf16")
    changed = 0
    for name, weight in tensors.items():
        if weight.dtype != "F8_E4M3":
            continue
        # The exact product: 4 significant bits times 24 fit a float64.
        scale = tensors[name.removesuffix(".weight") + ".scale"]
        codes = np.frombuffer(weight.data, ml_dtypes.float8_e4m3fn).reshape(weight.shape).astype(np.float64)
        kind = np.float32 if scale.dtype == "F32" else ml_dtypes.float8_e8m0fnu
        scales = np.frombuffer(scale.data, kind).reshape(scale.shape).astype(np.float64)
        rows, columns = weight.shape
        exact = codes * scales.repeat(BLOCK, 0)[:rows].repeat(BLOCK, 1)[:, :columns]
        value = np.frombuffer(found[name].data, ml_dtypes.bfloat16).reshape(weight.shape).astype(np.float64)
        # Nearest: no further from the exact product than half a step of 8 significant bits.
        assert (np.abs(value - exact) <= np.abs(exact) * 2.0**-8).all(), name
        changed += np.count_nonzero(value != exact)
    assert changed == sum(entry["changed"] for entry in summary.counted)
    scales_are_powers = all(
        np.all(np.frexp(np.frombuffer(t.data, np.float32))[0] == 0.5)
        for n, t in tensors.items()
        if n.endswith(".scale") and t.dtype == "F32"
    )
    assert (changed == 0) == scales_are_powers


def test_shards_keep_fp8_with_its_scales_and_come_back(source: Path, tmp_path: Path) -> None:
    shard(source, tmp_path / "mp2", 2)
    scale_dtype = read_tensors(source)["layers.0.ffn.experts.0.w1.scale"].dtype
    from dsv4convert.containers.safetensors import read_header

    for rank in range(2):
        held = read_header(tmp_path / "mp2" / f"model{rank}-mp2.safetensors")
        experts = {name: tensor for name, tensor in held.items() if ".experts." in name}
        assert {t.dtype for n, t in experts.items() if n.endswith(".weight")} == {"F8_E4M3"}
        assert {t.dtype for n, t in experts.items() if n.endswith(".scale")} == {scale_dtype}
    unshard(tmp_path / "mp2", tmp_path / "back")
    original, back = read_tensors(source), read_tensors(tmp_path / "back")
    assert {n: t for n, t in back.items() if ".wo_a." not in n} == {
        n: t for n, t in original.items() if ".wo_a." not in n
    }


@pytest.mark.parametrize("experts", ["bf16", "f32"])
def test_experts_can_be_plain_floats(source: Path, experts: str, tmp_path: Path) -> None:
    to_gguf(source, tmp_path / "m.gguf", experts=experts)
    found = gguf_tensors(tmp_path / "m.gguf")
    kind: Any = ml_dtypes.bfloat16 if experts == "bf16" else np.float32
    for name, stack in expert_stacks(source).items():
        value = np.frombuffer(found[name][2], kind).reshape(stack.shape).astype(np.float32)
        tolerance = 2.0**-8 if experts == "bf16" else 0.0
        assert (np.abs(value - stack) <= tolerance * np.abs(stack)).all()


def test_encodings_are_read_off_the_tensors_whatever_config_says(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    base = make_checkpoint("tiny", variant="base")
    lying = write_folder(base, tmp_path / "lying", read_tensors(base), lambda raw: {**raw, "expert_dtype": "fp4"})
    to_gguf(base, tmp_path / "base.gguf")
    to_gguf(lying, tmp_path / "lying.gguf")
    assert gguf_tensors(tmp_path / "lying.gguf") == gguf_tensors(tmp_path / "base.gguf")


def test_bf16_of_base_gives_the_q8_0_of_base(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    base = make_checkpoint("tiny", variant="base")
    bf16 = to_bf16(base, tmp_path / "bf16")
    to_gguf(base, tmp_path / "base.gguf")
    to_gguf(bf16, tmp_path / "bf16.gguf", experts="q8_0", dense="q8_0")
    assert gguf_tensors(tmp_path / "bf16.gguf") == gguf_tensors(tmp_path / "base.gguf")
