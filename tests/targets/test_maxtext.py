"""``maxtext``: every leaf of a checkpoint for MaxText against its source, and the files that MaxText and Orbax read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import dsv4convert
from dsv4convert.containers.orbax import ZarrArray, read_array
from dsv4convert.engine.manifest import check_manifest
from dsv4convert.errors import DeviceError, FileFormatError, LossyError, OutputExistsError, UnsupportedError, UsageError
from dsv4convert.targets import maxtext as target
from dsv4convert.targets.maxtext import plan_maxtext
from dsv4convert.verification import orbax_read_back

from ..checkpoints import MakeCheckpoint
from ..command_line import run_cli
from ..engine.plans import check_resumed
from ..oracles.plain_folders import Array, exact_values, read_folder
from ..oracles.zarr3 import read_leaves

RATIOS = [0, 4, 128, 4, 128, 4]  # two pairs of layers that MaxText scans
ITEMS = Path("0", "items")


@pytest.fixture
def source(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("tiny", ratios=RATIOS)


def values(source: Path, name: str) -> Array:
    raw = read_folder(source)
    return exact_values(raw[name], raw.get(name.removesuffix("weight") + "scale"))


def test_kernels_are_transposed_and_experts_stacked(source: Path, tmp_path: Path) -> None:
    dsv4convert.convert_maxtext(source, tmp_path / "out", strict=True)
    leaves = read_leaves(tmp_path / "out")
    layer = "params.params.decoder.layers_3"
    wq_b = values(source, "layers.3.attn.wq_b.weight")
    found = leaves[f"{layer}.self_attention.wq_b.kernel"]
    assert np.array_equal(found.astype(np.float64), wq_b.reshape(8, 128, 96).transpose(2, 0, 1))
    wo_a = values(source, "layers.3.attn.wo_a.weight")
    found = leaves[f"{layer}.self_attention.o_a_proj.kernel"]
    assert np.array_equal(found.astype(np.float64), wo_a.reshape(4, 128, 256).transpose(0, 2, 1))
    w2 = np.stack([values(source, f"layers.3.ffn.experts.{expert}.w2.weight").T for expert in range(8)])
    assert np.array_equal(leaves[f"{layer}.mlp.MoeBlock_0.wo"].astype(np.float64), w2)
    base = values(source, "layers.3.hc_ffn_base")
    assert np.array_equal(leaves[f"{layer}.mhc_mlp.res_beta"], base[8:].reshape(4, 4))
    assert np.array_equal(leaves[f"{layer}.mhc_attention.mhc_norm.scale"].astype(float), np.ones(4 * 160))


@pytest.mark.parametrize("inside", ["", "0", "0/items"])
@pytest.mark.parametrize("command", ["inspect", "check", "dequantize"])
def test_a_checkpoint_given_as_a_source_is_told_for_what_it_is(
    command: str, inside: str, source: Path, tmp_path: Path
) -> None:
    dsv4convert.convert_maxtext(source, tmp_path / "out")
    given = tmp_path / "out" / inside
    done = run_cli(command, given, *([tmp_path / "other"] if command == "dequantize" else []))
    assert done.code == UnsupportedError.exit_code
    assert f"error: {given}: an Orbax checkpoint, as of maxtext: " in done.err
    assert "start from the folder that it was made of" in done.err


def test_scanned_layers_are_stacked_on_the_second_axis(source: Path, tmp_path: Path) -> None:
    dsv4convert.convert_maxtext(source, tmp_path / "out", scan=True)
    leaves = read_leaves(tmp_path / "out")
    block = "decoder.scanned_blocks.layers_1"
    norms = np.stack([values(source, f"layers.{layer}.attn_norm.weight") for layer in (3, 5)], axis=1)
    found = leaves[f"params.params.{block}.pre_self_attention_layer_norm.scale"]
    assert np.array_equal(found.astype(np.float64), norms)
    stack = [
        [values(source, f"layers.{layer}.ffn.experts.{expert}.w1.weight").T for layer in (3, 5)] for expert in range(8)
    ]
    assert np.array_equal(leaves[f"params.params.{block}.mlp.MoeBlock_0.wi_0"].astype(np.float64), np.array(stack))
    biases = np.stack([values(source, f"layers.{layer}.ffn.gate.bias") for layer in (3, 5)])
    assert np.array_equal(leaves[f"params.MoEBiasVar.{block}.mlp.MoeBlock_0.gate.bias"], biases)
    table = read_folder(source)["layers.1.ffn.gate.tid2eid"].values.view(np.int64)
    assert np.array_equal(leaves["params.Tid2EidVar.decoder.layers_1.mlp.MoeBlock_0.tid2eid"], table)


def test_large_matrices_are_cut_into_chunks(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dsv4convert.convert_maxtext(source, tmp_path / "whole", scan=True)
    monkeypatch.setattr(target, "CHUNK_BYTES", 5000)
    dsv4convert.convert_maxtext(source, tmp_path / "cut", scan=True)
    whole, cut = read_leaves(tmp_path / "whole"), read_leaves(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(np.array_equal(leaf, cut[name]) for name, leaf in whole.items())
    embedding = tmp_path / "cut" / ITEMS / "params.params.token_embedder.embedding" / "zarr.json"
    assert json.loads(embedding.read_text())["codecs"][0]["configuration"]["chunk_shape"] == [8, 160]
    assert not dsv4convert.verify(source, tmp_path / "cut").problems


def test_rows_that_no_good_number_divides_stay_whole() -> None:
    assert target._rows_of_a_chunk((1009, 1024 * 1024), 2) == 1009
    assert target._rows_of_a_chunk((129280, 4096), 2) == 8080
    assert target._rows_of_a_chunk((2048, 4096), 2) == 2048


CASES = {
    "bf16": ({}, {}),
    "f32, scanned": ({}, {"dtype": "f32", "scan": True}),
    "FP8 experts and F32 scales": ({"variant": "base"}, {"scan": True}),
    "a tower and a draft": ({"variant": "vision"}, {}),
    "no draft": ({"mtp": False}, {"scan": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_verify_finds_every_element_right(case: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    made, options = CASES[case]
    source = make_checkpoint("tiny", **made)
    summary = dsv4convert.convert_maxtext(source, tmp_path / "out", **options)
    report = dsv4convert.verify(source, tmp_path / "out")
    assert not report.problems, report.problems
    assert report.layout == "MaxText checkpoint"
    ones = len(list((tmp_path / "out" / ITEMS).glob("*.mhc_norm.scale")))
    assert report.verdicts() == {"exact": summary.tensors - ones}
    assert check_manifest(tmp_path / "out").ok


def test_floats_are_rounded_as_asked_and_strict_refuses_that(source: Path, tmp_path: Path) -> None:
    dsv4convert.dequantize(source, tmp_path / "f32", dtype="f32", draft="drop")
    dsv4convert.convert_maxtext(tmp_path / "f32", tmp_path / "exact", strict=True)  # its values came from few bits
    assert not dsv4convert.verify(tmp_path / "f32", tmp_path / "exact").verdicts()["rounded"]
    path = tmp_path / "f32" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-4:] = np.float32(1.0000001).tobytes()
    path.write_bytes(raw)
    with pytest.raises(LossyError, match="not exact"):
        dsv4convert.convert_maxtext(tmp_path / "f32", tmp_path / "strict", strict=True)
    dsv4convert.convert_maxtext(tmp_path / "f32", tmp_path / "rounded")
    report = dsv4convert.verify(tmp_path / "f32", tmp_path / "rounded")
    assert not report.problems
    assert report.verdicts()["rounded"] == 1


def test_the_parameters_are_those_of_the_config(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("tiny", overrides={"rms_norm_eps": 1e-6, "rope_theta": 12345, "rope_scaling": None})
    summary = dsv4convert.convert_maxtext(source, tmp_path / "out", scan=True)
    assert not any("YaRN" in note for note in summary.notes)
    run = yaml.safe_load((tmp_path / "out" / "maxtext.yml").read_text())
    assert run == {"base_config": "base.yml", "model_name": "deepseek4-284b", "scan_layers": True}
    model = yaml.safe_load((tmp_path / "out" / "models" / "deepseek4-284b.yml").read_text())
    assert model["normalization_layer_epsilon"] == 1e-6
    assert (model["rope_max_timescale"], model["compress_ratios"]) == (12345, [0, 4, 128, 4])
    assert (model["base_emb_dim"], model["num_experts"], model["first_num_hash_layers"]) == (160, 8, 2)
    assert model["routed_score_func"] == "sqrtsoftplus"


def test_what_maxtext_cannot_have_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"MaxText has no model of DeepSeek-V4\.1"):
        dsv4convert.convert_maxtext(make_checkpoint("v41-tiny"), tmp_path / "out")
    with pytest.raises(UnsupportedError, match=r"--scan: MaxText scans pairs.*leave out --scan"):
        dsv4convert.convert_maxtext(make_checkpoint("tiny", ratios=[0, 4, 128, 4, 128]), tmp_path / "out", scan=True)
    with pytest.raises(UsageError, match="--dtype"):
        dsv4convert.convert_maxtext(make_checkpoint("tiny"), tmp_path / "out", dtype="f16")
    assert not (tmp_path / "out").exists()


def test_check_without_orbax_is_refused_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> Any:
        raise DeviceError("no Orbax")

    monkeypatch.setattr(orbax_read_back, "import_orbax", absent)
    with pytest.raises(DeviceError):
        dsv4convert.convert_maxtext(source, tmp_path / "out", check=True)
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_is_left_out_and_lists_no_leaves(source: Path, tmp_path: Path) -> None:
    done = run_cli("maxtext", source, tmp_path / "out")
    assert "left out mtp.*: 87 tensors" in done.out
    assert "MaxText's model has no such module" in done.out
    assert "note: MaxText 0.2.5 ignores rope_scaling (YaRN)" in done.out
    assert sum("wrote" in line for line in done.out.splitlines()) < 15
    planned = json.loads(run_cli("maxtext", source, tmp_path / "planned", "--dry-run", "--json").out)
    sizes = {Path(file["path"]).relative_to(tmp_path / "planned"): file["bytes"] for file in planned["files"]}
    assert sizes == {
        path.relative_to(tmp_path / "out"): path.stat().st_size
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }


def test_an_interrupted_run_goes_on_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    whole, cut = (plan_maxtext(source, tmp_path / name / "out", scan=True) for name in ("whole", "cut"))
    check_resumed(whole, cut, 40)
    assert not dsv4convert.verify(source, cut.destination).problems


def test_an_older_checkpoint_is_replaced_and_a_strangers_file_in_it_kept(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dsv4convert.convert_maxtext(source, out)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        dsv4convert.convert_maxtext(source, out, scan=True)
    dsv4convert.convert_maxtext(source, out, scan=True, overwrite=True)
    assert not dsv4convert.verify(source, out).problems
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.manifest.json"]
    dsv4convert.dequantize(source, out, overwrite=True)
    assert not (out / "0").exists()
    dsv4convert.convert_maxtext(source, out, overwrite=True)
    stranger = out / ITEMS / "params.params.decoder.decoder_norm.scale" / "notes.txt"
    stranger.write_text("mine")
    with pytest.raises(OutputExistsError, match=r"decoder_norm\.scale/notes\.txt, which no conversion wrote"):
        dsv4convert.convert_maxtext(source, out, scan=True, overwrite=True)
    assert stranger.read_text() == "mine"
    (mismatch,) = check_manifest(out).mismatches
    assert str(mismatch) == f"{stranger.relative_to(out)}: is not in the manifest"


EXPERTS = "params.params.decoder.layers_3.mlp.MoeBlock_0.wi_0"
KERNEL = "params.params.decoder.layers_3.self_attention.wq_a.kernel"


def flip(name: str, place: int) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        (path,) = (path for path in (out / ITEMS / name).iterdir() if path.name != "zarr.json")
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)

    return damage


def change(name: str, before: str, after: str) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        text = (out / name).read_text()
        assert before in text
        (out / name).write_text(text.replace(before, after, 1))

    return damage


def cut_otherwise(out: Path) -> None:
    """Say that the chunks of experts are cut along another axis: as many and as large, so that their index stays."""
    path = out / ITEMS / EXPERTS / "zarr.json"
    array = read_array(path)
    experts, inner = array.shape[0], array.order[1]
    chunk = [*array.shape]
    chunk[inner] //= experts
    other = array._replace(chunk=tuple(chunk))
    assert array.chunk[0] == 1
    assert other.chunk_index() == array.chunk_index()
    path.write_text(json.dumps(other.document()))


def remove(out: Path) -> None:
    for path in (out / ITEMS / KERNEL).iterdir():
        path.unlink()
    (out / ITEMS / KERNEL).rmdir()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit of the last expert": (flip(EXPERTS, -1), EXPERTS),
    "a bit of a kernel": (flip(KERNEL, 16), KERNEL),
    "a bit of an index": (flip(EXPERTS, 0), "the index of its chunks is wrong"),
    "a bit of the ones": (flip("params.params.decoder.layers_0.mhc_mlp.mhc_norm.scale", -1), "expected ones"),
    "a bit of a table": (flip("params.Tid2EidVar.decoder.layers_0.mlp.MoeBlock_0.tid2eid", 16), "tid2eid"),
    "a shape": (change(f"0/items/{KERNEL}/zarr.json", "[160, 96]", "[96, 160]"), KERNEL),
    "an order of axes": (change(f"0/items/{KERNEL}/zarr.json", "[1, 0]", "[0, 1]"), KERNEL),
    "chunks along another axis": (cut_otherwise, "one behind the other"),
    "a compressed array": (change(f"0/items/{KERNEL}/zarr.json", '"bytes"', '"zstd"'), "not an array"),
    "a missing leaf": (remove, "not in the output"),
    "the tree": (change("0/items/_METADATA", '"key": "wq_a"', '"key": "wq_b"'), "_METADATA"),
    "OCDBT": (change("0/items/_METADATA", '"use_ocdbt": false', '"use_ocdbt": true'), "use_ocdbt"),
    "sharding": (change("0/items/_sharding", "cpu:0", "cpu:1"), "_sharding"),
    "the step": (change("0/_CHECKPOINT_METADATA", "items", "state"), "_CHECKPOINT_METADATA"),
    "a parameter": (change("models/deepseek4-284b.yml", "q_lora_rank: 96", "q_lora_rank: 95"), "q_lora_rank"),
    "scanning": (change("maxtext.yml", "scan_layers: false", "scan_layers: true"), "scan_layers"),
    "the tokenizer": (change("tokenizer.json", "{", " {"), "tokenizer.json"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a source and its finished output."""
    folder = tmp_path_factory.mktemp("finished")
    assert run_cli("synth", folder / "source").code == 0
    dsv4convert.convert_maxtext(folder / "source", folder / "out")
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_finds_damage(damage: str, finished: Path, tmp_path: Path) -> None:
    source, manifest = finished / "source", "out.manifest.json"
    shutil.copytree(finished / "out", tmp_path / "out")
    shutil.copy(finished / manifest, tmp_path / manifest)
    harm, named = DAMAGE[damage]
    harm(tmp_path / "out")
    problems = [str(problem) for problem in dsv4convert.verify(source, tmp_path / "out").problems]
    assert problems
    assert any(named in problem for problem in problems), problems
    assert not check_manifest(tmp_path / "out").ok


def test_an_array_of_another_form_is_no_array(tmp_path: Path) -> None:
    array = ZarrArray((4, 6), "float32", (1, 0), (2, 6))
    path = tmp_path / "zarr.json"
    path.write_text(json.dumps(array.document()))
    assert read_array(path) == array
    for key, value in (("shape", []), ("shape", [4, 7]), ("data_type", "float8"), ("codecs", []), ("shape", "46")):
        path.write_text(json.dumps({**array.document(), key: value}))
        with pytest.raises(FileFormatError, match="not an array as dsv4convert writes them"):
            read_array(path)
