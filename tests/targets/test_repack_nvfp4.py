"""``repack --experts nvfp4``: codes kept, scales as powers of two over a shared second one, configs as ModelOpt's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dsv4convert.errors import ConfigError, InventoryError, LossyError, UsageError
from dsv4convert.targets.repack import plan_repack
from dsv4convert.verification import verify

from ..checkpoints import MakeCheckpoint
from ..command_line import run_cli
from ..oracles.plain_folders import FP4_VALUES, Raw, exact_values, read_folder
from .folders import Editable, repack

EXPERTS = ".ffn.experts."
PAIRED = "layers.2.ffn.experts.5.w1"
PARTNER = "layers.2.ffn.experts.5.w3"
ALONE = "layers.2.ffn.experts.5.w2"
E8M0_NAN = 255


def nvfp4_values(after: dict[str, Raw], stem: str) -> np.ndarray[Any, Any]:
    """Return the exact values of an NVFP4 weight."""
    codes = after[f"{stem}.weight"].values.view(np.uint8)
    assert after[f"{stem}.weight"].dtype == "U8"
    scale, second = after[f"{stem}.weight_scale"], after[f"{stem}.weight_scale_2"]
    assert (scale.dtype, second.dtype, second.values.shape) == ("F8_E4M3", "F32", ())
    values = np.stack([FP4_VALUES[codes & 0xF], FP4_VALUES[codes >> 4]], axis=-1).reshape(len(codes), -1)
    spread = np.repeat(scale.values.view(ml_dtypes.float8_e4m3fn).astype(np.float64), 16, axis=1)
    return values * spread * float(second.values.view(np.float32))


def scalar(raw: Raw) -> float:
    return float(raw.values.view(np.float32))


def stems(tensors: dict[str, Raw], *, draft: bool = True) -> list[str]:
    return [
        name.removesuffix(".weight")
        for name in tensors
        if EXPERTS in name and name.endswith(".weight") and (draft or not name.startswith("mtp."))
    ]


def fused(stem: str) -> list[str]:
    partner = {".w1": ".w3", ".w3": ".w1"}.get(stem[-3:])
    return [stem] if partner is None else [stem, stem[:-3] + partner]


@pytest.mark.parametrize("draft_experts", [False, True])
@pytest.mark.parametrize("variant", [None, "dspark"])
def test_every_value_survives_and_all_else_is_untouched(
    variant: str | None, draft_experts: bool, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint("tiny", variant=variant)
    before = read_folder(source)
    out = tmp_path / "out"
    summary = repack(source, out, experts="nvfp4", draft_experts=draft_experts, require_lossless=True)
    after = read_folder(out)
    cast = stems(before, draft=draft_experts)
    assert 0 < len(cast) < len(stems(before)) or draft_experts
    for stem in cast:
        original = before.pop(f"{stem}.weight"), before.pop(f"{stem}.scale")
        assert np.array_equal(nvfp4_values(after, stem), exact_values(*original)), stem
        assert np.array_equal(after[f"{stem}.weight"].values.view(np.uint8), original[0].values.view(np.uint8))
        assert scalar(after[f"{stem}.input_scale"]) == 1.0
        seconds = {scalar(after[f"{held}.weight_scale_2"]) for held in fused(stem)}
        assert len(seconds) == 1
        assert math.frexp(seconds.pop())[0] == 0.5
    made = {f"{stem}{suffix}" for stem in cast for suffix in (".weight", ".weight_scale", ".weight_scale_2")}
    made |= {f"{stem}.input_scale" for stem in cast}
    assert after.keys() == before.keys() | made
    for name, raw in before.items():
        assert after[name].dtype == raw.dtype
        assert np.array_equal(after[name].values, raw.values), name
    assert (summary.expert_elements, summary.changed_elements) == (len(cast) * 96 * 160, 0)
    assert summary.notes[-1] == f"0 of {len(cast) * 96 * 160:,} elements of the experts changed (lossless)"
    assert verify(source, out).problems == []


def far_scales(source: Editable) -> None:
    """Scales of a fused pair that differ by more than e4m3's powers of two, in one, in the other and across both."""

    def low(scales: np.ndarray[Any, Any]) -> None:
        scales[:] = 100
        scales[0] = 102
        scales[1, 0], scales[2, 1], scales[3, 0] = 103, 101, E8M0_NAN

    def high(scales: np.ndarray[Any, Any]) -> None:
        scales[:] = 110
        scales[5, 0] = 120

    source.edit(f"{PAIRED}.scale", low)
    source.edit(f"{PARTNER}.scale", high)
    source.edit(f"{ALONE}.scale", lambda scales: scales.__setitem__(slice(None), [0, 254, 3]))
    source.edit("layers.0.ffn.experts.0.w2.scale", lambda scales: scales.__setitem__(slice(None), E8M0_NAN))
    # A block of zeros is exact under any scale.
    source.edit("layers.1.ffn.experts.0.w2.scale", lambda scales: scales.__setitem__((4, 1), 1))
    source.edit("layers.1.ffn.experts.0.w2.weight", lambda codes: codes.__setitem__((4, slice(16, 32)), 0x80))


