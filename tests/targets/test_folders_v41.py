"""``dequantize`` and ``repack`` of V4.1: tables row by row, FP8 in 32x32 blocks, folders that open again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors import deserialize

from dsv4convert.checkpoint.folder import open_folder
from dsv4convert.checkpoint.weights import Encoding
from dsv4convert.engine.conversion import execute
from dsv4convert.errors import UnsupportedError
from dsv4convert.synth.write import write_synth
from dsv4convert.targets.dequantize import plan_dequantize
from dsv4convert.targets.repack import plan_repack
from dsv4convert.targets.segments import RowSegments

from ..oracles import plain_codecs as plain
from ..v41 import TINY, recorded

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def folder_tensors(folder: Path) -> Tensors:
    return {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for path in sorted(folder.glob("*.safetensors"))
        for name, entry in deserialize(path.read_bytes())
    }


def values(tensors: Tensors, name: str) -> npt.NDArray[np.float32]:
    """Return a weight as float32 by the plain formula: the value of each code times the scale of its block."""
    dtype, shape, data = tensors[name]
    if dtype in ("BF16", "F16", "F32"):
        kind: Any = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}[dtype]
        return np.frombuffer(data, kind).astype(np.float32).reshape(shape)
    scale_shape, scale_data = tensors[name.removesuffix(".weight") + ".scale"][1:]
    scale = np.frombuffer(scale_data, ml_dtypes.float8_e8m0fnu).astype(np.float32).reshape(scale_shape)
    if dtype == "I8":
        codes = plain.fp4_values(np.frombuffer(data, np.uint8).reshape(shape)).astype(np.float32)
    else:
        codes = np.frombuffer(data, ml_dtypes.float8_e4m3fn).astype(np.float32).reshape(shape)
    height, width = (-(-a // b) for a, b in zip(codes.shape, scale.shape, strict=True))
    spread = np.repeat(np.repeat(scale, height, axis=0), width, axis=1)
    return codes * spread[: codes.shape[0], : codes.shape[1]]


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_dequantized_weights_have_the_values_of_codes_and_scales(dtype: str, tmp_path: Path) -> None:
    source = TINY["tiny-a"]
    execute(plan_dequantize(source, tmp_path / "o", dtype=dtype))
    before, after = folder_tensors(source), folder_tensors(tmp_path / "o")
    assert after.keys() == {name for name in before if not name.endswith(".scale")}
    for name in after:
        assert np.array_equal(values(before, name), values(after, name)), name
    assert after["layers.0.engram.embed.weight"][:2] == (dtype.upper(), (660, 32))
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == {"bf16": "bfloat16", "f32": "float32"}[dtype]
    again = open_folder(tmp_path / "o")
    assert {weight.scale for weight in again.weights.values()} == {None}


def test_a_table_is_dequantized_in_many_segments(tmp_path: Path) -> None:
    write_synth(tmp_path / "s", "v41-flash", headers_only=True)
    plan = plan_dequantize(tmp_path / "s", tmp_path / "o")
    tables = [t for file in plan.files for t in file.tensors if "engram.embed" in t.name]
    assert [t.shape for t in tables] == [(384006168, 256), (384016682, 256)]
    assert all(isinstance(t.segments, RowSegments) and len(t.segments) > 1000 for t in tables)
    assert all(len(file.tensors) == 1 for file in plan.files if any(t in tables for t in file.tensors))


def test_transformers_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"transformers has no modules for DeepSeek-V4\.1"):
        plan_dequantize(TINY["tiny-a"], tmp_path / "o", names="transformers")


@pytest.mark.parametrize("name", sorted(TINY))
def test_repacked_experts_have_the_same_values_in_blocks_of_32(name: str, tmp_path: Path) -> None:
    source = TINY[name]
    execute(plan_repack(source, tmp_path / "o"))
    before, after = folder_tensors(source), folder_tensors(tmp_path / "o")
    assert before.keys() == after.keys()
    published = recorded(f"{name}.expected.json")["shards"]["mp1 fp8 rank0"]
    for key in before:
        if ".experts." not in key or "shared" in key:
            assert before[key] == after[key], key
        else:
            assert list(after[key][1]) == published[key][1]
            if key.endswith(".weight"):
                assert after[key][0] == "F8_E4M3"
                assert np.array_equal(values(before, key), values(after, key)), key
    weights = open_folder(tmp_path / "o").weights
    experts = [weight for weight in weights.values() if weight.expert is not None]
    assert {(weight.encoding, weight.block) for weight in experts} == {(Encoding.FP8, (32, 32))}
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    assert config["quantization_config"]["expert_dtype"] == "fp8"
