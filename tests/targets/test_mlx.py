"""``mlx``: every tensor of a folder in MLX's layout against its source, decoded one rule at a time."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import dsv4convert
from dsv4convert.errors import LossyError, UnsupportedError, UsageError
from dsv4convert.model.tensors import Store
from dsv4convert.targets.mlx import plan_mlx
from dsv4convert.verification.report import Report

from ..checkpoints import MakeCheckpoint
from ..command_line import run_cli
from ..engine.plans import check_resumed
from ..oracles.plain_folders import FP4_VALUES, INDEX, Array, Raw, exact_values, read_folder
from ..oracles.safetensors_bytes import RawSafetensors

CASES = {
    "v4": ("tiny", {}),
    "v4 without draft": ("tiny", {"mtp": False}),
    "v4, FP8 experts and F32 scales": ("tiny", {"variant": "base"}),
    "v4 with a tower": ("tiny", {"variant": "vision"}),
    "v4.1": ("v41-tiny", {}),
}
EXPERTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def mlx_values(tensors: dict[str, Raw], name: str) -> Array:
    """Return the values of a module's weight as MLX defines its modes: little-endian words, a scale for 32 elements."""
    raw = tensors[name]
    if raw.dtype != "U32":
        return exact_values(raw, None)
    scales = tensors[name.removesuffix("weight") + "scales"]
    assert scales.dtype == "U8"
    columns = scales.values.shape[-1] * 32
    words = raw.values.view(np.uint32)
    bits = words.shape[-1] * 32 // columns
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (words[..., None] >> shifts) & np.uint32(2**bits - 1)
    codes = codes.astype(np.uint8).reshape(*words.shape[:-1], columns)
    values = FP4_VALUES[codes] if bits == 4 else codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    factors = scales.values.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    return values * np.repeat(factors, 32, axis=-1)


def source_values(weight: Raw, scale: Raw | None, side: int, is_table: bool) -> Array:
    """Return the values of a source's weight, of blocks of ``side`` or of rows of a table."""
    if scale is None or weight.dtype == "I8" or (side == 128 and not is_table):
        return exact_values(weight, scale)
    factors = scale.values.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    spread = np.repeat(np.repeat(factors, 1 if is_table else side, axis=0), 32, axis=1)
    values = weight.values.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return values * spread[: values.shape[0], : values.shape[1]]


def expected_name(name: str, v41: bool) -> str:
    """Return what mlx-vlm calls a tensor, worked out from the official name in another way than the table."""
    if name.startswith(("vision.", "aligner.", "image_")):
        return name if v41 else name.replace(".mlp.", ".ffn.")
    parts = name.split(".")
    root = "language_model." if v41 else "language_model.model."
    if parts[0] == "layers":
        if "experts" in parts:
            parts[-2] = EXPERTS[parts[-2]]
            parts[parts.index("experts")] = "switch_mlp"
            del parts[4]
        elif "shared_experts" in parts:
            parts[-2] = EXPERTS[parts[-2]]
        elif not v41 and parts[2].startswith("hc_"):
            _, kind, leaf = parts[2].split("_")
            parts[2:] = [f"{kind}_hc", leaf]
        elif not v41 and parts[-2:] == ["gate", "bias"]:
            parts[-1] = "e_score_correction_bias"
        return root + ".".join(parts)
    if parts[0] == "embed":
        return root + "embed_tokens.weight"
    if parts[0] == "head":
        return "language_model.head.weight" if v41 else "language_model.lm_head.weight"
    return root + (name.replace("hc_head_", "hc_head.") if name.startswith("hc_head_") else name)


