"""Folders with NVFP4 experts: commands make of them what they make of the FP4 original, or name what is no FP4."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4convert.checkpoint import open_folder
from dsv4convert.inspection.describe import inspect_path
from dsv4convert.targets.repack import plan_repack
from dsv4convert.verification import verify

from ..checkpoints import MakeCheckpoint
from ..command_line import run_cli
from ..oracles.plain_folders import read_folder
from ..oracles.safetensors_bytes import RawSafetensors
from .folders import refusals, repack
from .test_wide_scales import copied, outputs

STEM = "layers.1.ffn.experts.2.w1"


def as_nvfp4(folder: Path, to: Path, **options: Any) -> Path:
    """Return a folder's NVFP4 form, under the name that copies have."""
    to.mkdir()
    repack(folder, to / "model", experts="nvfp4", **options)
    return to / "model"


@pytest.fixture(scope="module")
def small(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("tiny", experts=4, vocab=400)


@pytest.mark.parametrize("draft_experts", [False, True])
def test_every_command_makes_what_it_makes_of_the_original(draft_experts: bool, small: Path, tmp_path: Path) -> None:
    (tmp_path / "fp4").mkdir()
    original = copied(small, tmp_path / "fp4")
    source = as_nvfp4(small, tmp_path / "nvfp4", draft_experts=draft_experts)
    wanted, found = outputs(original, tmp_path / "of-fp4"), outputs(source, tmp_path / "of-nvfp4")
    assert found.keys() == wanted.keys()
    for name, content in wanted.items():
        assert found[name] == content, name
    for name in ("s2/config.json", "r/config.json", "d/config.json"):
        ours, theirs = (json.loads((tmp_path / of / name).read_text()) for of in ("of-nvfp4", "of-fp4"))
        assert ours == theirs, name
    logits = [
        json.loads(run_cli("forward", f, "--tokens", "1,2,3", "--json").out)["positions"] for f in (source, small)
    ]
    assert logits[0] == logits[1]
    checked = run_cli("check", source, "--json", "--strict")
    assert (checked.code, json.loads(checked.out)["findings"]) == (0, [])


def test_requantize_gives_the_original_back(small: Path, tmp_path: Path) -> None:
    source = as_nvfp4(small, tmp_path / "nvfp4")
    assert run_cli("requantize", source, tmp_path / "back", "--quiet").code == 0
    before, after = read_folder(small), read_folder(tmp_path / "back")
    assert after.keys() == before.keys()
    for name, raw in before.items():
        assert after[name].dtype == raw.dtype
        assert (after[name].values == raw.values).all(), name
    config = json.loads((small / "config.json").read_text())
    made = json.loads((tmp_path / "back/config.json").read_text())
    assert made == config
    assert verify(source, tmp_path / "back").problems == []


def test_casting_again_gives_the_same_folder(small: Path, tmp_path: Path) -> None:
    source = as_nvfp4(small, tmp_path / "nvfp4")
    again = as_nvfp4(source, tmp_path / "again")
    for path in source.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_what_is_read_how_is_told(small: Path, tmp_path: Path) -> None:
    source = as_nvfp4(small, tmp_path / "nvfp4")
    found = inspect_path(source)
    assert found.unexpected == []
    assert any("NVFP4 weights are read as the FP4" in note for note in found.notes)
    checkpoint = open_folder(source)
    (inputs,) = checkpoint.unused
    assert inputs.reason == "scales of activations, of NVFP4 only"
    assert len(inputs.names) == 4 * 4 * 3
    assert any("NVFP4 weights are read as the FP4" in note for note in checkpoint.notes)


def test_no_second_scale_can_be_lost(small: Path, tmp_path: Path) -> None:
    source = as_nvfp4(small, tmp_path / "nvfp4")
    plan_repack(source, tmp_path / "out")
    for suffix in (".weight_scale_2", ".weight_scale", ".weight"):
        path = source / "model.safetensors"
        before = path.read_bytes()
        raw = RawSafetensors.read(path)
        del raw.tensors[STEM + suffix]
        raw.write(path)
        result = run_cli("dequantize", source, tmp_path / "o")
        assert result.code == 5
        assert f"(tensor {STEM}{suffix} is missing, which {STEM}.weight_scale" in result.error
        path.write_bytes(before)


def test_scales_of_both_forms_are_an_error(small: Path, tmp_path: Path) -> None:
    source = as_nvfp4(small, tmp_path / "nvfp4")
    path = source / "model.safetensors"
    raw = RawSafetensors.read(path)
    raw.tensors[f"{STEM}.scale"] = raw.tensors[f"{STEM}.weight_scale"]
    raw.write(path)
    result = run_cli("dequantize", source, tmp_path / "o")
    assert result.code == 5
    assert f"tensor {STEM}.weight: scales of both FP4 and NVFP4" in result.error


def test_a_file_that_is_missing_or_cut_is_told_as_that(small: Path, tmp_path: Path) -> None:
    source = as_nvfp4(small, tmp_path / "nvfp4", max_file_bytes=10**6)
    lost = sorted(source.glob("*.safetensors"))[1]
    content = lost.read_bytes()
    lost.unlink()
    error = run_cli("dequantize", source, tmp_path / "o").error
    assert error.endswith(f"{lost.name}: no such file; is the download complete?")
    lost.write_bytes(content[:-1])
    error = run_cli("dequantize", source, tmp_path / "o").error
    assert "truncated, the data extends past the end of the file" in error
    assert "ModelOpt" not in error
    assert "experts removed" not in error


@pytest.mark.parametrize("words", [["--reindex"], ["--rename", "official"], ["--drop-draft"]], ids=lambda w: w[0])
def test_mend_leaves_nvfp4_alone(words: list[str], small: Path, tmp_path: Path) -> None:
    source = as_nvfp4(small, tmp_path / "nvfp4")
    result = run_cli("mend", source, tmp_path / "out", *words)
    assert result.code == 5
    assert "mend would leave behind; run requantize first" in result.error


def test_mlx_makes_what_it_makes_of_the_original(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128}
    small = make_checkpoint("tiny", experts=4, vocab=400, overrides=sizes)
    source = as_nvfp4(small, tmp_path / "nvfp4")
    for folder, out in ((small, "a"), (source, "b")):
        assert run_cli("mlx", folder, tmp_path / out, "--quiet").code == 0
        assert run_cli("verify", folder, tmp_path / out).code == 0
    for path in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes(), path.name


def changed(source: Path, name: str, change: Callable[[bytearray], None]) -> None:
    """Change the bytes of a tensor."""
    path = source / "model.safetensors"
    raw = RawSafetensors.read(path)
    content = bytearray(raw.tensors[name].data)
    change(content)
    raw.tensors[name].data = bytes(content)
    raw.write(path)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_second_scale_that_is_no_positive_number_is_named(value: float, small: Path, tmp_path: Path) -> None:
    source = as_nvfp4(small, tmp_path / "nvfp4")
    changed(source, f"{STEM}.weight_scale_2", lambda content: struct.pack_into("<f", content, 0, value))
    for command in (["hf-to-gguf", source, tmp_path / "a.gguf"], ["dequantize", source, tmp_path / "d"]):
        result = run_cli(*command)
        assert result.code == 5
        assert f"ModelOpt's NVFP4: moe_quant_algo NVFP4 (tensor {STEM}.weight_scale_2: not a scale)" in result.error


@pytest.mark.parametrize(
    ("pair", "seen"),
    [(b"\x38\x40", "1 and 2"), (b"\x39\x39", "1.125 and 1.125"), (b"\xb8\xb8", "-1 and -1"), (b"\0\0", "0 and 0")],
    ids=["unequal", "no powers of two", "negative", "zero"],
)
def test_scales_that_are_no_e8m0_are_named_by_tensor_and_position(
    pair: bytes, seen: str, small: Path, tmp_path: Path
) -> None:
    source = as_nvfp4(small, tmp_path / "nvfp4")
    columns = 160 // 16
    at = 5 * columns + 2

    def change(content: bytearray) -> None:
        content[at : at + 2] = pair

    assert run_cli("dequantize", small, tmp_path / "before", "--quiet").code == 0
    changed(source, f"{STEM}.weight_scale", change)
    for command, error in refusals(source, tmp_path).items():
        assert f"tensor {STEM}.weight_scale: scales from [5, 2] on are not one E8M0 scale" in error, command
        assert f"got {seen}, times 2^" in error
    assert "a pair of NVFP4 scales is not one E8M0 scale" in run_cli("verify", source, tmp_path / "before").error
