"""The exponents of scales, against numpy and the gguf package."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

import dsv4convert
from dsv4convert.inspection import scales
from dsv4convert.inspection.scales import FORMATS, SAMPLED_SCALES, SAMPLED_TENSORS, Scales, count_scales

from ..command_line import run_cli

# Every scale of eight and of sixteen bits, and of 32 bits those of every exponent, with a few mantissas.
VALUES: dict[str, npt.NDArray[Any]] = {
    "F8_E8M0": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu),
    "BF16": np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16),
    "F16": np.arange(65536, dtype=np.uint16).view(np.float16),
    "F32": (np.arange(512, dtype=np.uint32)[:, None] << 23 | np.array([0, 1, 2**22, 2**23 - 1], np.uint32))
    .ravel()
    .view(np.float32),
}


def expected(values: npt.NDArray[Any], least: float) -> tuple[dict[int, int], int]:
    """Return how often numpy finds each exponent among normal numbers, and how many are none."""
    wide = np.abs(values.astype(np.float64))
    normal = np.isfinite(wide) & (wide >= least)
    exponents = np.frexp(wide[normal])[1] - 1
    return {int(e): int(n) for e, n in Counter(exponents.tolist()).items()}, int((~normal).sum())


@pytest.mark.parametrize("kind", VALUES)
def test_every_scale_has_the_exponent_that_numpy_gives_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = VALUES[kind]
    least = 0.0 if kind == "F8_E8M0" else float(ml_dtypes.finfo(values.dtype).smallest_normal)
    path = tmp_path / "scales"
    path.write_bytes(b"before" + values.tobytes() + b"behind")
    monkeypatch.setattr(scales, "SAMPLED_SCALES", len(values))
    (found,) = count_scales([Scales("attention", kind, path, 6, values.nbytes)])
    assert (found.exponents, found.other) == expected(values, least)
    assert found.sampled == len(values)


@pytest.mark.parametrize("kind", ["mxfp4", "q8_0"])
def test_blocks_of_ggml_have_their_scale_first(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    values = (rng.normal(size=(8, 256)) * np.exp2(rng.integers(-5, 9, (8, 1)))).astype(np.float32)
    quantised = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind.upper()])
    path = tmp_path / "blocks"
    path.write_bytes(quantised.tobytes())
    (found,) = count_scales([Scales("experts", kind, path, 0, quantised.nbytes)])
    blocks = quantised.reshape(-1, FORMATS[kind].stride)
    if kind == "mxfp4":
        exponents = blocks[:, 0].astype(int) - 127
    else:
        exponents = np.frexp(blocks[:, :2].copy().view(np.float16).astype(np.float64))[1].ravel() - 1
    assert found.exponents == dict(Counter(exponents.tolist()))
    assert found.sampled == len(blocks) == 64


def test_a_description_samples_tensors_all_over_a_family(tmp_path: Path) -> None:
    codes = np.zeros(SAMPLED_SCALES + 100, np.uint8)
    found = []
    for number in range(SAMPLED_TENSORS * 4):
        path = tmp_path / str(number)
        path.write_bytes((codes + 100 + number).tobytes())
        found.append(Scales("experts", "F8_E8M0", path, 0, len(codes)))
    (counted,) = count_scales(found)
    assert (counted.tensors, counted.sampled) == (SAMPLED_TENSORS * 4, SAMPLED_TENSORS * SAMPLED_SCALES)
    assert counted.exponents == {100 + n - 127: SAMPLED_SCALES for n in range(0, SAMPLED_TENSORS * 4, 4)}


def test_what_is_gone_is_not_counted(tmp_path: Path) -> None:
    (found,) = count_scales([Scales("experts", "F8_E8M0", tmp_path / "gone", 0, 10)])
    assert (found.tensors, found.sampled, found.exponents) == (1, 0, {})


def test_inspect_counts_the_scales_of_a_folder_and_of_its_gguf(tiny: Path, tmp_path: Path) -> None:
    gguf_file = tmp_path / "model.gguf"
    assert run_cli("hf-to-gguf", tiny, gguf_file, "-q").code == 0
    folder, converted = (dsv4convert.inspect(path).scales for path in (tiny, gguf_file))
    kinds = {(entry.family, entry.type) for entry in folder}
    assert ("routed experts", "F8_E8M0") in kinds
    experts = next(entry for entry in converted if entry.type == "mxfp4")
    assert experts.family == "routed experts"
    # The scales of MXFP4 are those of the source; the sample is of other tensors.
    source = next(entry for entry in folder if entry.family == "routed experts")
    assert set(experts.exponents) & set(source.exponents)


def test_scales_that_are_floats_are_counted_in_their_type(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "float.safetensors"
    save_file({"scale": np.array([0.5, 0.75, 1.0, 0.0, np.inf], np.float32)}, path)
    offset = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    (found,) = count_scales([Scales("attention", "F32", path, offset, 20)])
    assert (found.exponents, found.other) == ({-1: 2, 0: 1}, 2)
