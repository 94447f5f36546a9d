"""``requantize``: floats in the official layout, against the published rule in float64 and ml_dtypes' rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import dsv4convert
from dsv4convert.errors import LossyError, UnsupportedError
from dsv4convert.model.tensors import Store

from ..checkpoints import MakeCheckpoint
from ..oracles.plain_folders import FP4_VALUES, Array, Raw, exact_values, read_folder

LEAST = {448: np.float64(np.float32(1e-4)), 6: 6 * 2.0**-126}


def published(values: Array, block: tuple[int, int], largest: int) -> tuple[Array, Array]:
    """Return codes and e8m0 scales: the smallest power of two with max(amax, least) / scale <= largest."""
    rows, columns = values.shape
    dtype: Any = ml_dtypes.float8_e4m3fn if largest == 448 else ml_dtypes.float4_e2m1fn
    down, across = -(-rows // block[0]), -(-columns // block[1])
    padded = np.pad(np.abs(values), [(0, down * block[0] - rows), (0, across * block[1] - columns)])
    amax = padded.reshape(down, block[0], across, block[1]).max(axis=(1, 3))
    amax = np.maximum(amax, LEAST[largest])
    power = np.round(np.log2(amax / largest)) - 1
    for _ in range(3):
        power += amax / 2.0**power > largest
    assert ((amax / 2.0**power <= largest) & (amax / 2.0 ** (power - 1) > largest)).all()
    codes = (values / spread(2.0**power, block, values.shape)).astype(dtype).view(np.uint8)
    return codes, (power + 127).astype(np.uint8)


def spread(factors: Array, block: tuple[int, int], shape: tuple[int, ...]) -> Array:
    """Repeat the factor of each block over its elements."""
    return np.repeat(np.repeat(factors, block[0], axis=0), block[1], axis=1)[: shape[0], : shape[1]]


def noisy(folder: Path, out: Path, dtype: str) -> Path:
    """Write a folder without scales whose weights are moved a little, as fine-tuning does."""
    dsv4convert.dequantize(folder, out, dtype=dtype)
    rng = np.random.default_rng(0)
    for weight in dsv4convert.open_checkpoint(out).weights.values():
        if weight.row.store in (Store.DENSE, Store.EXPERT, Store.ENGRAM):
            kind = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}[dtype]
            stored = np.memmap(weight.stored.file, kind, "r+", weight.stored.offset, weight.shape)
            stored[...] = (stored.astype(np.float64) * rng.uniform(0.9, 1.1, stored.shape)).astype(kind)
            stored.flush()
    return out


def check(before: dict[str, Raw], after: dict[str, Raw], folder: Path, side: int) -> int:
    """Compare every tensor with the rule; return how many elements were rounded."""
    rounded = 0
    for weight in dsv4convert.open_checkpoint(folder).weights.values():
        made = after[weight.name]
        if weight.row.store is Store.TABLE:
            assert np.array_equal(made.values, before[weight.name].values)
            continue
        values = exact_values(before[weight.name], None)
        if weight.row.store in (Store.BF16, Store.F32):
            assert made.dtype == {Store.BF16: "BF16", Store.F32: "F32"}[weight.row.store]
            kept = values.astype(ml_dtypes.bfloat16) if weight.row.store is Store.BF16 else values
            assert np.array_equal(exact_values(made, None), kept.astype(np.float64)), weight.name
            continue
        scale = after[weight.name.removesuffix(".weight") + ".scale"]
        assert scale.dtype == "F8_E8M0"
        if weight.row.store is Store.EXPERT:
            codes, scales = published(values, (1, 32), 6)
            packed = codes[:, ::2] | codes[:, 1::2] << 4
            assert made.dtype == "I8"
            assert np.array_equal(made.values.view(np.uint8), packed), weight.name
        else:
            block = (1, 32) if weight.row.store is Store.ENGRAM else (side, side)
            codes, scales = published(values, block, 448)
            assert made.dtype == "F8_E4M3"
            assert np.array_equal(made.values.view(np.uint8), codes), weight.name
        assert np.array_equal(scale.values.view(np.uint8), scales), weight.name
        kind: Any = ml_dtypes.float4_e2m1fn if weight.row.store is Store.EXPERT else ml_dtypes.float8_e4m3fn
        of_block = (1, 32) if weight.row.store in (Store.EXPERT, Store.ENGRAM) else (side, side)
        factor = spread(2.0 ** (scales.astype(float) - 127), of_block, values.shape)
        rounded += int((codes.view(kind).astype(np.float64) * factor != values).sum())
    return rounded


def check_errors(inexact: list[dict[str, Any]], before: dict[str, Raw], after: dict[str, Raw], side: int) -> None:
    """Hold the errors that ``verify`` tells of each tensor against those of its values."""
    measured = [entry for entry in inexact if entry["output"] in ("fp8", "fp4")]
    assert {entry["output"] for entry in measured} == {"fp8", "fp4"}
    for entry in inexact:
        if entry not in measured:
            assert entry["rmse"] is entry["relative_rmse"] is None
            continue
        name = entry["name"]
        values = exact_values(before[name], None)
        scales = after[name.removesuffix(".weight") + ".scale"].values.view(np.uint8)
        if entry["output"] == "fp4":
            codes = after[name].values.view(np.uint8)
            made = np.stack([FP4_VALUES[codes & 15], FP4_VALUES[codes >> 4]], axis=-1).reshape(values.shape)
            block = (1, 32)
        else:
            made = after[name].values.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
            block = (1, 32) if name.endswith("engram.embed.weight") else (side, side)
        made = made * spread(2.0 ** (scales.astype(float) - 127), block, values.shape)
        error = np.abs(made - values)
        assert entry["largest_error"] == error.max(), name
        assert entry["rmse"] == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-12)
        assert entry["relative_rmse"] == pytest.approx(np.sqrt(np.mean(error**2) / np.mean(values**2)), rel=1e-12)
        assert 0 < entry["relative_rmse"] < (0.2 if entry["output"] == "fp4" else 0.05)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize(("preset", "side"), [("tiny", 128), ("v41-tiny", 32)])
def test_floats_become_what_the_published_rule_says(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, preset: str, side: int, dtype: str
) -> None:
    source = noisy(make_checkpoint(preset), tmp_path / "floats", dtype)
    out = tmp_path / "out"
    summary = dsv4convert.requantize(source, out, threads=2)
    rounded = check(read_folder(source), read_folder(out), source, side)
    assert rounded > 0
    counted = sum(entry["changed"] + entry["underflow"] for entry in summary.counted)
    weights = dsv4convert.open_checkpoint(source).weights
    of_plain = sum(
        entry["changed"] + entry["underflow"]
        for entry in summary.counted
        if weights[entry["tensor"]].row.store in (Store.BF16, Store.F32)
    )
    assert counted - of_plain == rounded
    report = dsv4convert.verify(source, out)
    assert not report.problems, report.problems
    check_errors(report.as_json()["inexact"], read_folder(source), read_folder(out), side)
    with pytest.raises(LossyError, match="--strict"):
        dsv4convert.requantize(source, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize("names", ["official", "transformers"])
def test_an_exact_origin_comes_back(make_checkpoint: MakeCheckpoint, tmp_path: Path, names: str) -> None:
    """Values always do; codes and scales wherever the published rule leaves one choice."""
    origin = make_checkpoint("tiny")
    dsv4convert.dequantize(origin, tmp_path / "floats", names=names)
    summary = dsv4convert.requantize(tmp_path / "floats", tmp_path / "out", strict=True)
    assert not summary.counted
    before, after = read_folder(origin), read_folder(tmp_path / "out")
    assert before.keys() == after.keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    published_config = json.loads((origin / "config.json").read_text())
    assert config["quantization_config"] == published_config["quantization_config"]
    assert config["expert_dtype"] == "fp4"
    for name, raw in before.items():
        scale = name.removesuffix(".weight") + ".scale"
        if name.endswith(".weight") and scale in before:
            values = exact_values(raw, before[scale])
            assert np.array_equal(exact_values(after[name], after[scale]), values), name
            block = (1, 32) if raw.dtype == "I8" else (128, 128)
            _, scales = published(values, block, 6 if raw.dtype == "I8" else 448)
            assert np.array_equal(after[scale].values.view(np.uint8), scales)
            same = before[scale].values.view(np.uint8) == scales
            codes = np.repeat(np.repeat(same, block[0], axis=0), block[1] // (2 if raw.dtype == "I8" else 1), axis=1)
            codes = codes[: raw.values.shape[0], : raw.values.shape[1]]
            assert np.array_equal(after[name].values[codes], raw.values[codes]), name
        elif not name.endswith(".scale"):
            assert after[name].dtype == raw.dtype
            assert np.array_equal(after[name].values, raw.values), name
    assert not dsv4convert.verify(tmp_path / "floats", tmp_path / "out").problems


def test_what_is_requantised_twice_stays(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The second time some blocks take the other of two exact encodings, the third time nothing changes."""
    source = noisy(make_checkpoint("tiny"), tmp_path / "floats", "bf16")
    for number in range(3):
        dsv4convert.requantize(source, tmp_path / f"{number}")
        source = tmp_path / f"{number} floats"
        dsv4convert.dequantize(tmp_path / f"{number}", source)
    second, third = (read_folder(tmp_path / number) for number in "12")
    assert all(np.array_equal(second[name].values, third[name].values) for name in second)


