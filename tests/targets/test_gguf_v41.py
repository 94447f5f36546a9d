"""``hf-to-gguf`` of V4.1: equal to the recorded conversion, n-gram tables in every encoding, drafts and towers."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType
from safetensors import deserialize

from dsv4convert.checkpoint.engram import read_engram_constants
from dsv4convert.engine.conversion import Summary, execute
from dsv4convert.errors import ConfigError, InventoryError, UsageError
from dsv4convert.formats.base import Scratch, Tally
from dsv4convert.formats.mxfp4 import f32_to_mxfp4
from dsv4convert.model.config import load_config
from dsv4convert.synth.write import write_synth
from dsv4convert.targets.engram_tables import ENGRAM_TYPES
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions
from dsv4convert.targets.segments import RowSegments

from ..v41 import TINY, recorded

PRE = "joyai-llm"

# Keys that the recorded conversion, which leaves roles to be told by tensors and prompts to others, does not have.
OUR_KEYS = {
    "deepseek41.attention.kv_source_layers",
    "deepseek41.attention.index_source_layers",
    "deepseek41.attention.indexer.candidate_source_layer",
    "deepseek41.attention.indexer.candidate_topk_blocks",
    "deepseek41.attention.indexer.candidate_block_size",
    "tokenizer.chat_template",
}


def convert(source: Path, out: Path, **options: Any) -> Summary:
    return execute(plan_gguf(source, out, GgufOptions(**options), tokenizer_pre=PRE))


def digest(data: npt.NDArray[Any]) -> str:
    return hashlib.sha256(data.tobytes()).hexdigest()[:32]


def source_tensor(folder: Path, name: str) -> npt.NDArray[np.uint8]:
    """Return the stored bytes of a tensor as a matrix."""
    file = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    entry = next(entry for found, entry in deserialize((folder / file).read_bytes()) if found == name)
    return np.frombuffer(entry["data"], np.uint8).reshape(entry["shape"][0], -1)


def table(folder: Path, layer: int) -> npt.NDArray[np.float32]:
    """Return an n-gram table in float32: each code times the scale of its 32 columns."""
    codes = source_tensor(folder, f"layers.{layer}.engram.embed.weight").view(ml_dtypes.float8_e4m3fn)
    scales = source_tensor(folder, f"layers.{layer}.engram.embed.scale").view(ml_dtypes.float8_e8m0fnu)
    return codes.astype(np.float32) * np.repeat(scales.astype(np.float32), 32, axis=1)


@pytest.fixture(scope="module", params=sorted(TINY))
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, gguf.GGUFReader]:
    out = tmp_path_factory.mktemp("gguf") / "m.gguf"
    convert(TINY[request.param], out)
    return request.param, gguf.GGUFReader(out)


def test_tensors_are_those_of_the_recorded_conversion(converted: tuple[str, gguf.GGUFReader]) -> None:
    name, file = converted
    want = recorded(f"{name}.expected.json")["gguf"]
    found = {t.name: [t.tensor_type.name, [int(n) for n in t.shape], digest(t.data)] for t in file.tensors}
    assert found.keys() == want.keys()
    tables = {key for key in want if "engram_embd" in key}
    assert len(tables) == 2
    assert {key: found[key] for key in found.keys() - tables} == {key: want[key] for key in want.keys() - tables}
    assert {key: found[key][:2] for key in tables} == {key: want[key][:2] for key in tables}


def test_tables_are_dequantised_where_the_recorded_ones_lack_their_scales(
    converted: tuple[str, gguf.GGUFReader],
) -> None:
    name, file = converted
    want = recorded(f"{name}.expected.json")["gguf"]
    for tensor in file.tensors:
        if "engram_embd" not in tensor.name:
            continue
        layer = int(tensor.name.split(".")[1])
        values = table(TINY[name], layer)
        assert np.array_equal(tensor.data, gguf.quants.quantize(values, GGMLQuantizationType.Q8_0))
        # The recorded bytes are the codes alone: a table that any reader would take for 2^5 to 2^9 times too large.
        codes = source_tensor(TINY[name], f"layers.{layer}.engram.embed.weight").view(ml_dtypes.float8_e4m3fn)
        unscaled = gguf.quants.quantize(codes.astype(np.float32), GGMLQuantizationType.Q8_0)
        assert digest(unscaled) == want[tensor.name][2]


def test_keys_are_those_of_the_recorded_conversion_and_the_roles(converted: tuple[str, gguf.GGUFReader]) -> None:
    name, file = converted
    want = recorded(f"{name}.expected.json")["gguf_keys"]
    found = {
        key: [[kind.name for kind in field.types], field.contents()]
        for key, field in file.fields.items()
        if not key.startswith("GGUF.")
    }
    assert {key: found.get(key) for key in want} == want
    assert found.keys() - want.keys() == OUR_KEYS
    config = load_config(TINY[name])
    assert found["deepseek41.attention.kv_source_layers"][1] == list(config.kv_source_layer_ids)
    assert found["deepseek41.attention.index_source_layers"][1] == list(config.index_source_layer_ids)


@pytest.mark.parametrize("kind", ENGRAM_TYPES)
def test_every_encoding_of_the_tables(kind: str, tmp_path: Path) -> None:
    source = TINY["tiny-a"]
    convert(source, tmp_path / "m.gguf", engram=kind)
    file = gguf.GGUFReader(tmp_path / "m.gguf")
    tensors = {t.name: t for t in file.tensors}
    encoding = file.fields.get("deepseek41.engram.encoding")
    for layer in (0, 2):
        found = tensors[f"blk.{layer}.engram_embd.weight"]
        codes = source_tensor(source, f"layers.{layer}.engram.embed.weight")
        scales = source_tensor(source, f"layers.{layer}.engram.embed.scale")
        if kind == "i8-row264":
            assert encoding is not None
            assert encoding.contents() == "e4m3_e8m0_32_row33"  # rows of 32 codes and one scale
            assert found.tensor_type is GGMLQuantizationType.I8
            assert np.array_equal(found.data.view(np.uint8), np.concatenate([codes, scales], axis=1))
        elif kind == "i8-split":
            assert encoding is not None
            assert encoding.contents() == "e4m3_e8m0_32_split"
            assert np.array_equal(found.data.view(np.uint8), codes)
            assert np.array_equal(tensors[f"blk.{layer}.engram_embd_scale.weight"].data.view(np.uint8), scales)
        else:
            assert encoding is None
            assert found.tensor_type.name == kind.upper()
            values = table(source, layer)
            if kind == "mxfp4":  # the package's own rule for exponents is another than ours
                want = np.empty((len(values), values.shape[1] // 32 * 17), np.uint8)
                f32_to_mxfp4(values, want, Scratch(), Tally())
            else:
                want = gguf.quants.quantize(values, found.tensor_type)
            assert np.array_equal(found.data, want)


def test_published_rows_are_264_bytes_and_the_key_says_so(tmp_path: Path) -> None:
    write_synth(tmp_path / "s", "v41-tiny", overrides={"engram_head_dim": 256})
    convert(tmp_path / "s", tmp_path / "m.gguf", engram="i8-row264")
    file = gguf.GGUFReader(tmp_path / "m.gguf")
    assert file.fields["deepseek41.engram.encoding"].contents() == "e4m3_e8m0_32_row264"
    assert [int(t.shape[0]) for t in file.tensors if "engram_embd" in t.name] == [264, 264]


def test_mxfp4_tables_are_counted_as_rounded(tmp_path: Path) -> None:
    summary = convert(TINY["tiny-a"], tmp_path / "m.gguf", engram="mxfp4")
    assert {report.name for report in summary.report.flagged} == {
        "blk.0.engram_embd.weight",
        "blk.2.engram_embd.weight",
    }
    assert summary.report.tally.changed


def test_tables_come_last_when_asked_and_lie_alone_in_a_split(tmp_path: Path) -> None:
    plan = plan_gguf(TINY["tiny-b"], tmp_path / "m.gguf", GgufOptions(engram_last=True), tokenizer_pre=PRE)
    names = [tensor.name for tensor in plan.files[0].tensors]
    assert names[-2:] == ["blk.1.engram_embd.weight", "blk.5.engram_embd.weight"]
    for last, limit in ((False, "split_max_bytes"), (True, "split_max_bytes"), (True, "split_max_tensors")):
        options = GgufOptions(engram_last=last, **{limit: 10**9})
        plan = plan_gguf(TINY["tiny-b"], tmp_path / "m.gguf", options, tokenizer_pre=PRE)
        alone = [
            [t.name for t in file.tensors] for file in plan.files if any("engram_embd" in t.name for t in file.tensors)
        ]
        assert alone == [["blk.1.engram_embd.weight"], ["blk.5.engram_embd.weight"]]
        assert len(plan.files) == (3 if last else 5)


@pytest.mark.parametrize(("part", "byte", "counted"), [("weight", 0x7F, 1), ("scale", 0xFF, 1)])
@pytest.mark.parametrize("kind", ["i8-row264", "i8-split"])
def test_nan_in_a_lossless_table_is_counted(tmp_path: Path, kind: str, part: str, byte: int, counted: int) -> None:
    shutil.copytree(TINY["tiny-a"], tmp_path / "s")
    name = f"layers.0.engram.embed.{part}"
    file = json.loads((tmp_path / "s" / "model.safetensors.index.json").read_text())["weight_map"][name]
    path = tmp_path / "s" / file
    data = bytearray(path.read_bytes())
    header = int.from_bytes(data[:8], "little")
    begin = json.loads(data[8 : 8 + header])[name]["data_offsets"][0]
    data[8 + header + begin] = byte
    path.chmod(0o644)
    path.write_bytes(data)
    assert convert(tmp_path / "s", tmp_path / "m.gguf", engram=kind).report.tally.nan == counted


def test_a_table_is_many_segments(tmp_path: Path) -> None:
    write_synth(tmp_path / "s", "v41-flash", headers_only=True)
    plan = plan_gguf(tmp_path / "s", tmp_path / "m.gguf", GgufOptions(engram="i8-row264"))
    tables = [tensor for tensor in plan.files[0].tensors if "engram_embd" in tensor.name]
    assert [tensor.shape for tensor in tables] == [(384006168, 264), (384016682, 264)]
    for tensor in tables:
        assert isinstance(tensor.segments, RowSegments)
        assert len(tensor.segments) > 1000
        assert sum(segment.nbytes for segment in tensor.segments) == tensor.nbytes == tensor.shape[0] * 264
        first, second, last = tensor.segments[0], tensor.segments[1], tensor.segments[-1]
        assert second.operands[0].offset - first.operands[0].offset == first.rows * 256
        assert second.operands[1].offset - first.operands[1].offset == first.rows * 8
        whole = tensor.shape[0]
        assert last.operands[0].offset + last.rows * 256 == first.operands[0].offset + whole * 256


def test_the_full_inventory_has_the_reported_tensors_and_bytes(tmp_path: Path) -> None:
    write_synth(tmp_path / "s", "v41-flash", headers_only=True)
    plan = plan_gguf(tmp_path / "s", tmp_path / "m.gguf", GgufOptions())
    assert plan.n_tensors == 1046
    assert sum(tensor.nbytes for tensor in plan.files[0].tensors) == 507_948_390_368


def test_a_slice_keeps_the_constants_of_its_layers(tmp_path: Path) -> None:
    convert(TINY["tiny-a"], tmp_path / "m.gguf", layers=(1, 4))
    file = gguf.GGUFReader(tmp_path / "m.gguf")
    whole = read_engram_constants(TINY["tiny-a"], load_config(TINY["tiny-a"]))
    found = {key.removeprefix("deepseek41.engram."): field.contents() for key, field in file.fields.items()}
    assert found["layer_ids"] == [1]  # layer 2 of the whole model
    assert found["multipliers"] == list(whole.multipliers[1])
    assert found["primes"] == list(whole.primes[1])
    assert file.fields["deepseek41.attention.kv_source_layers"].contents() == [0, 2]
    with pytest.raises(UsageError, match="expected a range such as 1-4, got 2-4"):
        convert(TINY["tiny-a"], tmp_path / "n.gguf", layers=(2, 4))


def test_draft_and_tower_have_files_of_their_own(tmp_path: Path) -> None:
    plan = plan_gguf(TINY["tiny-a"], tmp_path / "m.gguf", GgufOptions(draft="split", mmproj="split"), tokenizer_pre=PRE)
    execute(plan)
    assert [path.name for path in plan.final_paths()] == ["m.gguf", "dspark-m.gguf", "mmproj-m.gguf"]
    draft = gguf.GGUFReader(tmp_path / "dspark-m.gguf")
    keys = {key: field.contents() for key, field in draft.fields.items()}
    assert keys["general.architecture"] == "dflash"
    assert keys["dflash.target_model_architecture"] == "deepseek41"
    assert keys["dflash.target_layers"] == [3, 4, 5]  # the inputs of these layers
    assert (keys["dflash.expert_count"], keys["dflash.expert_used_count"], keys["dflash.block_count"]) == (4, 2, 3)
    tensors = {t.name: t for t in draft.tensors}
    assert [int(n) for n in tensors["blk.2.ffn_gate_exps.weight"].shape] == [128, 64, 4]
    assert {"fc.weight", "enc.output_norm.weight", "markov_w1.weight", "markov_w2.weight", "conf_proj.weight"} < set(
        tensors
    )
    assert not any("output_hc" in name or "engram" in name or "_vl" in name for name in tensors)
    tower = gguf.GGUFReader(tmp_path / "mmproj-m.gguf")
    keys = {key: field.contents() for key, field in tower.fields.items()}
    assert keys["clip.projector_type"] == "deepseek41v"
    assert keys["clip.vision.block_count"] == 2
    assert len(tower.tensors) == len([n for n in tensor_names(TINY["tiny-a"]) if is_tower(n)]) + 2  # w1 is gate and up


def tensor_names(folder: Path) -> list[str]:
    return list(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])


def is_tower(name: str) -> bool:
    return name.startswith(("vision.", "aligner.", "image_"))


def test_dialects_and_types_of_others_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--dialect deepseek-v4 is not for DeepSeek-V4\.1"):
        convert(TINY["tiny-a"], tmp_path / "m.gguf", dialect="deepseek-v4")
    with pytest.raises(UsageError, match="--engram: unknown"):
        convert(TINY["tiny-a"], tmp_path / "m.gguf", engram="q4_0")


def test_a_tokenizer_whose_map_has_another_size_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(TINY["tiny-a"], tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["engram_compressed_vocab_size"] = 370
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="token map has another size: expected 371, got 370"):
        convert(folder, tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("options", "option"), [({"engram": "bf16"}, "--engram"), ({"engram_last": True}, "--engram-last")]
)
def test_tables_of_a_model_without_any_are_refused(
    tiny: Path, tmp_path: Path, options: dict[str, Any], option: str
) -> None:
    with pytest.raises(UsageError, match=f"{option}: the model has no n-gram tables"):
        plan_gguf(tiny, tmp_path / "m.gguf", GgufOptions(**options))


def test_options_are_part_of_the_plan() -> None:
    options = replace(GgufOptions(), engram="i8-split", engram_last=True)
    plan = plan_gguf(TINY["tiny-a"], Path("m.gguf"), options, tokenizer_pre=PRE)
    assert (plan.options["engram"], plan.options["engram_last"]) == ("i8-split", True)


def test_a_lossless_encoding_wants_the_published_table(tmp_path: Path) -> None:
    from dsv4convert.checkpoint.folder import open_folder
    from dsv4convert.targets.engram_tables import table_tensors

    weight = open_folder(TINY["tiny-a"]).weights["layers.0.engram.embed.weight"]
    with pytest.raises(InventoryError, match="i8-row264 holds FP8 tables as they were published"):
        table_tensors("t.weight", weight._replace(block=(2, 32)), "i8-row264")
