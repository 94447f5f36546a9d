"""``dequantize``: numbers bit by bit, the folder around them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import dsv4convert.targets.companions as companions
from dsv4convert.checkpoint import Encoding, open_folder
from dsv4convert.errors import FileFormatError, InventoryError, LossyError, OutputExistsError, UsageError
from dsv4convert.plan import OutputTensor
from dsv4convert.targets.dequantize import plan_dequantize
from dsv4convert.targets.hf_folder import dequantized_tensors, hf_files

from ..checkpoints import MakeCheckpoint
from ..oracles.plain_folders import Counts, Raw, bits, count_losses, exact_values, read_folder, round_to
from .folders import Editable, dequantize

VARIANTS = {
    "fp4": {},
    "base": {"variant": "base"},
    "base-any-scale": {"variant": "base", "power_of_two_scales": False},
    "dspark": {"variant": "dspark"},
}
DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
EXPERT = "layers.1.ffn.experts.3.w1"


def scale_of(source: dict[str, Raw], name: str) -> Raw | None:
    return source.get(name.removesuffix(".weight") + ".scale") if name.endswith(".weight") else None


def expected(source: dict[str, Raw], name: str, dtype: str) -> tuple[Raw, Counts]:
    """Return what a source tensor must become, and what must be counted."""
    weight = source[name]
    if weight.dtype in ("I64", "F32"):
        return weight, Counts(0, 0, 0, 0)
    exact = exact_values(weight, scale_of(source, name))
    return Raw(dtype, bits(round_to(exact, dtype), dtype)), count_losses(exact, dtype)


def assert_same(made: Raw, want: Raw) -> None:
    assert made.dtype == want.dtype
    assert made.values.shape == want.values.shape
    unsigned = want.values.view(f"u{want.values.itemsize}")
    np.testing.assert_array_equal(made.values.view(unsigned.dtype), unsigned)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_has_the_bits_of_a_slow_decode(
    variant: str, dtype: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = make_checkpoint("tiny", **VARIANTS[variant])
    source = read_folder(folder)
    summary = dequantize(folder, tmp_path / "out", dtype=dtype)
    made = read_folder(tmp_path / "out")

    assert made.keys() == {name for name in source if not name.endswith(".scale")}
    counted = {entry["tensor"]: Counts(*(entry[kind] for kind in Counts._fields)) for entry in summary.counted}
    for name, raw in made.items():
        want, counts = expected(source, name, DTYPES[dtype])
        assert_same(raw, want)
        assert counted.get(name, Counts(0, 0, 0, 0)) == counts, name


def test_bf16_of_power_of_two_scales_is_lossless(tiny: Path, tmp_path: Path) -> None:
    assert dequantize(tiny, tmp_path / "out", strict=True).counted == ()


def test_a_folder_in_bf16_stays_as_it_is(tiny: Path, tmp_path: Path) -> None:
    dequantize(tiny, tmp_path / "once")
    dequantize(tmp_path / "once", tmp_path / "twice")
    first, second = (sorted((tmp_path / name).iterdir()) for name in ("once", "twice"))
    assert [path.name for path in first] == [path.name for path in second]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_out_of_range_nan_and_negative_zero(
    dtype: str, editable: Callable[..., Editable], tmp_path: Path
) -> None:
    source = editable()

    def weights(codes: np.ndarray[Any, Any]) -> None:
        codes.reshape(-1)[:256] = np.arange(256)  # all codes, NaN and both zeros among them

    def scales(codes: np.ndarray[Any, Any]) -> None:
        codes.reshape(-1)[:8] = [0, 1, 13, 100, 127, 200, 254, 255]

    for name in (EXPERT, "layers.1.attn.wq_b"):
        source.edit(f"{name}.weight", weights)
        source.edit(f"{name}.scale", scales)
    before = read_folder(source.folder)
    summary = dequantize(source.folder, tmp_path / "out", dtype=dtype)
    after = read_folder(tmp_path / "out")
    counted = {entry["tensor"]: Counts(*(entry[kind] for kind in Counts._fields)) for entry in summary.counted}
    for name in (f"{EXPERT}.weight", "layers.1.attn.wq_b.weight"):
        want, counts = expected(before, name, DTYPES[dtype])
        exact = exact_values(before[name], scale_of(before, name))
        made = after[name].values.view(want.values.dtype)
        number = ~np.isnan(exact)
        np.testing.assert_array_equal(made[number], want.values[number])
        assert np.isnan(exact_values(after[name], None)[~number]).all()
        assert counts.nan
        assert counts.overflow
        assert counted[name] == counts


def test_strict_refuses_what_leaves_the_range_and_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(LossyError, match=r"head\.weight: not exact .*10 underflow; without --strict"):
        dequantize(tiny, tmp_path / "out", dtype="f16", strict=True)
    assert list(tmp_path.iterdir()) == []


def test_strict_refuses_rounding(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("tiny", variant="base", power_of_two_scales=False)
    with pytest.raises(LossyError, match="changed"):
        dequantize(source, tmp_path / "out", strict=True)
    assert list(tmp_path.iterdir()) == []


def test_strict_accepts_a_nan_that_stays_one(editable: Callable[..., Editable], tmp_path: Path) -> None:
    source = editable()
    source.edit("layers.0.attn.wkv.weight", lambda codes: codes.reshape(-1).__setitem__(7, 0x7F))
    summary = dequantize(source.folder, tmp_path / "out", strict=True)
    assert [(entry["tensor"], entry["nan"]) for entry in summary.counted] == [("layers.0.attn.wkv.weight", 1)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_config_says_the_dtype_and_nothing_of_quantization(dtype: str, tiny: Path, tmp_path: Path) -> None:
    dequantize(tiny, tmp_path / "out", dtype=dtype)
    before = json.loads((tiny / "config.json").read_text())
    after = json.loads((tmp_path / "out/config.json").read_text())
    name = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}[dtype]
    assert after.pop("torch_dtype") == after.pop("dtype") == name
    for key in ("quantization_config", "expert_dtype", "torch_dtype"):
        del before[key]
    assert after == before


def test_files_keep_to_the_limit_and_the_index_finds_every_tensor(tiny: Path, tmp_path: Path) -> None:
    limit = 400_000
    dequantize(tiny, tmp_path / "out", max_file_bytes=limit)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert [path.name for path in files] == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert count > 10
    held: dict[str, str] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            names = list(file.keys())
        assert path.stat().st_size <= limit or len(names) == 1
        held |= dict.fromkeys(names, path.name)
    assert index["weight_map"] == held
    assert list(index["weight_map"]) == sorted(held)
    assert index["metadata"]["total_size"] == sum(
        tensor.values.nbytes for tensor in read_folder(tmp_path / "out").values()
    )
    assert read_folder(tmp_path / "out").keys() == open_folder(tiny).weights.keys()


def test_no_file_but_a_single_tensor_exceeds_the_limit_by_its_header() -> None:
    tensors = [OutputTensor(f"t{n}", "F8_E4M3", (1, 1000), 0, 1000, ()) for n in range(100)]
    for limit in (1, 1500, 2400, 2600, 10_000, 117_000, 200_000):
        for file in hf_files(tensors, limit):
            assert file.nbytes <= limit or len(file.tensors) <= 1


def test_one_file_has_no_index(tiny: Path, tmp_path: Path) -> None:
    dequantize(tiny, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_tensors_are_aligned_to_their_element(tiny: Path, tmp_path: Path) -> None:
    plan = plan_dequantize(tiny, tmp_path / "out")
    size = {"I64": 8, "F32": 4, "BF16": 2}
    assert all(t.offset % size[t.dtype] == 0 for file in plan.files for t in file.tensors)


def test_tokenizer_and_generation_files_are_copied_byte_for_byte(
    editable: Callable[..., Editable], tmp_path: Path
) -> None:
    source = editable().folder
    (source / "LICENSE").write_bytes(b"\xff\x00 not text\n")
    (source / "chat_template.jinja").symlink_to(source / "LICENSE")  # as the hub's cache has them
    (source / "notes.txt").write_text("no part of a checkpoint")
    dequantize(source, tmp_path / "out")
    for name in ("LICENSE", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "out/chat_template.jinja").is_symlink()
    assert not (tmp_path / "out/notes.txt").exists()


def test_an_absurdly_large_tokenizer_is_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companions, "MAX_AUXILIARY_BYTES", 1000)
    with pytest.raises(FileFormatError, match=r"tokenizer\.json: too large to be copied"):
        plan_dequantize(tiny, tmp_path / "out")


@pytest.mark.parametrize("variant", ["fp4", "base", "dspark"])
def test_transformers_names_hold_the_same_numbers(
    variant: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint("tiny", **VARIANTS[variant])
    dequantize(source, tmp_path / "official")
    summary = dequantize(source, tmp_path / "stacked", names="transformers")
    official, stacked = read_folder(tmp_path / "official"), read_folder(tmp_path / "stacked")
    assert summary.dropped == ()
    assert any("mtp.*" in note for note in summary.notes)

    left = dict(official)
    for layer in range(4):
        experts = f"layers.{layer}.ffn.experts"
        w1, w2, w3 = (
            np.stack([left.pop(f"{experts}.{k}.{part}.weight").values for k in range(8)]) for part in ("w1", "w2", "w3")
        )
        name = f"model.layers.{layer}.mlp.experts"
        gate_up, down = stacked.pop(f"{name}.gate_up_proj"), stacked.pop(f"{name}.down_proj")
        assert gate_up.values.shape == (8, 2 * 96, 160)
        np.testing.assert_array_equal(gate_up.values, np.concatenate([w1, w3], axis=1))
        np.testing.assert_array_equal(down.values, w2)
    for name, weight in open_folder(source).weights.items():
        if weight.is_draft:
            assert_same(stacked.pop(name), left.pop(name))
        elif weight.expert is None:
            path = weight.row.transformers
            assert path is not None
            theirs = path if weight.layer is None else f"model.layers.{weight.layer}.{path}"
            assert_same(stacked.pop(theirs), left.pop(name))
    assert not stacked
    assert not left


def test_experts_of_different_types_cannot_be_stacked(tiny: Path) -> None:
    checkpoint = open_folder(tiny)
    name = "layers.2.ffn.experts.1.w2.weight"
    odd_one = checkpoint.weights[name]._replace(encoding=Encoding.F32)
    checkpoint = replace(checkpoint, weights={**checkpoint.weights, name: odd_one})
    with pytest.raises(InventoryError, match=rf"tensor {name}: cannot be stacked with layers\.2\.ffn\.experts\.0"):
        dequantized_tensors(checkpoint, "bf16", "transformers")


@pytest.mark.parametrize(
    "out",
    ["source", "source/inside", "source/../source", ".", "link"],
    ids=["same", "inside", "same-by-dots", "around", "same-by-link"],
)
def test_an_output_that_overlaps_the_source_is_refused(
    out: str, editable: Callable[..., Editable], tmp_path: Path
) -> None:
    source = editable().folder
    (tmp_path / "link").symlink_to(source)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in source.iterdir())
    with pytest.raises(UsageError, match="lies inside the"):
        dequantize(source, tmp_path / out, overwrite=True)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in source.iterdir()) == before


@pytest.mark.parametrize("suffix", [".partial", ".replaced"])
def test_a_source_under_a_temporary_name_of_the_output_is_refused(
    suffix: str, editable: Callable[..., Editable], tmp_path: Path
) -> None:
    source = editable().folder.rename(tmp_path / f"out{suffix}")
    with pytest.raises(UsageError, match="the source lies inside the output"):
        dequantize(source, tmp_path / "out", overwrite=True)


def test_a_source_whose_files_are_links_into_the_output_is_refused(
    editable: Callable[..., Editable], tmp_path: Path
) -> None:
    source = editable().folder
    (tmp_path / "blobs").mkdir()
    for path in list(source.glob("*.safetensors")):
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(tmp_path / "blobs" / path.name)
    with pytest.raises(UsageError, match="the source lies inside the output"):
        dequantize(source, tmp_path / "blobs", overwrite=True)
    dequantize(source, tmp_path / "out")


def test_an_output_with_content_needs_overwrite(tiny: Path, tmp_path: Path) -> None:
    dequantize(tiny, tmp_path / "out", dtype="f32")
    with pytest.raises(OutputExistsError, match="pass --overwrite"):
        dequantize(tiny, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"
    dequantize(tiny, tmp_path / "out", overwrite=True)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("options", [{"dtype": "fp8"}, {"names": "v3"}], ids=["dtype", "names"])
def test_unknown_choices_are_named(options: dict[str, str], tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(options))}: unknown: expected"):
        plan_dequantize(tiny, tmp_path / "out", **options)