@pytest.mark.parametrize("dense", ["mxfp8", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_every_value_is_the_sources(case: str, dense: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    preset, options = CASES[case]
    source, out, v41 = make_checkpoint(preset, **options), tmp_path / "out", preset.startswith("v41")
    summary = dsv4convert.convert_mlx(source, out, dense=dense, threads=2, strict=True, max_file_size=600_000)
    assert (out / INDEX).exists()
    before, after = read_folder(source), read_folder(out)
    checkpoint = dsv4convert.open_checkpoint(source)
    stacks: dict[str, list[Array]] = {}
    kinds: dict[str, str] = {}
    for weight in checkpoint.weights.values():
        if weight.is_draft:
            continue
        name = expected_name(weight.name, v41)
        kinds[name] = weight.encoding.value
        raw, scale = before[weight.name], before.get(weight.name.removesuffix("weight") + "scale")
        if weight.row.store is Store.TABLE:
            assert after[name].dtype == "I32"
            assert np.array_equal(after[name].values, raw.values)
            continue
        is_table = weight.row.store is Store.ENGRAM
        stacks.setdefault(name, []).append(source_values(raw, scale, 32 if v41 else 128, is_table))
    for name, values in stacks.items():
        found = mlx_values(after, name)
        assert found.size == sum(part.size for part in values), name
        whole = np.stack(values).reshape(found.shape)
        assert np.array_equal(found.view(np.uint64), whole.view(np.uint64)), name
        packed = kinds[name] == "fp4" or (kinds[name] == "fp8" and (dense == "mxfp8" or "engram.embed" in name))
        assert (after[name].dtype == "U32") is packed, name
    scales = {name.removesuffix("weight") + "scales" for name, raw in after.items() if raw.dtype == "U32"}
    assert after.keys() == {*kinds, *scales}
    grouped = "language_model.layers.0.attn.wo_a" if v41 else "language_model.model.layers.0.attn.wo_a"
    assert after[f"{grouped}.weight"].values.ndim == 3
    check_config(json.loads((out / "config.json").read_text()), after)
    assert summary.tensors == len(after)
    report = dsv4convert.verify(source, out)
    assert not report.problems, report.problems
    assert report.layout == "MLX folder"
    assert not report.verdicts()["rounded"]


def check_config(config: dict[str, dict[str, dict[str, object]]], tensors: dict[str, Raw]) -> None:
    """Hold the modes that config.json names against the tensors."""
    assert "expert_dtype" not in config
    packed = {name.removesuffix(".weight"): raw for name, raw in tensors.items() if raw.dtype == "U32"}
    packed = {path: raw for path, raw in packed.items() if not path.endswith("engram.embed")}
    if not packed:
        assert "quantization" not in config
        return
    modes = dict(config["quantization"])
    assert config["quantization_config"] == modes
    assert [modes.pop(key) for key in ("group_size", "bits", "mode")] == [64, 8, "affine"]
    assert modes.keys() == packed.keys()
    for path, mode in modes.items():
        columns = tensors[f"{path}.scales"].values.shape[-1] * 32
        bits = packed[path].values.shape[-1] * 32 // columns
        assert mode == {"group_size": 32, "bits": bits, "mode": f"mxfp{bits}"}


def test_the_command_says_what_is_left_out(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("tiny")
    done = run_cli("mlx", source, tmp_path / "out", "--json")
    (left_out,) = json.loads(done.out)["dropped"]
    assert left_out["what"] == "mtp.*"
    assert left_out["reason"] == "mlx-vlm keeps drafts in folders of their own"
    header = RawSafetensors.read(tmp_path / "out" / "model.safetensors")
    assert header.metadata == {"format": "mlx"}
    planned = json.loads(run_cli("mlx", source, tmp_path / "planned", "--dry-run", "--json").out)
    assert not (tmp_path / "planned").exists()
    assert [file["bytes"] for file in planned["files"]] == [file["bytes"] for file in json.loads(done.out)["files"]]


@pytest.mark.parametrize("dense", ["mxfp8", "bf16"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    dense: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    whole, cut = (
        plan_mlx(make_checkpoint("tiny"), tmp_path / name / "out", dense=dense, max_file_bytes=600_000)
        for name in ("whole", "cut")
    )
    check_resumed(whole, cut, 40)
    assert not dsv4convert.verify(cut.source, cut.destination).problems


def test_floats_stay_floats(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    dsv4convert.dequantize(make_checkpoint("tiny"), tmp_path / "bf16", draft="drop")
    dsv4convert.convert_mlx(tmp_path / "bf16", tmp_path / "out")
    tensors = read_folder(tmp_path / "out")
    assert {raw.dtype for raw in tensors.values()} == {"BF16", "F32", "I32"}
    check_config(json.loads((tmp_path / "out" / "config.json").read_text()), tensors)
    assert not dsv4convert.verify(tmp_path / "bf16", tmp_path / "out").problems


def test_scales_that_are_no_powers_of_two_are_refused_by_name(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("tiny", variant="base", power_of_two_scales=False)
    with pytest.raises(LossyError, match=r"no power of two cannot be stored as E8M0.*--dense bf16"):
        dsv4convert.convert_mlx(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    dsv4convert.convert_mlx(source, tmp_path / "out", dense="bf16")
    assert not dsv4convert.verify(source, tmp_path / "out").problems


def test_rows_that_mxfp8_cannot_hold_are_refused_in_the_plan(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("tiny", overrides={"q_lora_rank": 80})
    with pytest.raises(UnsupportedError, match=r"attn.wq_b.weight: mxfp8 cannot hold its blocks.*rows of 80"):
        dsv4convert.convert_mlx(source, tmp_path / "out")
    dsv4convert.convert_mlx(source, tmp_path / "out", dense="bf16")
    assert not dsv4convert.verify(source, tmp_path / "out").problems


def test_an_unknown_form_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--dense"):
        dsv4convert.convert_mlx(make_checkpoint("tiny"), tmp_path / "out", dense="q8_0")


GATE = "language_model.model.layers.1.ffn.switch_mlp.gate_proj"
DENSE = "language_model.model.layers.1.attn.wq_b"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        (f"{GATE}.weight", 0),
        (f"{GATE}.weight", -1),
        (f"{GATE}.scales", 3),
        (f"{DENSE}.weight", -1),
        (f"{DENSE}.scales", 0),
        ("language_model.model.layers.0.ffn.gate.tid2eid", 8),
        ("language_model.lm_head.weight", 77),
    ],
)
def test_verify_finds_a_bit(name: str, place: int, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("tiny")
    dsv4convert.convert_mlx(source, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    raw = RawSafetensors.read(path)
    data = bytearray(raw.tensors[name].data)
    data[place] ^= 1
    raw.tensors[name].data = bytes(data)
    raw.write(path)
    report = dsv4convert.verify(source, tmp_path / "out")
    assert len(report.problems) == 1, report.problems


def exchanged(raw: RawSafetensors) -> None:
    tensors = raw.tensors
    up = GATE.replace("gate_proj", "up_proj")
    for leaf in ("weight", "scales"):
        tensors[f"{GATE}.{leaf}"], tensors[f"{up}.{leaf}"] = tensors[f"{up}.{leaf}"], tensors[f"{GATE}.{leaf}"]


DAMAGE = {
    "missing": lambda raw: raw.tensors.pop(f"{DENSE}.weight"),
    "missing scales": lambda raw: raw.tensors.pop(f"{DENSE}.scales"),
    "extra": lambda raw: raw.tensors.update(extra=raw.tensors[f"{DENSE}.scales"]),
    "another shape": lambda raw: raw.tensors[f"{GATE}.weight"].shape.insert(0, 1),
    "matrices exchanged": exchanged,
    "metadata": lambda raw: raw.metadata.update(format="pt"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_finds_damage(damage: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("tiny")
    dsv4convert.convert_mlx(source, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    raw = RawSafetensors.read(path)
    DAMAGE[damage](raw)
    raw.write(path)
    assert verified(source, tmp_path / "out").problems


def test_verify_finds_a_mode_that_the_tensors_have_not(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("tiny")
    dsv4convert.convert_mlx(source, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization"][DENSE]["mode"] = "mxfp4"
    path.write_text(json.dumps(config))
    (problem,) = verified(source, tmp_path / "out").problems
    assert "key quantization" in str(problem)


def verified(source: Path, out: Path) -> Report:
    return dsv4convert.verify(source, out)


@pytest.mark.parametrize("case", CASES)
def test_affine8_rounds_dense_weights_and_verify_knows_how(
    case: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    preset, options = CASES[case]
    source, out = make_checkpoint(preset, **options), tmp_path / "out"
    dsv4convert.convert_mlx(source, out, dense="affine8", threads=2)
    after = read_folder(out)
    config = json.loads((out / "config.json").read_text())
    biases = [name for name in after if name.endswith(".biases")]
    assert biases
    assert any(name.endswith("attn.wq_a.biases") for name in biases)
    for name in biases:
        words, scales = after[name.replace("biases", "weight")], after[name.replace("biases", "scales")]
        group = words.values.view(np.uint8).size // scales.values.size
        assert (words.dtype, scales.dtype, after[name].dtype) == ("U32", "BF16", "BF16")
        assert scales.values.shape == after[name].values.shape
        mode = config["quantization"][name.removesuffix(".biases")]
        assert mode == {"group_size": group, "bits": 8, "mode": "affine"}
    report = dsv4convert.verify(source, out)
    assert report.problems == []
    rounded = [result for result in report.results.values() if result.output == "affine8"]
    assert len(rounded) == len(biases)
    assert all(0 < result.squared_error < result.squared_source for result in rounded)


def test_a_wrong_code_scale_or_bias_is_found(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source, out = make_checkpoint("tiny"), tmp_path / "out"
    dsv4convert.convert_mlx(source, out, dense="affine8")
    path, stem = out / "model.safetensors", "language_model.model.layers.1.attn.wq_a"
    before = path.read_bytes()
    for part in ("weight", "scales", "biases"):
        raw = RawSafetensors.read(path)
        content = bytearray(raw.tensors[f"{stem}.{part}"].data)
        content[6] ^= 1
        raw.tensors[f"{stem}.{part}"].data = bytes(content)
        raw.write(path)
        problems = dsv4convert.verify(source, out).problems
        assert len(problems) == 1, part
        assert f"tensor {stem}.weight" in str(problems[0])
        path.write_bytes(before)
