"""NVIDIA's ModelOpt (``nvidia-modelopt``) on small matrices: what its own functions make and read.

The tests compare with what is on record in ``fixtures/nvfp4/modelopt.npz``, since the package is large. Where it is
installed, ``python -m tests.oracles.modelopt_nvfp4`` writes the record anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

RECORD = Path(__file__).resolve().parents[2] / "fixtures" / "nvfp4" / "modelopt.npz"
VERSION = "0.47.0"

ROWS, COLUMNS = 16, 256
GROUP = 32
# Smallest and largest scale byte of a cast matrix: all exact, at the edge of it, and beyond.
SPANS = {"exact": (112, 124), "edge": (103, 120), "beyond": (90, 121), "far": (1, 127)}


def record() -> dict[str, Any]:
    """Return inputs and results of ModelOpt's closed-form cast, quantiser and decoder."""
    import torch
    from modelopt.torch.export.shard_cast_utils import mxfp4_kmax, quantize_mxfp4_to_nvfp4_lossless
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    rng = np.random.default_rng(7)
    made: dict[str, Any] = {}
    for name, (first, last) in SPANS.items():
        packed = rng.integers(0, 256, (ROWS, COLUMNS // 2), dtype=np.uint8)
        scale = rng.integers(first, last + 1, (ROWS, COLUMNS // GROUP), dtype=np.uint8)
        scale[0, 0], scale[0, 1] = first, last
        tensors = torch.from_numpy(packed), torch.from_numpy(scale)
        k_max = mxfp4_kmax(tensors[1])
        codes, scales, second, _, exact = quantize_mxfp4_to_nvfp4_lossless(*tensors, k_max, "cpu")
        made |= {
            f"cast/{name}/packed": packed,
            f"cast/{name}/scale": scale,
            f"cast/{name}/codes": codes.numpy(),
            f"cast/{name}/weight_scale": scales.view(torch.uint8).numpy(),
            f"cast/{name}/second": second.numpy(),
            f"cast/{name}/exact_blocks": np.int64(exact),
        }
    values = torch.from_numpy((rng.standard_normal((ROWS, COLUMNS)) * 0.02).astype(np.float32))
    quantised, scales, second = NVFP4QTensor.quantize(values, 16)
    made |= {
        "quantised/codes": quantised._quantized_data.numpy(),
        "quantised/weight_scale": scales.view(torch.uint8).numpy(),
        "quantised/second": second.numpy(),
    }
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        tensor = NVFP4QTensor(values.shape, dtype, quantised._quantized_data)
        read = tensor.dequantize(dtype=dtype, scale=scales, double_scale=second, block_sizes={-1: 16})
        made[f"quantised/{name}"] = read.float().numpy()
    return made


if __name__ == "__main__":
    RECORD.parent.mkdir(exist_ok=True)
    np.savez_compressed(RECORD, **record())
