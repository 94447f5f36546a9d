"""Bytes that are right and a meaning that is wrong: refused, or counted and named, by every command that reads it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4convert.checkpoint.folder import open_folder
from dsv4convert.containers.gguf import open_gguf
from dsv4convert.containers.safetensors import read_header
from dsv4convert.errors import ConfigError
from dsv4convert.formats.not_finite import count_not_finite
from dsv4convert.model.config import parse_config
from tests.checkpoints import MakeCheckpoint
from tests.command_line import Result, run_cli
from tests.targets.folders import Editable

MakeEditable = Callable[..., Editable]
TABLE = "layers.0.ffn.gate.tid2eid"
BIAS = "layers.2.ffn.gate.bias"


def edit_bytes(folder: Path, name: str, change: Callable[[np.ndarray[Any, Any]], None], *, scale: bool = False) -> None:
    """Change the bytes of a weight, or of its scale, where they lie."""
    weight = open_folder(folder).weights[name]
    stored = weight.scale if scale else weight.stored
    assert stored is not None
    with stored.file.open("r+b") as file:
        file.seek(stored.offset)
        content = np.frombuffer(bytearray(file.read(stored.nbytes)), np.uint8)
        change(content)
        file.seek(stored.offset)
        file.write(content.tobytes())


def set_id(row: int, column: int, value: int) -> Callable[[np.ndarray[Any, Any]], None]:
    def change(content: np.ndarray[Any, Any]) -> None:
        content.view("<i8").reshape(-1, 3)[row, column] = value

    return change


def every_command(folder: Path, tmp_path: Path) -> dict[str, Result]:
    """Run every command that opens a checkpoint folder."""
    return {
        "hf-to-gguf": run_cli("hf-to-gguf", folder, tmp_path / "a.gguf", "--dry-run"),
        "shard": run_cli("shard", folder, tmp_path / "s", "--mp", "1", "--dry-run"),
        "dequantize": run_cli("dequantize", folder, tmp_path / "d", "--dry-run"),
        "repack": run_cli("repack", folder, tmp_path / "r", "--experts", "fp8", "--dry-run"),
        "forward": run_cli("forward", folder, "--tokens", "1,2"),
        "verify": run_cli("verify", folder, tmp_path),
    }


TABLES = {
    "id of an expert that is gone": (set_id(17, 1, 200), "row 17 names an expert that is not there", "got 200"),
    "negative": (set_id(0, 0, -1), "row 0 names an expert that is not there", "got -1"),
    "beyond 32 bits": (set_id(3, 1, 2**40), "row 3 names an expert that is not there", f"got {2**40}"),
    "all zero": (lambda content: content.fill(0), "row 0 names an expert twice", "[0, 0, 0]"),
    "one row twice": (
        lambda content: content.view("<i8").reshape(-1, 3)[41].fill(1),
        "row 41 names an expert twice",
        "[1, 1, 1]",
    ),
}


@pytest.mark.parametrize(("change", "what", "got"), TABLES.values(), ids=TABLES)
def test_a_routing_table_that_no_model_can_have_is_refused_by_every_command(
    change: Any, what: str, got: str, editable: MakeEditable, tmp_path: Path
) -> None:
    source = editable().folder
    edit_bytes(source, TABLE, change)
    for command, result in every_command(source, tmp_path).items():
        assert result.code == 7, command
        assert f"tensor {TABLE}: {what}" in result.error, command
        assert got in result.error, command
    described = run_cli("inspect", source)
    assert described.code == 0
    assert f"tensor {TABLE}: {what}" in described.out.replace("\n", " ")


def test_shards_with_such_a_table_are_refused_too(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    assert run_cli("shard", tiny, out, "--mp", "1", "--quiet").code == 0
    stored = read_header(out / "model0-mp1.safetensors")[TABLE]
    with stored.file.open("r+b") as file:
        file.seek(stored.offset)
        file.write(struct.pack("<2q", 1, 1))
    assert "row 0 names an expert twice" in run_cli("unshard", out, tmp_path / "u").error
    ran = run_cli("forward", out, "--tokens", "5,0")
    assert ran.code == 7
    assert f"tensor {TABLE}: row 0 names an expert twice" in ran.error
    assert run_cli("forward", out, "--tokens", "5,1").code == 0


@pytest.mark.parametrize("wrong", [200, -1])
def test_a_gguf_with_such_a_table_is_not_run(wrong: int, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    assert run_cli("hf-to-gguf", tiny, out, "--quiet").code == 0
    stored = open_gguf(out).tensors["blk.0.ffn_gate_tid2eid.weight"]
    with out.open("r+b") as file:
        file.seek(stored.offset + 3 * 4 * stored.shape[1])
        file.write(struct.pack("<i", wrong))
    for command in (["forward", out], ["compare", tiny, out]):
        ran = run_cli(*command, "--tokens", "5,3")
        assert ran.code == 7, ran.err
        assert f"tensor {TABLE}: row 3 names an expert that is not there" in ran.error
        assert f"got {wrong}" in ran.error


NAN_F32, INF_F32 = np.frombuffer(struct.pack("<2f", np.nan, np.inf), np.uint8).reshape(2, 4)


def non_finite_bias(content: np.ndarray[Any, Any]) -> None:
    content.reshape(-1, 4)[[0, 3]] = NAN_F32, INF_F32


def test_values_that_are_not_finite_are_counted_and_named(editable: MakeEditable, tmp_path: Path) -> None:
    source = editable().folder
    edit_bytes(source, BIAS, non_finite_bias)
    note = f"NaN or infinite values in 1 tensor: {BIAS} (2 of 8)"
    for command in ("hf-to-gguf", "dequantize"):
        found = json.loads(run_cli(command, source, tmp_path / "a.gguf", "--dry-run", "--json").out)
        assert note in found["notes"], command
        refused = run_cli(command, source, tmp_path / "a.gguf", "--dry-run", "--strict")
        assert (refused.code, note in refused.error) == (7, True), command
    assert note in json.loads(run_cli("inspect", source, "--json").out)["notes"]


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_not_finite_is_what_numpy_says(dtype: str) -> None:
    """All 65,536 values of two bytes, and as many of float32 with the same upper half."""
    high = np.arange(2**16, dtype=np.uint16)
    if dtype == "F16":
        content, values = high.tobytes(), high.view(np.float16)
    else:
        wide = high.astype(np.uint32) << 16 | (np.uint32(1) if dtype == "F32" else np.uint32(0))
        content, values = (wide.tobytes() if dtype == "F32" else high.tobytes()), wide.view(np.float32)
    found = count_not_finite(dtype, np.frombuffer(content, np.uint8), np.empty(len(content), np.uint8))
    assert found == np.count_nonzero(~np.isfinite(values))


def test_tensors_and_experts_of_nothing_but_zeros_are_counted_and_named(editable: MakeEditable, tmp_path: Path) -> None:
    source = editable().folder
    edit_bytes(source, "layers.1.attn_norm.weight", lambda content: content.fill(0))
    for matrix in ("w1", "w2", "w3"):
        for layer in (1, 2):
            edit_bytes(source, f"layers.{layer}.ffn.experts.5.{matrix}.weight", lambda content: content.fill(0))
    notes = json.loads(run_cli("shard", source, tmp_path / "s", "--mp", "1", "--dry-run", "--json").out)["notes"]
    assert "all bytes are zero in 1 tensor: layers.1.attn_norm.weight" in notes
    zero = "all bytes looked at are zero in 2 experts: layers.1.ffn.experts.5, layers.2.ffn.experts.5"
    assert zero in notes
    assert run_cli("shard", source, tmp_path / "s", "--mp", "1", "--strict").code == 7


ZERO_ONLY_INSIDE = ("layers.1.attn.wq_b.weight", "embed.weight", "layers.2.ffn.experts.5.w2.weight")
WHOLE: dict[str, list[str]] = {
    "hf-to-gguf": ["hf-to-gguf", "a.gguf"],
    "low-bit": ["hf-to-gguf", "b.gguf", "--experts", "q8_0", "--dense", "f16"],
    "shard": ["shard", "s", "--mp", "2"],
    "fp8 shards": ["shard", "f", "--mp", "2", "--experts", "fp8"],
    "dequantize": ["dequantize", "d"],
    "repack": ["repack", "r", "--experts", "fp8"],
}


@pytest.mark.parametrize("command", WHOLE.values(), ids=WHOLE)
def test_a_conversion_names_every_tensor_whose_every_byte_is_zero(
    command: list[str], editable: MakeEditable, tmp_path: Path
) -> None:
    """Scales among them, and tensors with one byte that is not zero not."""
    source = editable(mtp=False).folder
    for name in ZERO_ONLY_INSIDE:
        edit_bytes(source, name, lambda content: content.fill(0))
    edit_bytes(source, "layers.0.ffn.experts.1.w3.weight", lambda content: content.fill(0), scale=True)
    edit_bytes(source, "layers.0.attn.wq_b.weight", lambda content: content[:-1].fill(0))
    edit_bytes(source, "head.weight", lambda content: content[1:].fill(0))
    edit_bytes(source, "head.weight", lambda content: content.__setitem__(0, 1))
    for matrix in ("w1", "w2", "w3"):
        edit_bytes(source, f"layers.1.ffn.experts.5.{matrix}.weight", lambda content: content.fill(0))
    name, out, *options = command
    notes = json.loads(run_cli(name, source, tmp_path / out, "--json", *options).out)["notes"]
    zeros = sorted(note for note in notes if "zero" in note)
    assert zeros[0] == "all bytes are zero in 1 expert: layers.1.ffn.experts.5"
    assert zeros[1].startswith("all bytes are zero in 4 tensors: ")
    assert len(zeros) == 2
    report = zeros_of_check(source)
    assert sorted(report) == sorted([*ZERO_ONLY_INSIDE, "layers.0.ffn.experts.1.w3.scale", "layers.1.ffn.experts.5"])
    refused = run_cli(name, source, tmp_path / out, "--strict", "--overwrite", *options)
    assert refused.code == 7
    assert "all bytes" in refused.error


def zeros_of_check(source: Path) -> list[str]:
    """Return what ``check`` says is all zero."""
    findings = json.loads(run_cli("check", source, "--json").out)["findings"]
    return [name for finding in findings for name in finding["names"] if "all bytes are zero" in finding["what"]]


def test_zeros_inside_are_refused_before_an_output_appears(editable: MakeEditable, tmp_path: Path) -> None:
    """A large tensor, which no look at headers and small tensors finds."""
    source = editable().folder
    edit_bytes(source, "embed.weight", lambda content: content.fill(0))
    refused = run_cli("shard", source, tmp_path / "s", "--mp", "1", "--strict")
    assert (refused.code, "all bytes are zero in 1 tensor: embed.weight" in refused.error) == (7, True)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_a_preallocated_download_that_stopped_is_named(editable: MakeEditable, tmp_path: Path) -> None:
    source = editable().folder
    path = sorted(source.glob("*.safetensors"))[0]
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size * 2 // 3)
        file.truncate(size)
    notes = json.loads(run_cli("dequantize", source, tmp_path / "d", "--dry-run", "--json").out)["notes"]
    assert any(note.startswith(f"{path.name} ends in zero bytes, did its download stop?") for note in notes)


def test_many_files_that_end_in_zeros_are_one_note(tmp_path: Path) -> None:
    source = tmp_path / "m"
    run_cli("synth", source, "--headers-only", "--files", "6", "-q")
    notes = json.loads(run_cli("dequantize", source, tmp_path / "d", "--dry-run", "--json").out)["notes"]
    (tails,) = [note for note in notes if "in zero bytes" in note]
    first = sorted(source.glob("*.safetensors"))[0].name
    assert tails.startswith(f"6 files end in zero bytes, did a download stop? Where they begin: {first} at ")
    assert tails.endswith(" and 3 more")


def test_zeros_at_the_end_begin_in_the_tensor_that_holds_them(editable: MakeEditable, tmp_path: Path) -> None:
    """It may be one that nothing uses, here of a draft that is not whole: no sound tensor is blamed."""
    source = editable(files=1).folder
    path = source / "model.safetensors"
    stored = read_header(path)
    last = max(stored, key=lambda name: stored[name].offset)
    assert last.startswith("mtp.0.")
    begin = stored[last].offset
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(bytes(path.stat().st_size - begin))
    assert path.stat().st_size - begin >= 4096
    Rewritten(source).remove("mtp.0.ffn.gate.bias")
    notes = json.loads(run_cli("hf-to-gguf", source, tmp_path / "a.gguf", "--dry-run", "--json").out)["notes"]
    (tail,) = [note for note in notes if "ends in zero bytes" in note]
    assert tail.endswith(f"They begin in the last 1 tensor: {last}")


def test_a_sound_checkpoint_gives_no_such_note(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    for options in ({}, {"variant": "base"}, {"variant": "dspark"}, {"variant": "vision"}):
        source = make_checkpoint(**options)
        result = json.loads(run_cli("dequantize", source, tmp_path / "d", "--dry-run", "--json", "--strict").out)
        assert not [note for note in result["notes"] if "zero" in note or "NaN" in note], options


# config.json against itself


@pytest.fixture
def raw(tiny: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((tiny / "config.json").read_text())
    return document


YARN = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}
DISAGREEMENTS: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "format of scales": (
        {"scale_fmt": "float", "quantization_config": {"scale_fmt": "ue8m0"}},
        ("scale_fmt", "quantization_config.scale_fmt"),
    ),
    "rope factor": (
        {"rope_scaling": YARN, "rope_parameters": {"main": {}, "compress": {**YARN, "factor": 4}}},
        ("rope_scaling.factor", "rope_parameters.compress.factor"),
    ),
    "scaled or not": (
        {"rope_scaling": YARN, "rope_parameters": {"main": {}, "compress": {"type": "default"}}},
        ("rope_scaling", "rope_parameters.compress"),
    ),
    "rope theta": (
        {"rope_scaling": YARN, "rope_parameters": {"main": {"rope_theta": 5000}, "compress": dict(YARN)}},
        ("rope_theta", "rope_parameters.main.rope_theta"),
    ),
    "compressed theta": (
        {"rope_parameters": {"main": {}, "compress": {**YARN, "rope_theta": 5}}, "rope_scaling": YARN},
        ("compress_rope_theta", "rope_parameters.compress.rope_theta"),
    ),
    "a type": (
        {"rope_scaling": {**YARN, "rope_type": "default"}},
        ("rope_scaling.type", "rope_scaling.rope_type"),
    ),
    "hash layers": ({"mlp_layer_types": ["moe"] * 3}, ("num_hash_layers", "mlp_layer_types")),
    "experts": ({"num_local_experts": 7}, ("n_routed_experts", "num_local_experts")),
    "rotary width": ({"partial_rotary_factor": 0.03}, ("qk_rope_head_dim", "partial_rotary_factor")),
    "expert dtype": (
        {"expert_dtype": "fp4", "quantization_config": {"expert_dtype": "fp8"}},
        ("expert_dtype", "quantization_config.expert_dtype"),
    ),
    "dtype": ({"torch_dtype": "bfloat16", "dtype": "float16"}, ("torch_dtype", "dtype")),
}


@pytest.mark.parametrize(("change", "keys"), DISAGREEMENTS.values(), ids=DISAGREEMENTS)
def test_two_keys_that_state_one_fact_agree_or_are_both_named(
    raw: dict[str, Any], change: dict[str, Any], keys: tuple[str, str]
) -> None:
    with pytest.raises(ConfigError, match="disagree") as caught:
        parse_config(raw | change, "config.json")
    for key in keys:
        assert key in str(caught.value)


def test_layer_types_and_rates_are_held_against_the_ratios(raw: dict[str, Any]) -> None:
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    types = [kinds[ratio] for ratio in raw["compress_ratios"][: raw["num_hidden_layers"]]]
    rates = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
    agreeing = raw | {"layer_types": types, "compress_rates": rates, "compress_rate_csa": 4}
    assert parse_config(agreeing, "here") == parse_config(raw, "here")
    wrong = raw | {"layer_types": [*types[:-1], "sliding_attention" if types[-1] != "sliding_attention" else kinds[4]]}
    with pytest.raises(ConfigError, match=r"compress_ratios\[\d+\] and layer_types\[\d+\] disagree"):
        parse_config(wrong, "here")
    with pytest.raises(ConfigError, match=r"compress_rates\.compressed_sparse_attention.*expected 4, got 8"):
        parse_config(raw | {"compress_rates": {**rates, "compressed_sparse_attention": 8}}, "here")


def test_a_ratio_of_one_is_no_compression_and_drafts_need_no_entry(raw: dict[str, Any]) -> None:
    layers = raw["num_hidden_layers"]
    ratios = [ratio or 1 for ratio in raw["compress_ratios"][:layers]]
    assert parse_config(raw | {"compress_ratios": ratios}, "here") == parse_config(raw, "here")
    both = raw | {"compress_ratios": ratios, "compress_rates": ratios}
    assert parse_config(both, "here") == parse_config(raw, "here")


def test_outputs_state_ratios_as_published(editable: MakeEditable, tmp_path: Path) -> None:
    """The published code compresses wherever the ratio is not 0, and looks up an entry for each draft layer."""
    source = editable()
    raw = json.loads((source.folder / "config.json").read_text())
    layers = raw["num_hidden_layers"]
    source.edit_config(compress_ratios=[ratio or 1 for ratio in raw["compress_ratios"][:layers]])
    for command in (["dequantize"], ["shard", "--mp", "1"], ["repack", "--experts", "fp8"]):
        out = tmp_path / command[0]
        assert run_cli(command[0], source.folder, out, "--quiet", *command[1:]).code == 0
        assert json.loads((out / "config.json").read_text())["compress_ratios"] == raw["compress_ratios"]
        assert run_cli("verify", source.folder, out).code == 0
    gguf = tmp_path / "a.gguf"
    assert run_cli("hf-to-gguf", source.folder, gguf, "--quiet").code == 0
    assert run_cli("verify", source.folder, gguf).code == 0


# config.json against the tensors


def test_draft_keys_without_a_draft_are_noted_and_left_out_of_outputs(editable: MakeEditable, tmp_path: Path) -> None:
    source = editable(mtp=False)
    source.edit_config(num_nextn_predict_layers=1, dspark_block_size=4)
    for command in (["dequantize"], ["shard", "--mp", "1"], ["repack", "--experts", "fp8"]):
        out = tmp_path / command[0]
        result = run_cli(command[0], source.folder, out, "--json", *command[1:])
        assert any("speaks of draft layers and no tensor is of one" in note for note in json.loads(result.out)["notes"])
        config = json.loads((out / "config.json").read_text())
        assert config["num_nextn_predict_layers"] == 0
        assert not [key for key in config if key.startswith("dspark_")]
        assert run_cli("verify", source.folder, out).code == 0
    assert "speaks of draft layers" in run_cli("inspect", source.folder).out.replace("\n", " ")


@pytest.mark.parametrize("said", [0, 3])
@pytest.mark.parametrize("more_ratios", [0, 2], ids=["ratios as the tensors", "ratios as the config"])
def test_another_number_of_mtp_layers_is_noted_and_put_right(
    said: int, more_ratios: int, editable: MakeEditable, tmp_path: Path
) -> None:
    source = editable()
    ratios = json.loads((source.folder / "config.json").read_text())["compress_ratios"]
    source.edit_config(num_nextn_predict_layers=said, compress_ratios=ratios + [0] * more_ratios)
    note = f"key num_nextn_predict_layers says {said}, there is 1: taken as such"
    for command in (["dequantize"], ["shard", "--mp", "1"], ["repack", "--experts", "fp8"], ["mend", "--reindex"]):
        out = tmp_path / command[0]
        result = run_cli(command[0], source.folder, out, "--json", *command[1:])
        assert any(note in found for found in json.loads(result.out)["notes"])
        config = json.loads((out / "config.json").read_text())
        assert (config["num_nextn_predict_layers"], config["compress_ratios"]) == (1, ratios)
        assert run_cli("verify", source.folder, out).code == 0
    for command in ("check", "inspect"):
        assert note in " ".join(run_cli(command, source.folder).out.split())
    out = tmp_path / "gguf"
    out.mkdir()
    assert run_cli("hf-to-gguf", source.folder, out, "--draft", "split", "--quiet").code == 0
    (path,) = out.glob("mtp-*.gguf")
    metadata = open_gguf(path).metadata
    assert metadata["deepseek4.nextn_predict_layers"] == 1
    assert metadata["deepseek4.block_count"] == len(ratios)
    assert list(metadata["deepseek4.attention.compress_ratios"]) == ratios
    for path in out.glob("*.gguf"):
        assert run_cli("verify", source.folder, path).code == 0


def test_a_config_that_says_nothing_of_mtp_layers_keeps_its_ratios(editable: MakeEditable, tmp_path: Path) -> None:
    source = editable()
    path = source.folder / "config.json"
    raw = json.loads(path.read_text())
    del raw["num_nextn_predict_layers"]
    raw["compress_ratios"] += [0, 0]
    path.write_text(json.dumps(raw))
    for command in (["dequantize"], ["shard", "--mp", "2"], ["repack", "--experts", "fp8"]):
        out = tmp_path / command[0]
        assert run_cli(command[0], source.folder, out, "--quiet", *command[1:]).code == 0
        config = json.loads((out / "config.json").read_text())
        assert "num_nextn_predict_layers" not in config
        assert config["compress_ratios"] == raw["compress_ratios"]
        assert run_cli("verify", source.folder, out).code == 0
    gguf = tmp_path / "a.gguf"
    assert run_cli("hf-to-gguf", source.folder, gguf, "--draft", "only", "--quiet").code == 0
    assert open_gguf(gguf).metadata["deepseek4.nextn_predict_layers"] == 1
    assert run_cli("verify", source.folder, gguf).code == 0


@pytest.mark.parametrize("place", ["top", "quantization_config"])
def test_expert_dtype_is_what_is_stored(editable: MakeEditable, tmp_path: Path, place: str) -> None:
    source = editable()
    raw = json.loads((source.folder / "config.json").read_text())
    inner = raw.get("quantization_config", {})
    if place == "top":
        source.edit_config(expert_dtype="fp8")
    else:
        del raw["expert_dtype"]
        raw["quantization_config"] = inner | {"expert_dtype": "fp8"}
        (source.folder / "config.json").write_text(json.dumps(raw))
    out = tmp_path / "s"
    notes = json.loads(run_cli("shard", source.folder, out, "--mp", "1", "--json").out)["notes"]
    assert any("says 'fp8', the experts are fp4" in note for note in notes)
    config = json.loads((out / "config.json").read_text())
    assert (config if place == "top" else config["quantization_config"])["expert_dtype"] == "fp4"
    assert run_cli("verify", source.folder, out).code == 0


def test_a_draft_that_nobody_asks_for_does_not_block_the_trunk(editable: MakeEditable, tmp_path: Path) -> None:
    source = editable().folder
    index = source / "model.safetensors.index.json"
    name = "mtp.0.ffn.gate.bias"
    lacking = Rewritten(source)
    lacking.remove(name)
    assert index.is_file()
    assert f"tensor {name} is missing" in run_cli("shard", source, tmp_path / "s", "--mp", "1").error
    for command in (["hf-to-gguf", "a.gguf"], ["shard", "s", "--mp", "1", "--draft", "drop"]):
        out = tmp_path / command[1]
        result = run_cli(command[0], source, out, "--json", *command[2:])
        assert result.code == 0, result.err
        said = json.loads(result.out)
        assert any(name in entry["reason"] for entry in said["dropped"])
        assert any("the draft's tensors are not used" in note for note in said["notes"])
        assert not any("no tensor is of one" in note for note in said["notes"])
        assert run_cli("verify", source, out).code == 0
    for command in (["forward", source, "--tokens", "1,2"], ["compare", source, source, "--tokens", "1,2"]):
        assert run_cli(*command).code == 0, command
    assert f"tensor {name} is missing" in run_cli("estimate", source).error
    assert run_cli("estimate", source, "--draft", "drop").code == 0


class Rewritten:
    """A folder whose files can lose a tensor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def remove(self, name: str) -> None:
        """Take a tensor out of its file and of the index."""
        path, index_path = self.folder / "model.safetensors", self.folder / "model.safetensors.index.json"
        if index_path.is_file():
            index = json.loads(index_path.read_text())
            path = self.folder / index["weight_map"].pop(name)
            index_path.write_text(json.dumps(index))
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header, payload = json.loads(content[8 : 8 + length]), content[8 + length :]
        begin, end = header.pop(name)["data_offsets"]
        for entry in header.values():
            if "data_offsets" in entry and entry["data_offsets"][0] >= end:
                entry["data_offsets"] = [offset - (end - begin) for offset in entry["data_offsets"]]
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + payload[:begin] + payload[end:])