def test_nothing_to_quantise_is_an_error(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="nothing to quantise"):
        dsv4convert.requantize(make_checkpoint("tiny"), tmp_path / "out")


def test_a_value_that_is_not_finite_is_an_error_and_leaves_nothing(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = noisy(make_checkpoint("tiny"), tmp_path / "floats", "bf16")
    weight = dsv4convert.open_checkpoint(source).weights["layers.2.ffn.experts.5.w2.weight"]
    stored = np.memmap(weight.stored.file, ml_dtypes.bfloat16, "r+", weight.stored.offset, weight.shape)
    stored[3, 4] = np.inf
    stored.flush()
    with pytest.raises(LossyError, match="a NaN or infinite value cannot be quantised"):
        dsv4convert.requantize(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["floats", "floats.manifest.json"]


def test_matrices_smaller_than_a_scale_block_are_verified(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    sizes = {"hidden_size": 96, "moe_intermediate_size": 32, "q_lora_rank": 33}
    source = make_checkpoint(layers=1, experts=4, overrides=sizes)
    dsv4convert.dequantize(source, tmp_path / "floats")
    dsv4convert.requantize(tmp_path / "floats", tmp_path / "requantized")
    dsv4convert.repack(source, tmp_path / "repacked", experts="fp8")
    for before, after in ((tmp_path / "floats", "requantized"), (source, "repacked")):
        report = dsv4convert.verify(before, tmp_path / after)
        assert report.ok, report.problems
