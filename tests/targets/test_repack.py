"""``repack``: FP4 experts as FP8, lossless where the scales allow it and counted where they do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dsv4convert.checkpoint import Encoding, open_folder
from dsv4convert.errors import LossyError, UnsupportedError, UsageError
from dsv4convert.targets.repack import plan_repack

from ..checkpoints import MakeCheckpoint
from ..oracles.plain_folders import FP4_VALUES, Raw, exact_values, read_folder
from .folders import Editable, dequantize, repack

E8M0_NAN = 255
TILE = 128
GROUP = 32
EXPERTS = ".ffn.experts."
# A matrix of 160 x 96 in the tiny model: two rows of tiles, the second ragged, one column.
WIDE = "layers.2.ffn.experts.5.w2"
TALL = "layers.2.ffn.experts.5.w1"


def slow_fp8(packed: Raw, scale: Raw) -> tuple[Raw, Raw, int]:
    """Return codes and scales of packed FP4 as FP8, tile by tile, and how many numbers changed."""
    bytes_ = packed.values.view(np.uint8)
    values = np.stack([FP4_VALUES[bytes_ & 0xF], FP4_VALUES[bytes_ >> 4]], axis=-1).reshape(bytes_.shape[0], -1)
    groups = scale.values.view(np.uint8).astype(int)
    rows, columns = values.shape
    codes = np.zeros((rows, columns), np.uint8)
    tiles = np.zeros((-(-rows // TILE), -(-columns // TILE)), np.uint8)
    changed = 0
    for i in range(tiles.shape[0]):
        for j in range(tiles.shape[1]):
            height = slice(i * TILE, (i + 1) * TILE)
            mine = groups[height, j * TILE // GROUP : (j + 1) * TILE // GROUP]
            real = mine[mine != E8M0_NAN]
            tiles[i, j] = max(real.max() - 6, 0) if real.size else E8M0_NAN
            width = slice(j * TILE, (j + 1) * TILE)
            relative = np.where(mine == E8M0_NAN, np.nan, 2.0 ** (mine - float(tiles[i, j])))
            exact = values[height, width] * np.repeat(relative, GROUP, axis=1)
            made = exact.astype(ml_dtypes.float8_e4m3fn)
            codes[height, width] = made.view(np.uint8)
            changed += int(((made.astype(np.float64) != exact) & ~np.isnan(exact)).sum())
    return Raw("F8_E4M3", codes), Raw("F8_E8M0", tiles), changed


def assert_repacked(before: dict[str, Raw], after: dict[str, Raw]) -> int:
    """Check every tensor of a repacked folder; return how many elements should have changed."""
    assert after.keys() == before.keys()
    total = 0
    for name, raw in before.items():
        if EXPERTS not in name:
            assert after[name].dtype == raw.dtype
            np.testing.assert_array_equal(after[name].values, raw.values)
        elif name.endswith(".weight"):
            scale = name.removesuffix(".weight") + ".scale"
            codes, tiles, changed = slow_fp8(raw, before[scale])
            assert (after[name].dtype, after[scale].dtype) == ("F8_E4M3", "F8_E8M0")
            np.testing.assert_array_equal(after[scale].values.view(np.uint8), tiles.values, err_msg=scale)
            made = after[name].values.view(np.uint8)
            nan = (codes.values & 0x7F) == 0x7F
            np.testing.assert_array_equal(made[~nan], codes.values[~nan], err_msg=name)
            assert ((made[nan] & 0x7F) == 0x7F).all()
            total += changed
    return total


@pytest.mark.parametrize("variant", [None, "dspark"])
def test_published_scales_repack_without_loss(
    variant: str | None, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint("tiny", variant=variant)
    before = read_folder(source)
    summary = repack(source, tmp_path / "out", require_lossless=True)
    after = read_folder(tmp_path / "out")
    assert assert_repacked(before, after) == 0

    experts = [name for name in before if EXPERTS in name and name.endswith(".weight")]
    for name in experts:
        scale = name.removesuffix(".weight") + ".scale"
        np.testing.assert_array_equal(
            exact_values(after[name], after[scale]), exact_values(before[name], before[scale]), err_msg=name
        )
    assert summary.changed_elements == 0
    assert summary.expert_elements == len(experts) * 96 * 160
    assert summary.notes[-1] == f"0 of {len(experts) * 96 * 160:,} elements of the experts changed (lossless)"
    assert summary.counted == ()


def test_the_result_is_a_checkpoint_with_fp8_experts(tiny: Path, tmp_path: Path) -> None:
    repack(tiny, tmp_path / "out")
    made = open_folder(tmp_path / "out")
    experts = [weight for weight in made.weights.values() if weight.expert is not None]
    assert experts
    assert {weight.encoding for weight in experts} == {Encoding.FP8}
    assert {weight.block for weight in experts} == {(128, 128)}


def spread_scales(source: Editable) -> None:
    """Spread the scales inside tiles: to just 2^14, beyond it, and to the ends of e8m0."""

    def within(scales: np.ndarray[Any, Any]) -> None:
        scales[:] = 120
        scales[3, 1] = 120 - 14

    def beyond(scales: np.ndarray[Any, Any]) -> None:
        scales[:] = 120
        scales[5, 0] = 120 - 15
        scales[130, 2] = 120 - 16
        scales[131, 2] = 120 - 40

    source.edit(f"{TALL}.scale", within)
    source.edit(f"{WIDE}.scale", beyond)
    source.edit("layers.0.ffn.experts.0.w2.scale", lambda scales: scales.__setitem__(slice(None), [0, 254, 255]))
    source.edit("layers.0.ffn.experts.1.w2.scale", lambda scales: scales.__setitem__(slice(128, None), 255))
    source.edit("layers.0.ffn.experts.2.w2.scale", lambda scales: scales.__setitem__(slice(None), [0, 3, 7]))


def test_small_values_of_spread_scales_round_and_are_counted(editable: Callable[..., Editable], tmp_path: Path) -> None:
    source = editable()
    spread_scales(source)
    before = read_folder(source.folder)
    summary = repack(source.folder, tmp_path / "out")
    changed = assert_repacked(before, read_folder(tmp_path / "out"))
    assert changed
    assert summary.changed_elements == changed
    by_tensor = {entry["tensor"]: entry["changed"] for entry in summary.counted if entry["changed"]}
    assert by_tensor == {
        f"{name}.weight": slow_fp8(before[f"{name}.weight"], before[f"{name}.scale"])[2]
        for name in (WIDE, "layers.0.ffn.experts.0.w2")
    }
    nan = {entry["tensor"]: entry["nan"] for entry in summary.counted if entry["nan"]}
    assert nan == {"layers.0.ffn.experts.0.w2.weight": 160 * 32, "layers.0.ffn.experts.1.w2.weight": 32 * 96}
    assert f"{changed:,} of 1,843,200 elements of the experts changed" in summary.notes[-1]


def test_require_lossless_keeps_the_output_from_its_name(editable: Callable[..., Editable], tmp_path: Path) -> None:
    source = editable()
    spread_scales(source)
    with pytest.raises(LossyError, match=r"not exact \(and 1 more tensor\).* changed; without --strict"):
        repack(source.folder, tmp_path / "out", require_lossless=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_require_lossless_accepts_a_spread_of_2_to_the_14(editable: Callable[..., Editable], tmp_path: Path) -> None:
    source = editable()

    def spread(scales: np.ndarray[Any, Any]) -> None:
        scales[:] = 120
        scales[3, 1] = 120 - 14

    source.edit(f"{WIDE}.scale", spread)
    source.edit(f"{WIDE}.weight", lambda codes: codes.__setitem__(3, np.arange(48) * 5 + 17))
    assert repack(source.folder, tmp_path / "out", require_lossless=True).changed_elements == 0


@pytest.mark.parametrize("nested", [False, True], ids=["top", "nested"])
def test_config_says_fp8_experts(nested: bool, editable: Callable[..., Editable], tmp_path: Path) -> None:
    source = editable()
    before = json.loads((source.folder / "config.json").read_text())
    if nested:
        before["quantization_config"]["expert_dtype"] = "fp4"
        source.edit_config(quantization_config=before["quantization_config"])
    repack(source.folder, tmp_path / "out")
    after = json.loads((tmp_path / "out/config.json").read_text())
    before["expert_dtype"] = "fp8"
    if nested:
        before["quantization_config"]["expert_dtype"] = "fp8"
    assert after == before


def test_files_are_numbered_and_indexed(tiny: Path, tmp_path: Path) -> None:
    repack(tiny, tmp_path / "out", max_file_bytes=1_000_000)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert read_folder(tmp_path / "out").keys() == read_folder(tiny).keys()


def test_fp8_experts_cannot_be_repacked(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no packed FP4 experts to repack: expected fp4, got fp8"):
        plan_repack(make_checkpoint("tiny", variant="base"), tmp_path / "out")


@pytest.mark.parametrize("experts", ["fp8", "nvfp4"])
def test_floats_are_to_be_requantised_first(experts: str, tiny: Path, tmp_path: Path) -> None:
    dequantize(tiny, tmp_path / "bf16")
    with pytest.raises(UnsupportedError, match="expected fp4, got bf16; run requantize first"):
        plan_repack(tmp_path / "bf16", tmp_path / "out", experts=experts)


def test_another_type_of_experts_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--experts: unknown: expected fp8 or nvfp4, got int8"):
        plan_repack(tiny, tmp_path / "out", experts="int8")