def slow_cast(before: dict[str, Raw], stem: str) -> tuple[np.ndarray[Any, Any], int]:
    """Return the values of a weight as NVFP4, number by number, and how many changed."""
    scales = [before[f"{held}.scale"].values.view(np.uint8).astype(int) for held in fused(stem)]
    real = np.concatenate([scale[scale != E8M0_NAN] for scale in scales])
    largest = int(real.max()) if real.size else 127
    power = np.where(scales[0] == E8M0_NAN, np.nan, 2.0 ** np.maximum(scales[0] - largest + 8, -9))
    power = np.repeat(power * 2.0 ** (largest - 127 - 8), 32, axis=1)
    exact = exact_values(before[f"{stem}.weight"], before[f"{stem}.scale"])
    with np.errstate(invalid="ignore"):
        made = (exact / power).astype(np.float32).astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * power
    return made, int(((made != exact) & ~np.isnan(exact)).sum())


def test_scales_too_far_apart_round_codes_and_are_counted(editable: Callable[..., Editable], tmp_path: Path) -> None:
    source = editable()
    far_scales(source)
    before = read_folder(source.folder)
    summary = repack(source.folder, tmp_path / "out", experts="nvfp4")
    after = read_folder(tmp_path / "out")
    changed: dict[str, int] = {}
    for stem in stems(before, draft=False):
        values, count = slow_cast(before, stem)
        np.testing.assert_array_equal(nvfp4_values(after, stem), values, err_msg=stem)
        if count:
            changed[f"{stem}.weight"] = count
    assert set(changed) == {f"{PAIRED}.weight", f"{ALONE}.weight"}
    assert {entry["tensor"]: entry["changed"] for entry in summary.counted if entry["changed"]} == changed
    nan = {entry["tensor"]: entry["nan"] for entry in summary.counted if entry["nan"]}
    assert nan == {f"{PAIRED}.weight": 32, "layers.0.ffn.experts.0.w2.weight": 160 * 96}
    assert summary.changed_elements == sum(changed.values())
    report = verify(source.folder, tmp_path / "out")
    assert report.problems == []
    assert report.verdicts()["rounded"] == len(changed)
    with pytest.raises(LossyError, match=r"not exact \(and 1 more tensor\).* changed; without --strict"):
        repack(source.folder, tmp_path / "exact", experts="nvfp4", require_lossless=True)


@pytest.mark.parametrize("draft_experts", [False, True])
def test_configs_say_what_modelopt_says(draft_experts: bool, tiny: Path, tmp_path: Path) -> None:
    repack(tiny, tmp_path / "out", experts="nvfp4", draft_experts=draft_experts)
    before = json.loads((tiny / "config.json").read_text())
    config = json.loads((tmp_path / "out/config.json").read_text())
    separate = json.loads((tmp_path / "out/hf_quant_config.json").read_text())
    layer = {"quant_algo": "NVFP4", "group_size": 16}
    modules = [f"layers.{n}.ffn.experts" for n in range(4)] + ["mtp.0.ffn.experts"] * draft_experts
    excluded = ["*.attn.*", "*.ffn.shared_experts.*", "head"] + ["mtp.*"] * (not draft_experts)
    assert separate == {
        "producer": {"name": "modelopt", "version": "dsv4-nvfp4-experts"},
        "quantization": {
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "quantized_layers": dict.fromkeys(modules, layer),
            "exclude_modules": excluded,
        },
    }
    said = config.pop("quantization_config")
    own = before.pop("quantization_config")
    assert config == before
    assert {key: said[key] for key in own} == own
    assert said["quant_method"] == "fp8"
    assert said["moe_quant_algo"] == "NVFP4"
    assert said["ignore"] == excluded
    assert said["config_groups"]["group_0"]["weights"]["num_bits"] == 4
    assert {key: said[key] for key in separate["quantization"]} == separate["quantization"]


@pytest.mark.parametrize(
    ("text", "w1", "w2"), [("0.25", 0.25, 0.25), ("8.4375,150.0", 8.4375, 150.0)], ids=["one", "two"]
)
def test_input_scales_are_numbers(text: str, w1: float, w2: float, tiny: Path, tmp_path: Path) -> None:
    repack(tiny, tmp_path / "out", experts="nvfp4", input_scale=text)
    after = read_folder(tmp_path / "out")
    for stem in stems(after, draft=False):
        assert scalar(after[f"{stem}.input_scale"]) == (w2 if stem.endswith(".w2") else w1)


def test_input_scales_come_from_a_file_and_from_a_folder(tiny: Path, tmp_path: Path) -> None:
    by_name = {"w1": 2.0, "w3": 2.0, "w2": 0.1}
    by_name |= {f"{stem}.input_scale": 3.5 for stem in (PAIRED, PARTNER)}
    (tmp_path / "scales.json").write_text(json.dumps(by_name))
    repack(tiny, tmp_path / "first", experts="nvfp4", input_scale=str(tmp_path / "scales.json"))
    repack(tiny, tmp_path / "second", experts="nvfp4", input_scale=str(tmp_path / "first"))
    first, second = read_folder(tmp_path / "first"), read_folder(tmp_path / "second")
    assert scalar(first[f"{PAIRED}.input_scale"]) == scalar(first[f"{PARTNER}.input_scale"]) == 3.5
    assert scalar(first[f"{ALONE}.input_scale"]) == float(np.float32(0.1))
    assert all(np.array_equal(first[name].values, second[name].values) for name in first)


