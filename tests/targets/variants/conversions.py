"""Checkpoints of every published kind, and the same ones as other tools save them again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv4convert.checkpoint.folder import read_folder_headers
from dsv4convert.engine.conversion import Summary, execute
from dsv4convert.targets.dequantize import plan_dequantize
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions
from dsv4convert.targets.repack import plan_repack

from ...oracles.safetensors_bytes import RawSafetensors, RawTensor

# Experts as wide as a scale block, so that stacks of gate and up can be told apart.
WIDE_EXPERTS = {"moe_intermediate_size": 128}

VARIANTS: dict[str, dict[str, Any]] = {
    "flash": {},
    "base": {"variant": "base"},
    "base, any scales": {"variant": "base", "power_of_two_scales": False},
    "dspark": {"variant": "dspark"},
    "vision": {"variant": "vision"},
}


# An e8m0 byte and 32 codes of four bits.
MXFP4_BYTES = 17


class Raw(NamedTuple):
    """A tensor of a safetensors file: dtype, shape and bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def read_tensors(folder: Path) -> dict[str, Raw]:
    """Return every tensor of a folder as it is stored."""
    tensors: dict[str, Raw] = {}
    for name, stored in read_folder_headers(folder)[0].items():
        with stored.file.open("rb") as file:
            file.seek(stored.offset)
            tensors[name] = Raw(stored.dtype, stored.shape, file.read(stored.nbytes))
    return tensors


def write_folder(
    source: Path, out: Path, tensors: Mapping[str, Raw], config: Callable[[dict[str, Any]], Any] | None = None
) -> Path:
    """Write ``tensors`` as the one file of a folder, with the source's other files and a changed config."""
    out.mkdir()
    raw = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(raw if config is None else config(raw)))
    for path in source.glob("*.json"):
        if path.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copy(path, out)
    raw_tensors = {name: RawTensor(tensor.dtype, list(tensor.shape), tensor.data) for name, tensor in tensors.items()}
    RawSafetensors(raw_tensors, None).write(out / "model.safetensors")
    return out


def transformers_config(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a config in the form that transformers 5 saves."""
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    config = dict(raw)
    layers = config["num_hidden_layers"]
    config["layer_types"] = [kinds[ratio] for ratio in config.pop("compress_ratios")[:layers]]
    hashed = config.pop("num_hash_layers")
    config["mlp_layer_types"] = ["hash_moe"] * hashed + ["moe"] * (layers - hashed)
    scaling = config.pop("rope_scaling")
    config["rope_parameters"] = {
        "main": {"rope_type": "default", "rope_theta": config.pop("rope_theta")},
        "compress": {**scaling, "rope_type": "yarn", "rope_theta": config.pop("compress_rope_theta")},
    }
    config["partial_rotary_factor"] = config.pop("qk_rope_head_dim") / config["head_dim"]
    return config


def to_gguf(source: Path, out: Path, **options: Any) -> Summary:
    return execute(plan_gguf(source, out, GgufOptions(**options), name="model"), threads=2)


def to_bf16(source: Path, out: Path, **options: Any) -> Path:
    execute(plan_dequantize(source, out, **options), threads=2)
    return out


def to_fp8(source: Path, out: Path) -> Path:
    execute(plan_repack(source, out), threads=2)
    return out


def gguf_tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Return type, dimensions and bytes of every tensor of a GGUF."""
    from gguf import GGUFReader

    return {
        tensor.name: (tensor.tensor_type.name, [int(n) for n in tensor.shape], np.asarray(tensor.data).tobytes())
        for tensor in GGUFReader(path).tensors
    }


def assert_same_values(left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
    """Compare MXFP4 tensors by value, for some blocks have two encodings, and all others byte by byte."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    assert left.keys() == right.keys()
    for name, (kind, shape, data) in left.items():
        assert right[name][:2] == (kind, shape), name
        if kind != "MXFP4":
            assert right[name][2] == data, name
            continue
        values = [
            dequantize(np.frombuffer(blocks, np.uint8).reshape(-1, MXFP4_BYTES), GGMLQuantizationType.MXFP4)
            for blocks in (data, right[name][2])
        ]
        assert np.array_equal(*values), name


def gguf_keys(path: Path) -> dict[str, Any]:
    """Return the value of every key of a GGUF."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
