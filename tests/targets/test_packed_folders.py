"""Folders of ModelOpt and compressed-tensors whose weights are no FP4, or FP4 under other names."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dsv4convert.api import convert_gguf
from dsv4convert.checkpoint import open_folder
from dsv4convert.checkpoint.weights import Encoding
from dsv4convert.containers.gguf import open_gguf
from dsv4convert.formats.ggml import find_quantiser
from dsv4convert.inspection.describe import inspect_path
from dsv4convert.reference.weights.open import open_source
from dsv4convert.targets import low_bit
from dsv4convert.verification import verify

from ..checkpoints import MakeCheckpoint
from ..command_line import run_cli
from ..oracles.compressed_tensors_packed import COLUMNS, INT4, RECORD, ROWS
from ..oracles.safetensors_bytes import RawSafetensors, RawTensor
from ..packed import (
    MODELOPT,
    NVFP4_PACKED,
    PACK_QUANTIZED,
    Form,
    compressed_cast,
    compressed_mxfp4,
    compressed_nvfp4,
    int4,
    modelopt_nvfp4,
    repacked,
)
from .test_wide_scales import copied, outputs

Edit = Callable[[bytes], bytes]

STEM = "layers.1.ffn.experts.1.w1"
FORMS: dict[str, tuple[Form, dict[str, object], Encoding]] = {
    "ModelOpt's NVFP4": (modelopt_nvfp4, MODELOPT, Encoding.NVFP4),
    "compressed NVFP4": (compressed_nvfp4, NVFP4_PACKED, Encoding.NVFP4),
    "W4A16": (int4(128, zeros=False), PACK_QUANTIZED, Encoding.INT4),
    "W4A16 with zero points": (int4(32, zeros=True, dtype="F16"), PACK_QUANTIZED, Encoding.INT4),
}
E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)


@pytest.fixture(scope="module")
def small(make_checkpoint: MakeCheckpoint) -> Path:
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128}
    return make_checkpoint("tiny", experts=2, vocab=400, overrides=sizes)


@pytest.fixture(params=FORMS)
def packed(request: pytest.FixtureRequest, small: Path, tmp_path: Path) -> tuple[Path, Encoding]:
    """Return a folder in one of the forms, and the encoding of its experts."""
    form, quantization, encoding = FORMS[request.param]
    (tmp_path / "packed").mkdir()
    return repacked(small, tmp_path / "packed", form, quantization=quantization), encoding


def values_by_hand(folder: Path, stem: str) -> np.ndarray:
    """Return the values of an expert's matrix from the tensors as they lie, in float64, unrounded."""
    tensors: dict[str, RawTensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= RawSafetensors.read(path).tensors
    of = {name.removeprefix(f"{stem}."): tensor for name, tensor in tensors.items() if name.startswith(f"{stem}.")}
    raw = np.frombuffer((of.get("weight_packed") or of["weight"]).data, np.uint8)
    kinds: dict[str, Any] = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
    scale = np.frombuffer(of["weight_scale"].data, kinds[of["weight_scale"].dtype]).astype(np.float32)
    scale = scale.reshape(of["weight_scale"].shape)
    codes = np.stack([raw & 15, raw >> 4], axis=-1).reshape(len(scale), -1)
    if "weight_scale_2" in of:
        scale = scale * np.frombuffer(of["weight_scale_2"].data, np.float32)
    if "weight_global_scale" in of:
        scale = scale / np.frombuffer(of["weight_global_scale"].data, np.float32)
    spread = np.repeat(scale, codes.shape[1] // scale.shape[1], axis=1).astype(np.float64)
    if "weight_shape" not in of:
        return E2M1[codes] * spread
    zero: np.ndarray | int = 8
    if "weight_zero_point" in of:
        words = np.frombuffer(of["weight_zero_point"].data, np.uint32).reshape(of["weight_zero_point"].shape)
        zero = np.stack([words >> np.uint32(4 * row) & np.uint32(15) for row in range(8)], axis=1)
        zero = zero.reshape(-1, words.shape[1])[: len(scale)].astype(np.int64)
        zero = np.repeat(zero, codes.shape[1] // scale.shape[1], axis=1)
    return (codes.astype(np.int64) - zero) * spread


def test_values_are_decoded_as_the_tensors_say(packed: tuple[Path, Encoding], tmp_path: Path) -> None:
    source, encoding = packed
    assert open_folder(source).weights[f"{STEM}.weight"].encoding is encoding
    source_weights = open_source(source)
    for dtype, kind in (("f32", np.float32), ("bf16", ml_dtypes.bfloat16)):
        assert run_cli("dequantize", source, tmp_path / dtype, "--dtype", dtype, "--quiet").code == 0
        found: dict[str, RawTensor] = {}
        for path in (tmp_path / dtype).glob("*.safetensors"):
            found |= RawSafetensors.read(path).tensors
        for stem in (STEM, "layers.0.ffn.experts.0.w2"):
            exact = values_by_hand(source, stem)
            made = np.frombuffer(found[f"{stem}.weight"].data, kind).astype(np.float64)
            assert np.array_equal(made, exact.astype(kind).astype(np.float64).reshape(-1))
            if dtype == "f32":
                read = source_weights.tensor(f"{stem}.weight")
                assert np.array_equal(read, exact.astype(np.float32))
                rows = np.array([9, 3, 100])
                assert np.array_equal(source_weights.rows(f"{stem}.weight", rows), read[rows])
        report = verify(source, tmp_path / dtype)
        assert report.problems == []


@pytest.mark.parametrize("experts", [None, "q8_0", "mxfp4", "bf16"])
def test_a_gguf_holds_them_in_any_type(experts: str | None, packed: tuple[Path, Encoding], tmp_path: Path) -> None:
    source, encoding = packed
    options = [] if experts is None else ["--experts", experts]
    result = run_cli("hf-to-gguf", source, tmp_path / "m.gguf", *options)
    assert result.code == 0, result.err
    kind = experts or {Encoding.NVFP4: "nvfp4", Encoding.INT4: "q8_0"}[encoding]
    tensors = open_gguf(tmp_path / "m.gguf").tensors
    assert tensors["blk.1.ffn_gate_exps.weight"].type == kind
    assert ("blk.1.ffn_gate_exps.scale" in tensors) == (kind == "nvfp4")
    assert ("--experts mxfp4 rounds" in result.out) == (experts == "mxfp4")
    assert ("does not multiply by" in result.out) == (kind == "nvfp4")
    assert verify(source, tmp_path / "m.gguf").problems == []
    assert inspect_path(tmp_path / "m.gguf").unexpected == []
    read, exact = open_source(tmp_path / "m.gguf").tensor(f"{STEM}.weight"), values_by_hand(source, STEM)
    if kind == "nvfp4":  # the product with the second scale is rounded elsewhere
        np.testing.assert_allclose(read, exact, rtol=2.0**-22, atol=0)
    else:
        atol = {"q8_0": 1 / 127, "mxfp4": 1 / 4, "bf16": 2.0**-8}[kind] * np.abs(exact).max()
        np.testing.assert_allclose(read, exact, atol=atol, rtol=0)


@pytest.mark.parametrize("importance", [None, "weights"])
def test_low_bit_types_of_them_are_those_of_the_values(
    importance: str | None, packed: tuple[Path, Encoding], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of whole super-blocks, and rows that fall back; matrices in several segments."""
    pytest.importorskip("llama_cpp")
    source, _ = packed
    convert_gguf(source, tmp_path / "wide.gguf", experts="f32")
    monkeypatch.setattr(low_bit, "LEAST_SEGMENT_ELEMENTS", 2**12)
    summary = convert_gguf(source, tmp_path / "low.gguf", experts="q4_k", importance=importance, threads=3)
    assert not any("exps" in entry["tensor"] for entry in summary.counted)
    made, wide = open_gguf(tmp_path / "low.gguf").tensors, open_gguf(tmp_path / "wide.gguf").tensors
    quantiser = find_quantiser()
    for name, kind in (("blk.1.ffn_gate_exps.weight", "q4_k"), ("blk.1.ffn_down_exps.weight", "q5_0")):
        assert made[name].type == kind
        stored = np.fromfile(made[name].file, np.uint8, made[name].nbytes, offset=made[name].offset)
        values = np.fromfile(wide[name].file, "<f4", wide[name].nbytes // 4, offset=wide[name].offset)
        for rows, blocks in zip(
            values.reshape(wide[name].shape), stored.reshape(*wide[name].shape[:2], -1), strict=True
        ):
            weights = None if importance is None else np.square(rows, dtype=np.float64).sum(axis=0).astype(np.float32)
            expected = np.empty_like(blocks)
            quantiser.quantise(kind, rows, expected, weights)
            assert np.array_equal(blocks, expected), name
    assert verify(source, tmp_path / "low.gguf").problems == []


def test_requantize_rounds_them_to_fp4_and_counts(packed: tuple[Path, Encoding], tmp_path: Path) -> None:
    source, _ = packed
    result = run_cli("requantize", source, tmp_path / "r")
    assert result.code == 0, result.err
    assert "24 experts' weights are rounded to FP4" in result.out
    assert f"counted in {STEM}.weight: " in result.out or "more tensors" in result.out
    assert open_folder(tmp_path / "r").weights[f"{STEM}.weight"].encoding is Encoding.FP4
    assert verify(source, tmp_path / "r").problems == []


@pytest.mark.parametrize(
    "words",
    [["shard", "--mp", "2"], ["repack", "--experts", "fp8"], ["repack", "--experts", "nvfp4"], ["mlx"]],
    ids=" ".join,
)
def test_layouts_that_have_no_such_weights_say_so(
    words: list[str], packed: tuple[Path, Encoding], tmp_path: Path
) -> None:
    source, encoding = packed
    result = run_cli(words[0], source, tmp_path / "out", *words[1:])
    assert result.code == 5
    assert f"{encoding.value.upper()} cannot go into " in result.error
    assert "run requantize first" in result.error
    assert not (tmp_path / "out").exists()


def test_compare_and_maxtext_take_them(packed: tuple[Path, Encoding], small: Path, tmp_path: Path) -> None:
    source, _ = packed
    assert run_cli("dequantize", source, tmp_path / "f32", "--dtype", "f32", "--quiet").code == 0
    assert run_cli("compare", tmp_path / "f32", source, "--random", "3", "--tolerance", "0").code == 0
    assert run_cli("compare", small, source, "--random", "3").code == 12
    assert run_cli("maxtext", source, tmp_path / "maxtext", "--quiet").code == 0
    report = verify(source, tmp_path / "maxtext")
    assert report.problems == []
    rounded = report.verdicts()["rounded"]
    assert rounded == 12, rounded


def test_a_copy_is_no_conversion(packed: tuple[Path, Encoding], tmp_path: Path) -> None:
    """No command writes such weights: verify says so, and vouches for none of them."""
    source, _ = packed
    result = run_cli("verify", source, shutil.copytree(source, tmp_path / "copy"))
    assert result.code == 12
    assert "layout: tensor layers.0.ffn.experts.0.w1.weight" in result.out + result.err
    assert "as no command does" in result.out or "got fp4/nv" in result.out


def test_inspect_and_check_say_how_they_are_read(packed: tuple[Path, Encoding]) -> None:
    source, encoding = packed
    found = inspect_path(source)
    assert found.unexpected == []
    note = "are read as they are" if encoding is Encoding.NVFP4 else "packed integers of four bits"
    assert sum(note in line for line in found.notes) == 1
    result = run_cli("check", source)
    assert result.code == 0
    assert note in result.out


def test_a_wrong_second_scale_or_code_is_found_by_verify(small: Path, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    source = repacked(small, tmp_path / "packed", modelopt_nvfp4, quantization=MODELOPT)
    path = tmp_path / "m.gguf"
    assert run_cli("hf-to-gguf", source, path, "--quiet").code == 0
    tensors = open_gguf(path).tensors
    for name, at, problem in (
        ("blk.0.ffn_up_exps.scale", 4, "tensor blk.0.ffn_up_exps.scale: [1]: expected "),
        ("blk.0.ffn_up_exps.weight", 1, "tensor blk.0.ffn_up_exps.weight: 16 of "),
        ("blk.0.ffn_up_exps.weight", 7, "tensor blk.0.ffn_up_exps.weight: 1 of "),
    ):
        content = bytearray(path.read_bytes())
        content[tensors[name].offset + at] ^= 1
        (tmp_path / "wrong.gguf").write_bytes(content)
        result = run_cli("verify", source, tmp_path / "wrong.gguf")
        assert result.code == 12
        assert problem in result.out + result.err


# FP4 under other names


@pytest.mark.parametrize("form", [compressed_cast, compressed_mxfp4], ids=["cast", "mxfp4"])
def test_fp4_under_other_names_converts_to_the_bytes_of_the_original(form: Form, small: Path, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "plain").mkdir()
    source = repacked(small, tmp_path / "packed", form, quantization=NVFP4_PACKED)
    before, after = outputs(copied(small, tmp_path / "plain"), tmp_path / "a"), outputs(source, tmp_path / "b")
    assert before.keys() == after.keys()
    for name, content in before.items():
        assert after[name] == content, name
    assert run_cli("requantize", source, tmp_path / "r", "--quiet").code == 0
    assert verify(source, tmp_path / "r").problems == []
    assert json.loads((tmp_path / "r/config.json").read_text())["quantization_config"]["quant_method"] == "fp8"


FIRST = "layers.0.ffn.experts.0.w1"


@pytest.mark.parametrize("name", [f"{FIRST}.weight_scale", f"{STEM}.weight_global_scale"])
def test_scales_that_are_none_of_fp4_make_a_folder_nvfp4(name: str, small: Path, tmp_path: Path) -> None:
    """Any second scale tells that is no power of two, and of scales those in a few first rows."""
    (tmp_path / "packed").mkdir()
    source = repacked(small, tmp_path / "packed", compressed_cast, quantization=NVFP4_PACKED)
    edit(source, name, lambda content: bytes([content[0] ^ 1]) + content[1:])
    held = {w.encoding for w in open_folder(source).weights.values() if w.expert is not None and not w.is_draft}
    assert held == {Encoding.NVFP4}


# Against the package


@pytest.fixture(scope="module")
def record() -> dict[str, np.ndarray]:
    with np.load(RECORD) as found:
        return dict(found)


def recorded(record: dict[str, np.ndarray], name: str, dtypes: dict[str, str]) -> dict[str, RawTensor]:
    """Return what the package packed as tensors of a weight."""
    of = {key.removeprefix(f"{name}/"): value for key, value in record.items() if key.startswith(f"{name}/")}
    return {f"w.{key}": RawTensor(dtypes[key], list(of[key].shape), of[key].tobytes()) for key in of if key in dtypes}


def read_record(tensors: dict[str, RawTensor], folder: Path) -> np.ndarray:
    """Return the float32 values of a weight that lies in a file by itself."""
    from dsv4convert.checkpoint.packed import unpacked_forms
    from dsv4convert.checkpoint.weights import pair
    from dsv4convert.containers.safetensors import read_header
    from dsv4convert.model.tensors import EXPERT_ROWS, Expected
    from dsv4convert.reference.weights.decode import read_rows
    from dsv4convert.reference.weights.open import weight_matrix

    RawSafetensors(tensors, None).write(folder / "w.safetensors")
    stored = unpacked_forms(read_header(folder / "w.safetensors"))
    expected = Expected("w.weight", EXPERT_ROWS[0], (ROWS, COLUMNS), "", 0, 0)
    weight = pair(expected, stored["w.weight"], stored["w.scale"], zero=stored.get("w.zero"))
    return read_rows(weight_matrix(weight))


def test_nvfp4_is_read_as_the_package_reads_it(record: dict[str, np.ndarray], tmp_path: Path) -> None:
    dtypes = {"weight_packed": "U8", "weight_scale": "F8_E4M3", "weight_global_scale": "F32"}
    read = read_record(recorded(record, "nvfp4", dtypes), tmp_path)
    assert np.array_equal(read, record["nvfp4/f32"].view(np.float32))
    assert np.array_equal(read.astype(ml_dtypes.bfloat16).view(np.int16), record["nvfp4/bf16"])


def test_mxfp4_is_read_as_the_package_reads_it(record: dict[str, np.ndarray], tmp_path: Path) -> None:
    read = read_record(recorded(record, "mxfp4", {"weight_packed": "U8", "weight_scale": "U8"}), tmp_path)
    assert np.array_equal(read.astype(ml_dtypes.bfloat16).view(np.int16), record["mxfp4/bf16"])


@pytest.mark.parametrize("name", INT4)
def test_integers_are_read_as_the_package_reads_them(name: str, record: dict[str, np.ndarray], tmp_path: Path) -> None:
    kind = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[INT4[name][2]]
    dtypes = {"weight_packed": "I32", "weight_scale": kind, "weight_shape": "I64", "weight_zero_point": "I32"}
    read = read_record(recorded(record, name, dtypes), tmp_path)
    plain: Any = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}[kind]
    assert np.array_equal(read.astype(plain), record[f"{name}/read"].view(plain))


# What is wrong is named


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("weight_scale", None, f"tensor {STEM}.weight_scale is missing, which {STEM}.weight_packed belongs to"),
        (
            "weight_shape",
            lambda _: struct.pack("<2q", 128, 512),
            "[128, 256] elements of four bits, weight_shape says [128, 512]",
        ),
        ("weight_packed", None, f"tensor {STEM}.weight_packed is missing, which {STEM}.weight_shape belongs to"),
    ],
    ids=["no scale", "another shape", "no codes"],
)
def test_an_int4_weight_that_is_not_whole_is_named(
    name: str, change: Edit | None, said: str, small: Path, tmp_path: Path
) -> None:
    (tmp_path / "packed").mkdir()
    source = repacked(small, tmp_path / "packed", int4(32, zeros=True), quantization=PACK_QUANTIZED)
    edit(source, f"{STEM}.{name}", change)
    result = run_cli("dequantize", source, tmp_path / "o")
    assert result.code in (5, 7)
    assert said in result.error, result.error


@pytest.mark.parametrize("dtype", ["I32", "I64", "U8", "F8_E8M0", "F64"])
def test_scales_of_int4_of_another_type_are_refused(dtype: str, small: Path, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    source = repacked(small, tmp_path / "packed", int4(128, zeros=False), quantization=PACK_QUANTIZED)
    for path in source.glob("*.safetensors"):
        raw = RawSafetensors.read(path)
        if f"{STEM}.weight_scale" in raw.tensors:
            shape = raw.tensors[f"{STEM}.weight_scale"].shape
            size = {"U8": 1, "F8_E8M0": 1, "I32": 4}.get(dtype, 8)
            raw.tensors[f"{STEM}.weight_scale"] = RawTensor(dtype, shape, bytes(size * int(np.prod(shape))))
            raw.write(path)
    result = run_cli("dequantize", source, tmp_path / "o")
    assert result.code == 5, result.error
    assert f"tensor {STEM}.weight_scale: not a scale of INT4" in result.error
    assert f"expected F32, BF16 or F16 of two dimensions, got {dtype} [128, 2]" in result.error


def test_an_empty_scale_is_not_called_by_the_name_of_the_next_tensor(small: Path, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    source = repacked(small, tmp_path / "packed", int4(128, zeros=False), quantization=PACK_QUANTIZED)
    for path in source.glob("*.safetensors"):
        raw = RawSafetensors.read(path)
        if f"{STEM}.weight_scale" in raw.tensors:
            raw.tensors[f"{STEM}.weight_scale"] = RawTensor("BF16", [0, 2], b"")
            raw.write(path)
    result = run_cli("dequantize", source, tmp_path / "o")
    assert result.code == 7, result.error
    assert f"tensor {STEM}.scale: the shape fits no block size" in result.error


def test_an_order_of_columns_is_refused(small: Path, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    source = repacked(small, tmp_path / "packed", int4(32, zeros=False), quantization=PACK_QUANTIZED)
    path = next(
        path for path in source.glob("*.safetensors") if f"{STEM}.weight_packed" in RawSafetensors.read(path).tensors
    )
    raw = RawSafetensors.read(path)
    raw.tensors[f"{STEM}.weight_g_idx"] = RawTensor("I32", [256], bytes(1024))
    raw.write(path)
    result = run_cli("dequantize", source, tmp_path / "o", "--index", "headers")
    assert result.code == 5
    assert "compressed-tensors: format pack-quantized (tensor" in result.error
    assert "columns in another order than that of their groups" in result.error


def test_an_unrelated_error_is_not_put_down_to_the_form(small: Path, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    source = repacked(small, tmp_path / "packed", modelopt_nvfp4, quantization=MODELOPT)
    edit(source, "layers.0.attn.wq_a.weight", None)
    error = run_cli("dequantize", source, tmp_path / "o").error
    assert "tensor layers.0.attn.wq_a.weight is missing" in error
    assert "ModelOpt" not in error


def edit(folder: Path, name: str, change: Edit | None) -> None:
    """Change the bytes of a tensor, or take it out of its file and the index."""
    for path in folder.glob("*.safetensors"):
        raw = RawSafetensors.read(path)
        if name in raw.tensors:
            if change is None:
                del raw.tensors[name]
            else:
                raw.tensors[name].data = change(raw.tensors[name].data)
            raw.write(path)
    index = folder / "model.safetensors.index.json"
    if change is None and index.exists():
        held = json.loads(index.read_text())
        del held["weight_map"][name]
        index.write_text(json.dumps(held))