def test_resume_takes_no_output_for_finished_that_has_other_input_scales(tiny: Path, tmp_path: Path) -> None:
    scales, out = tmp_path / "scales.json", tmp_path / "out"
    command = ("repack", tiny, out, "--experts", "nvfp4", "--input-scale", scales)
    scales.write_text(json.dumps({"w1": 1.5, "w2": 2.5, "w3": 1.5}))
    assert run_cli(*command).code == 0
    assert "finished by an earlier run" in run_cli(*command, "--resume").out
    scales.write_text(json.dumps({"w1": 3.5, "w2": 2.5, "w3": 3.5}))
    again = run_cli(*command, "--resume")
    assert again.code == 9
    assert again.error.endswith("already exists and is not empty; pass --overwrite to replace the output")
    assert run_cli(*command, "--overwrite").code == 0
    assert scalar(read_folder(out)[f"{PAIRED}.input_scale"]) == 3.5


@pytest.mark.parametrize(
    ("content", "error", "what"),
    [
        ({"w1": 1.0, "w2": 1.0, "w3": 2.0}, InventoryError, r"w1.input_scale: not that of .*w3.input_scale"),
        ({"w1": 1.0, "w3": 1.0}, InventoryError, r"w2.input_scale is missing"),
        ({"w1": 1.0, "w2": 0, "w3": 1.0}, ConfigError, r"key w2: not a scale: expected a positive float32, got 0"),
        ({"w1": 1.0, "w2": 1e40, "w3": 1.0}, ConfigError, r"key w2: not a scale"),
        ({"w1": 1.0, "w2": True, "w3": 1.0}, ConfigError, r"key w2: not a scale"),
        ({"w1": 1.0, "w2": 1.0, "w3": 1.0, "layers.9.w1": 1.0}, InventoryError, "key layers.9.w1: no such input scale"),
        ({"w1": 10**500, "w2": 1.0, "w3": 1.0}, ConfigError, r"key w1: not a scale"),
    ],
    ids=["uneven", "missing", "zero", "too large", "bool", "unknown", "too large an integer"],
)
def test_files_of_input_scales_that_do_not_fit_are_refused(
    content: dict[str, Any], error: type[Exception], what: str, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "scales.json").write_text(json.dumps(content))
    with pytest.raises(error, match=what):
        plan_repack(tiny, tmp_path / "out", experts="nvfp4", input_scale=str(tmp_path / "scales.json"))


@pytest.mark.parametrize("text", ["-1", "0", "nan", "inf", "1e-60", "1,2,3", "no-such-file.json", "1,x"])
def test_input_scales_that_are_none_are_refused(text: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--input-scale: "):
        plan_repack(tiny, tmp_path / "out", experts="nvfp4", input_scale=text)


def test_input_scales_are_not_replaced_by_the_output(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    repack(tiny, out, experts="nvfp4", input_scale="8.4375,150.0")
    (out / "scales.json").write_text(json.dumps({"w1": 1.0, "w2": 1.0, "w3": 1.0}))
    for given in (out, out / "scales.json"):
        result = run_cli("repack", tiny, out, "--experts", "nvfp4", "--input-scale", given, "--overwrite")
        assert result.code == 2
        assert f"got {given}" in result.error
    assert (out / "scales.json").exists()


def test_a_folder_without_input_scales_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InventoryError, match=r"no tensor \*.input_scale"):
        plan_repack(tiny, tmp_path / "out", experts="nvfp4", input_scale=str(tiny))


@pytest.mark.parametrize("options", [["--draft-experts"], ["--input-scale", "1"]], ids=lambda words: words[0])
def test_options_of_nvfp4_are_refused_with_fp8(options: list[str], tiny: Path, tmp_path: Path) -> None:
    result = run_cli("repack", tiny, tmp_path / "out", "--experts", "fp8", *options)
    assert result.code == 2
    assert f"{options[0]}: of NVFP4 only: expected --experts nvfp4, got --experts fp8" in result.err


def test_a_draft_is_split_off_with_its_own_kind_of_experts(tiny: Path, tmp_path: Path) -> None:
    for options, kind in ([], "I8"), (["--draft-experts"], "U8"):
        out = tmp_path / kind
        command = ("repack", tiny, out, "--experts", "nvfp4", "--draft", "split", "--quiet", *options)
        assert run_cli(*command).code == 0
        draft = read_folder(tmp_path / f"{kind}-draft")
        assert {draft[f"{stem}.weight"].dtype for stem in stems(draft)} == {kind}
        assert all(name.startswith("mtp.") for name in draft)
        assert verify(tiny, out).problems == []
        assert verify(tiny, tmp_path / f"{kind}-draft").problems == []