def test_foreign_verification_names_the_key_that_differs(editable: MakeEditable, tmp_path: Path) -> None:
    source = editable().folder
    out = tmp_path / "d"
    assert run_cli("dequantize", source, out, "--quiet").code == 0
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"index_topk": config["index_topk"] + 1}))
    error = run_cli("verify", source, out, "--foreign").error
    assert f"key index_topk: expected {config['index_topk']}, got {config['index_topk'] + 1}" in error


def test_v4_pro_with_dspark_is_0813(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("pro", headers_only=True, variant="dspark")
    assert json.loads(run_cli("inspect", folder, "--json").out)["variant"] == "V4-Pro-0813"


COPIED = {
    "bf16": ("embed.weight", lambda content: content.view("<u2").__setitem__(slice(5, 8), 0x7FC0), False, 3),
    "f32": ("layers.0.hc_attn_fn", lambda content: content.view("<u4").__setitem__(7, 0xFF800000), False, 1),
    "e4m3": ("layers.1.attn.wq_b.weight", lambda content: content.__setitem__(-1, 0xFF), False, 1),
    "e4m3 in columns": ("layers.1.attn.wo_b.weight", lambda content: content.__setitem__(0, 0x7F), False, 1),
    "e8m0": ("layers.1.ffn.experts.3.w2.weight", lambda content: content.__setitem__(slice(0, 2), 0xFF), True, 2),
}


@pytest.mark.parametrize(("name", "change", "scale", "count"), COPIED.values(), ids=COPIED)
def test_copied_values_that_are_not_finite_are_counted_too(
    name: str, change: Any, scale: bool, count: int, editable: MakeEditable, tmp_path: Path
) -> None:
    source = editable().folder
    edit_bytes(source, name, change, scale=scale)
    out = name.removesuffix(".weight") + ".scale" if scale else name
    for mp in (1, 2):
        result = json.loads(run_cli("shard", source, tmp_path / f"s{mp}", "--mp", str(mp), "--json").out)
        holders = mp if name.endswith("hc_attn_fn") else 1  # every rank has the whole tensor
        assert [(entry["tensor"], entry["nan"]) for entry in result["counted"]] == [(out, count)] * holders
    refused = run_cli("shard", source, tmp_path / "strict", "--mp", "1", "--strict")
    assert refused.code == 7
    assert "NaN or infinite" in refused.error
    assert out in refused.error
    assert not (tmp_path / "strict").exists()


ON_EACH_RANK = {
    "bf16": (
        "layers.1.attn_norm.weight",
        lambda content: content.view("<u2").__setitem__(slice(5, 8), 0x7FC0),
        False,
        3,
    ),
    "f32": ("layers.0.hc_attn_fn", lambda content: content.view("<u4").__setitem__(7, 0xFF800000), False, 1),
    "e4m3": ("layers.1.attn.wkv.weight", lambda content: content.__setitem__(-1, 0xFF), False, 1),
    "e8m0": ("layers.1.attn.wkv.weight", lambda content: content.__setitem__(0, 0xFF), True, 1),
}


@pytest.mark.parametrize(("name", "change", "scale", "count"), ON_EACH_RANK.values(), ids=ON_EACH_RANK)
def test_unshard_counts_what_is_not_finite_in_tensors_that_each_rank_has_whole(
    name: str, change: Any, scale: bool, count: int, editable: MakeEditable, tmp_path: Path
) -> None:
    source, shards = editable().folder, tmp_path / "shards"
    edit_bytes(source, name, change, scale=scale)
    assert run_cli("shard", source, shards, "--mp", "2", "--quiet").code == 0
    result = json.loads(run_cli("unshard", shards, tmp_path / "back", "--json").out)
    out = name.removesuffix(".weight") + ".scale" if scale else name
    assert [(entry["tensor"], entry["nan"]) for entry in result["counted"]] == [(out, count)]
    assert run_cli("unshard", shards, tmp_path / "strict", "--strict").code == 7


@pytest.mark.parametrize("variant", [None, "base"], ids=["E8M0", "F32"])
def test_mlx_counts_scales_of_blocks_that_are_nan(variant: str | None, editable: MakeEditable, tmp_path: Path) -> None:
    source, width = editable(variant=variant).folder, 4 if variant else 1
    nan = NAN_F32 if variant else 0xFF
    edit_bytes(source, "layers.1.attn.wkv.weight", lambda content: content.__setitem__(slice(width), nan), scale=True)
    result = json.loads(run_cli("mlx", source, tmp_path / "mlx", "--json").out)
    scales = "language_model.model.layers.1.attn.wkv.scales"
    rows, groups = 128, 4  # of the output, which one block's scale is spread over
    assert [(entry["tensor"], entry["nan"]) for entry in result["counted"]] == [(scales, rows * groups)]
    assert run_cli("mlx", source, tmp_path / "strict", "--strict").code == 7


def test_halves_of_rows_that_only_move_are_counted(editable: MakeEditable, tmp_path: Path) -> None:
    source, floats = editable().folder, tmp_path / "floats"
    assert run_cli("dequantize", source, floats, "--quiet").code == 0
    for name, at in (("mtp.0.e_proj.weight", 0), ("mtp.0.h_proj.weight", -1)):
        edit_bytes(floats, name, lambda content, at=at: content.view("<u2").__setitem__(at, 0xFF80))  # type: ignore[misc]
    command = ("hf-to-gguf", floats, tmp_path / "a.gguf", "--draft", "only", "--dense", "bf16")
    result = json.loads(run_cli(*command, "--json").out)
    joined = "blk.4.nextn.eh_proj.weight"
    assert [(entry["tensor"], entry["nan"]) for entry in result["counted"]] == [(joined, 2)]
    assert run_cli(*command, "--overwrite", "--strict").code == 7
