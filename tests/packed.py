"""Folders in the forms of ModelOpt and compressed-tensors, with weights that are no FP4: made of a small checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from .oracles.safetensors_bytes import RawSafetensors, RawTensor

EXPERT = ".ffn.experts."
Tensors = dict[str, RawTensor]
# Makes the tensors of a weight's stem of its packed FP4 codes [R, C/2] and e8m0 scales [R, C/32].
Form = Callable[[str, np.ndarray, np.ndarray, np.random.Generator], Tensors]

E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)


def tensor(dtype: str, values: np.ndarray) -> RawTensor:
    return RawTensor(dtype, list(values.shape), values.tobytes())


def repacked(folder: Path, to: Path, form: Form, *, seed: int = 0, quantization: dict[str, object]) -> Path:
    """Return a copy of a checkpoint whose trunk's FP4 experts are in a form, under the name that copies have."""
    copy = Path(shutil.copytree(folder, to / "model"))
    random = np.random.default_rng(seed)
    weight_map: dict[str, str] = {}
    for path in sorted(copy.glob("*.safetensors")):
        raw = RawSafetensors.read(path)
        for name in [name for name in raw.tensors if EXPERT in name and name.endswith(".weight")]:
            stem = name.removesuffix(".weight")
            if name.startswith("mtp."):
                continue
            weight, scale = raw.tensors.pop(name), raw.tensors.pop(f"{stem}.scale")
            codes, powers = (np.frombuffer(t.data, np.uint8).reshape(t.shape) for t in (weight, scale))
            raw.tensors |= form(stem, codes, powers, random)
        raw.write(path)
        weight_map |= dict.fromkeys(raw.tensors, path.name)
    index = copy / "model.safetensors.index.json"
    if index.exists():
        index.write_text(json.dumps(json.loads(index.read_text()) | {"weight_map": weight_map}))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return copy


def calibrated(codes: np.ndarray, powers: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.float32]:
    """Return e4m3 scales [R, C/16] and a second scale near those of FP4, as a quantiser would choose."""
    spread = np.repeat(powers.view(ml_dtypes.float8_e8m0fnu).astype(np.float32), 2, axis=1)
    second = np.float32(spread.max() / 448 * random.uniform(1, 1.9))
    scale = (spread / second * random.uniform(0.6, 1.5, spread.shape)).clip(2**-9, 448)
    return scale.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), second


def modelopt_nvfp4(stem: str, codes: np.ndarray, powers: np.ndarray, random: np.random.Generator) -> Tensors:
    scale, second = calibrated(codes, powers, random)
    return {
        f"{stem}.weight": tensor("U8", codes),
        f"{stem}.weight_scale": tensor("F8_E4M3", scale),
        f"{stem}.weight_scale_2": RawTensor("F32", [], second.tobytes()),
        f"{stem}.input_scale": RawTensor("F32", [], np.float32(0.75).tobytes()),
    }


def compressed_nvfp4(stem: str, codes: np.ndarray, powers: np.ndarray, random: np.random.Generator) -> Tensors:
    scale, second = calibrated(codes, powers, random)
    return {
        f"{stem}.weight_packed": tensor("U8", codes),
        f"{stem}.weight_scale": tensor("F8_E4M3", scale),
        f"{stem}.weight_global_scale": tensor("F32", np.array([1 / second], np.float32)),
        f"{stem}.input_global_scale": tensor("F32", np.array([1.25], np.float32)),
    }


def compressed_cast(stem: str, codes: np.ndarray, powers: np.ndarray, random: np.random.Generator) -> Tensors:
    """FP4 as NVFP4: powers of two under one, as the closed-form cast makes them."""
    largest = int(powers.max())
    scale = np.ldexp(np.float32(1), powers.astype(np.int32) - largest + 8).repeat(2, axis=1)
    return {
        f"{stem}.weight_packed": tensor("U8", codes),
        f"{stem}.weight_scale": tensor("F8_E4M3", scale.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)),
        f"{stem}.weight_global_scale": tensor("F32", np.ldexp(np.ones(1, np.float32), 127 + 8 - largest)),
        f"{stem}.input_global_scale": tensor("F32", np.array([1.0], np.float32)),
    }


def compressed_mxfp4(stem: str, codes: np.ndarray, powers: np.ndarray, random: np.random.Generator) -> Tensors:
    return {f"{stem}.weight_packed": tensor("U8", codes), f"{stem}.weight_scale": tensor("U8", powers)}


def int4(group: int, *, zeros: bool, dtype: str = "BF16") -> Form:
    """Return the form W4A16 with a scale for ``group`` elements, and zero points or none."""

    def make(stem: str, codes: np.ndarray, powers: np.ndarray, random: np.random.Generator) -> Tensors:
        rows, columns = len(codes), codes.shape[1] * 2
        values = E2M1[np.stack([codes & 15, codes >> 4], axis=-1).reshape(rows, columns)]
        values *= np.repeat(powers.view(ml_dtypes.float8_e8m0fnu).astype(np.float32), 32, axis=1)
        groups = values.reshape(rows, -1, group)
        step = np.abs(groups).max(-1) / 7.5 + np.float32(1e-12)
        kind = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}[dtype]
        step = step.astype(kind)
        zero = random.integers(4, 12, step.shape) if zeros else np.full(step.shape, 8)
        nibbles = np.clip(np.rint(groups / step.astype(np.float32)[..., None]) + zero[..., None], 0, 15)
        made = {
            f"{stem}.weight_packed": tensor("I32", words(nibbles.reshape(rows, columns).astype(np.uint32))),
            f"{stem}.weight_scale": tensor(dtype, step),
            f"{stem}.weight_shape": tensor("I64", np.array([rows, columns], np.int64)),
        }
        if zeros:
            padded = np.zeros((-(-rows // 8) * 8, zero.shape[1]), np.uint32)
            padded[:rows] = zero
            made[f"{stem}.weight_zero_point"] = tensor("I32", np.ascontiguousarray(words(padded.T).T))
        return made

    return make


def words(nibbles: np.ndarray) -> np.ndarray:
    """Return nibbles [R, C], C a multiple of 8, as int32 [R, C/8], the first in the lowest bits."""
    shifted = nibbles.reshape(len(nibbles), -1, 8) << np.arange(0, 32, 4, dtype=np.uint32)
    return np.bitwise_or.reduce(shifted, axis=-1).astype("<u4").view("<i4")


PACK_QUANTIZED: dict[str, object] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
NVFP4_PACKED: dict[str, object] = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
MODELOPT: dict[str, object] = {"quant_method": "fp8", "moe_quant_algo": "NVFP4", "scale_fmt": "ue8m0"}
