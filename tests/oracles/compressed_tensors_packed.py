"""The compressed-tensors package on small matrices: what its own functions pack, and what they read of that.

The tests compare with what is on record in ``fixtures/compressed_tensors/packed.npz``, since the package wants torch of
its own. Where it is installed, ``python -m tests.oracles.compressed_tensors_packed`` writes the record anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

RECORD = Path(__file__).resolve().parents[2] / "fixtures" / "compressed_tensors" / "packed.npz"
VERSION = "0.20.0"

ROWS, COLUMNS = 20, 256  # rows of zero points that do not fill the last word
# Integers: group size (None: one scale a row), whether there are zero points, and the type of scales.
INT4: dict[str, tuple[int | None, bool, str]] = {
    "group 128": (128, False, "bfloat16"),
    "group 32": (32, False, "float16"),
    "zero points": (64, True, "bfloat16"),
    "zero points, f32": (32, True, "float32"),
    "channel": (None, False, "float32"),
}


def record() -> dict[str, Any]:
    """Return what the package packs, and the float32 or narrower values that it reads, all as bits."""
    import torch
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    generator = np.random.default_rng(11)
    values = torch.from_numpy((generator.standard_normal((ROWS, COLUMNS)) * 0.03).astype(np.float32))
    made: dict[str, Any] = {}

    def keep(name: str, tensors: dict[str, Any]) -> None:
        for key, tensor in tensors.items():
            bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
            made[f"{name}/{key}"] = tensor.detach().contiguous().view(bits).numpy()

    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    blocks = values.reshape(ROWS, -1, 16).abs().amax(-1)
    second = (448 * 6 / values.abs().max()).to(torch.float32).reshape(1)
    scale = (second * blocks / 6).to(torch.float8_e4m3fn)
    state = {"weight": values, "weight_scale": scale.float(), "weight_global_scale": second}
    packed = NVFP4PackedCompressor.compress(state, scheme)
    bf16 = NVFP4PackedCompressor.decompress(packed, scheme)["weight"]
    codes = unpack_fp4_from_uint8(packed["weight_packed"], ROWS, COLUMNS, torch.float32)
    f32 = dequantize(codes, scale.float(), args=args, global_scale=second, dtype=torch.float32)
    keep("nvfp4", {**packed, "bf16": bf16, "f32": f32})

    args = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    powers = torch.exp2(torch.ceil(torch.log2(values.reshape(ROWS, -1, 32).abs().amax(-1) / 6)))
    packed = MXFP4PackedCompressor.compress({"weight": values, "weight_scale": powers}, scheme)
    keep("mxfp4", {**packed, "bf16": MXFP4PackedCompressor.decompress(packed, scheme)["weight"]})

    for name, (group, with_zeros, dtype) in INT4.items():
        args = QuantizationArgs(
            num_bits=4, strategy="channel" if group is None else "group", group_size=group, symmetric=not with_zeros
        )
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        groups = values.reshape(ROWS, -1, group or COLUMNS)
        low, high = groups.amin(-1), groups.amax(-1)
        step = (high - low) / 15 if with_zeros else groups.abs().amax(-1) / 7.5
        step = step.to(getattr(torch, dtype))
        zero = torch.clamp(torch.round(-8 - low / step.float()), -8, 7).to(torch.int8)
        state = {"weight": values.to(step.dtype), "weight_scale": step}
        state |= {"weight_zero_point": zero} if with_zeros else {}
        packed = PackedQuantizationCompressor.compress(state, scheme)
        keep(name, {**packed, "read": PackedQuantizationCompressor.decompress(packed, scheme)["weight"]})
    return made


if __name__ == "__main__":
    RECORD.parent.mkdir(exist_ok=True)
    np.savez_compressed(RECORD, **record())
