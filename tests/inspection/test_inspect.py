"""``inspect``: what it says of every kind of folder and file, and that it goes on where something is wrong."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import dsv4convert
from dsv4convert.containers.imatrix import imatrix_file
from dsv4convert.containers.json_object import schema_path
from dsv4convert.containers.safetensors import Stored, read_header
from dsv4convert.engine.conversion import execute
from dsv4convert.errors import FileFormatError, InputMissingError, UsageError, escape_control
from dsv4convert.inspection.describe import inspect_path
from dsv4convert.inspection.description import Description
from dsv4convert.inspection.naming import family_of
from dsv4convert.targets.dequantize import plan_dequantize
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions
from dsv4convert.targets.repack import plan_repack
from dsv4convert.targets.shard_tensors import ShardOptions
from dsv4convert.targets.shards import plan_shards

from ..checkpoints import MakeCheckpoint
from ..command_line import run_cli
from ..oracles.gguf_bytes import Info, RawGguf, text
from ..oracles.safetensors_bytes import RawSafetensors, RawTensor

TINY_LAYERS = [
    {"number": 0, "attention": "sliding", "routing": "hash"},
    {"number": 1, "attention": "CSA", "routing": "hash"},
    {"number": 2, "attention": "HCA", "routing": "learned"},
    {"number": 3, "attention": "CSA", "routing": "learned"},
]


def check_schema(found: Description) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps(found.as_json()))
    schema = json.loads(schema_path("inspect.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(document)
    return document


def encoding(found: Description, family: str) -> set[tuple[str, str | None, tuple[int, int] | None]]:
    return {(use.encoding, use.scale, use.block) for use in found.encodings if use.family == family}


@pytest.fixture(scope="module")
def gguf(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that makes a GGUF of the tiny checkpoint. Treat it as read-only."""
    made: dict[str, Path] = {}

    def make(**options: Any) -> Path:
        if repr(options) not in made:
            plan = plan_gguf(tiny, tmp_path_factory.mktemp("gguf") / "x.gguf", GgufOptions(**options))
            execute(plan, threads=1)
            made[repr(options)] = plan.final_paths()[0]
        return made[repr(options)]

    return make


# Checkpoint folders


def test_the_groups_of_nvfp4_are_those_of_the_file(tiny: Path, tmp_path: Path) -> None:
    assert run_cli("repack", tiny, tmp_path / "out", "--experts", "nvfp4").code == 0
    found = inspect_path(tmp_path / "out")
    assert encoding(found, "routed experts") == {("fp4", "F8_E4M3", (1, 16)), ("fp4", "F8_E8M0", (1, 32))}


def test_a_checkpoint_is_described(tiny: Path) -> None:
    found = inspect_path(tiny)
    document = check_schema(found)
    assert document["kind"] == "checkpoint folder"
    assert document["variant"] == "custom"
    assert document["traits"] == ["MTP draft", "fp4 experts, F8_E8M0 scales"]
    assert document["layers"] == TINY_LAYERS
    assert (document["draft"], document["draft_layers"]) == ("MTP", 1)
    assert document["unexpected"] == []
    assert encoding(found, "routed experts") == {("fp4", "F8_E8M0", (1, 32))}
    assert encoding(found, "shared experts") == {("fp8", "F8_E8M0", (128, 128))}
    assert encoding(found, "norms") == {("bf16", None, None)}
    sizes = [path.stat().st_size for path in tiny.glob("*.safetensors")]
    assert found.bytes < sum(sizes) < found.bytes + 100_000
    assert sum(count.bytes for count in found.families.values()) == found.bytes
    assert sum(count.tensors for count in found.dtypes.values()) == found.tensors
    assert found.config["hidden_size"] == 160


PUBLISHED = {
    "flash": ("flash", None, "V4-Flash", "MTP", 69_187, 159_609_485_896),
    "flash_base": ("flash", "base", "V4-Flash-Base", "MTP", None, 292_555_345_480),
    "flash_dspark": ("flash", "dspark", "V4-Flash-0731", "DSpark", 72_317, 166_878_536_440),
    "flash_vision": ("flash", "vision", "V4-Flash Vision-Exp", "DSpark", None, None),
    "pro": ("pro", None, "V4-Pro", "MTP", 145_116, 864_704_792_696),
}


@pytest.mark.parametrize(
    ("preset", "variant", "name", "draft", "tensors", "nbytes"), PUBLISHED.values(), ids=PUBLISHED.keys()
)
def test_published_models_are_recognised_whatever_the_folder_is_called(
    preset: str,
    variant: str | None,
    name: str,
    draft: str,
    tensors: int | None,
    nbytes: int | None,
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "V4-Something-Else"
    folder.symlink_to(make_checkpoint(preset, headers_only=True, variant=variant), target_is_directory=True)
    # The system's part is not ours: on a disk it makes pages for all that is read of files without content.
    started = os.times().user
    found = inspect_path(folder)
    assert os.times().user - started < 15
    assert found.variant == name
    assert found.draft == draft
    assert found.draft_layers == (3 if draft == "DSpark" else 1)
    assert found.unexpected == []
    assert tensors in (None, found.tensors)
    # Base's published size does not count its MTP layer.
    draft_bytes = found.families["draft"].bytes if variant == "base" else 0
    assert nbytes in (None, found.bytes, found.bytes - draft_bytes)


def test_flash_layers_are_told_in_a_few_lines(make_checkpoint: MakeCheckpoint) -> None:
    lines = run_cli("inspect", make_checkpoint("flash", headers_only=True, variant=None)).out.splitlines()
    start = lines.index("layers  attention  routing  count")
    assert lines[start + 1 : start + 6] == [
        "0-1     sliding    hash         2",
        "2       CSA        hash         1",
        "3-41/2  HCA        learned     20",
        "4-42/2  CSA        learned     20",
        "",
    ]
    assert "46 files, 69,187 tensors, 159,609,485,896 bytes, 290,944,616,402 elements" in lines
    assert "routed experts      66,048   147 GB  33,792 fp4, F8_E8M0 scale per 1x32" in lines
    assert "attention              473  4.60 GB  215 fp8, F8_E8M0 scale per 128x128" in lines
    assert "                                     43 f32" in lines
    assert "I8        33,792   142 GB" in lines
    assert lines[-1] == "nothing unexpected"


def test_a_slice_says_of_what(make_checkpoint: MakeCheckpoint) -> None:
    assert inspect_path(make_checkpoint("flash", headers_only=True, layers=4)).variant == "slice of V4-Flash"


def test_base_is_told_by_its_scales(make_checkpoint: MakeCheckpoint) -> None:
    found = inspect_path(make_checkpoint("tiny", variant="base"))
    assert encoding(found, "routed experts") == {("fp8", "F32", (128, 128))}
    assert "fp8 experts, F32 scales" in found.traits


def test_dequantized_and_repacked_folders_are_described(tiny: Path, tmp_path: Path) -> None:
    execute(plan_repack(tiny, tmp_path / "fp8"), threads=1)
    found = inspect_path(tmp_path / "fp8")
    assert encoding(found, "routed experts") == {("fp8", "F8_E8M0", (128, 128))}
    execute(plan_dequantize(tiny, tmp_path / "bf16", names="transformers"), threads=1)
    found = inspect_path(tmp_path / "bf16")
    assert encoding(found, "routed experts") == {("bf16", None, None)}
    assert found.unexpected == []
    assert [layer._asdict() for layer in found.layers] == TINY_LAYERS


def editable(tiny: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny, tmp_path / "copy")


def edit(folder: Path, change: Callable[[dict[str, RawTensor]], None]) -> None:
    """Change the tensors of a folder, which become those of one file without an index."""
    tensors: dict[str, RawTensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= RawSafetensors.read(path).tensors
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    RawSafetensors(tensors, {"format": "pt"}).write(folder / "model.safetensors")


FAULTS: dict[str, tuple[Callable[[dict[str, RawTensor]], Any], str]] = {
    "missing": (lambda t: t.pop("layers.1.attn.attn_sink"), "tensor layers.1.attn.attn_sink is missing"),
    "unknown": (
        lambda t: t.update({"layers.0.attn.wq.weight": t["norm.weight"]}),
        "tensor layers.0.attn.wq.weight: unknown",
    ),
    "scale_missing": (lambda t: t.pop("layers.0.attn.wq_a.scale"), "tensor layers.0.attn.wq_a.scale is missing"),
    "scale_left": (lambda t: t.pop("layers.0.attn.wq_a.weight"), "tensor layers.0.attn.wq_a.scale: unknown"),
    "wrong_shape": (
        lambda t: setattr(t["embed.weight"], "shape", [160, 512]),
        "tensor embed.weight: wrong shape: expected [512, 160], got [160, 512]",
    ),
    "wrong_dtype": (lambda t: setattr(t["norm.weight"], "dtype", "I16"), "tensor norm.weight: unknown encoding"),
}


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_what_is_wrong_is_listed_and_the_rest_described(
    change: Callable[[dict[str, RawTensor]], Any], message: str, tiny: Path, tmp_path: Path
) -> None:
    folder = editable(tiny, tmp_path)
    edit(folder, change)
    found = inspect_path(folder)
    check_schema(found)
    assert any(message in line for line in found.unexpected), found.unexpected
    assert [layer._asdict() for layer in found.layers] == TINY_LAYERS
    assert escape_control(f"unexpected: {found.unexpected[0]}") in run_cli("inspect", folder).out.splitlines()


def test_a_file_that_is_missing_is_named_and_the_others_described(tiny: Path, tmp_path: Path) -> None:
    folder = editable(tiny, tmp_path)
    gone = min(folder.glob("*.safetensors"))
    gone.unlink()
    found = inspect_path(folder)
    assert gone.name in found.unexpected[0]
    assert found.tensors > 0
    assert any("missing" in line for line in found.unexpected[1:])


def test_a_folder_without_config_is_counted(tiny: Path, tmp_path: Path) -> None:
    folder = editable(tiny, tmp_path)
    (folder / "config.json").unlink()
    found = inspect_path(folder)
    check_schema(found)
    assert "config.json is missing" in found.unexpected[0]
    assert found.families["routed experts"].tensors > 0
    assert found.draft == "MTP"


def test_a_bad_config_key_is_named_and_the_tensors_counted(tiny: Path, tmp_path: Path) -> None:
    folder = editable(tiny, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"o_groups": 3}))
    found = inspect_path(folder)
    assert "o_groups" in found.unexpected[0]
    assert found.tensors == inspect_path(tiny).tensors


def test_a_v4_folder_that_is_called_v4_1_lacks_its_keys(tiny: Path, tmp_path: Path) -> None:
    folder = editable(tiny, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["DeepseekV41ForCausalLM"]}))
    assert "kv_source_layer_ids" in inspect_path(folder).unexpected[0]


def test_a_header_that_cannot_be_read_is_an_error(tiny: Path, tmp_path: Path) -> None:
    folder = editable(tiny, tmp_path)
    path = min(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FileFormatError, match="header longer than the file"):
        inspect_path(folder)


def test_names_from_files_cannot_drive_the_terminal(tiny: Path, tmp_path: Path) -> None:
    folder = editable(tiny, tmp_path)
    edit(folder, lambda tensors: tensors.update({"a\x1b[31m\nb": tensors["norm.weight"]}))
    output = run_cli("inspect", folder).out
    assert "\x1b" not in output
    assert "a\\x1b[31m\\nb" in output


# GGUF


def test_a_gguf_is_described(gguf: Callable[..., Path]) -> None:
    found = inspect_path(gguf())
    document = check_schema(found)
    assert document["kind"] == "GGUF"
    assert document["traits"] == ["architecture deepseek4", "mxfp4 experts"]
    assert document["layers"] == TINY_LAYERS
    assert document["draft"] == "none"
    assert document["unexpected"] == []
    assert encoding(found, "routed experts") == {("mxfp4", None, None)}
    assert encoding(found, "shared experts") == {("q8_0", None, None)}
    assert found.config["num_hidden_layers"] == 4


@pytest.mark.parametrize(
    ("options", "draft", "trait"),
    [
        ({"split_max_bytes": 1_000_000}, "none", "architecture deepseek4"),
        ({"draft": "only"}, "MTP", "MTP draft"),
        ({"dialect": "deepseek-v4"}, "MTP", "architecture deepseek-v4"),
        ({"experts": "f32"}, "none", "f32 experts"),
    ],
    ids=["split", "mtp", "port", "f32"],
)
def test_other_ggufs_are_described(options: dict[str, Any], draft: str, trait: str, gguf: Callable[..., Path]) -> None:
    found = inspect_path(gguf(**options))
    check_schema(found)
    assert found.unexpected == []
    assert found.draft == draft
    assert trait in found.traits
    assert [layer._asdict() for layer in found.layers] == TINY_LAYERS


def test_drafts_and_towers_of_their_own_are_described(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("tiny", variant="vision")
    plan = plan_gguf(source, tmp_path / "x.gguf", GgufOptions(draft="split", mmproj="split"))
    execute(plan, threads=1)
    found = {path.name: inspect_path(path) for path in plan.final_paths()}
    assert [description.unexpected for description in found.values()] == [[], [], []]
    assert found["dspark-x.gguf"].draft == "DSpark"
    assert found["dspark-x.gguf"].draft_layers == 3
    assert set(found["mmproj-x.gguf"].families) == {"vision"}


GGUF_FAULTS: dict[str, tuple[Callable[[RawGguf], Any], str]] = {
    "missing": (
        lambda raw: raw.infos.remove(raw.info("blk.2.exp_probs_b.bias")),
        "tensor blk.2.exp_probs_b.bias is missing",
    ),
    "unknown": (
        lambda raw: raw.infos.append(Info("blk.0.attn_x.weight", (32,), 0, bytes(128))),
        "tensor blk.0.attn_x.weight: unknown to the deepseek4 layout",
    ),
    "block_count": (
        lambda raw: setattr(raw.key("deepseek4.block_count"), "value", struct.pack("<I", 3)),
        "block 3: beyond block_count 3",
    ),
    "huge_block_count": (
        lambda raw: setattr(raw.key("deepseek4.block_count"), "value", struct.pack("<I", 2**32 - 1)),
        "compress_ratios: expected at least 4294967295 entries, got 5",
    ),
    "ratio": (
        lambda raw: setattr(
            raw.key("deepseek4.attention.compress_ratios"), "value", struct.pack("<IQ5i", 5, 5, 0, 4, 64, 4, 0)
        ),
        "layer 2 has the unknown ratio 64",
    ),
    "number_as_text": (
        lambda raw: (
            setattr(raw.key("deepseek4.expert_count"), "kind", 8),
            setattr(raw.key("deepseek4.expert_count"), "value", text("8")),
        ),
        "key deepseek4.expert_count: no integer",
    ),
}


@pytest.mark.parametrize(("change", "message"), GGUF_FAULTS.values(), ids=GGUF_FAULTS.keys())
def test_what_is_wrong_in_a_gguf_is_listed(
    change: Callable[[RawGguf], Any], message: str, gguf: Callable[..., Path], tmp_path: Path
) -> None:
    raw = RawGguf.read(gguf())
    change(raw)
    raw.write(tmp_path / "x.gguf")
    found = inspect_path(tmp_path / "x.gguf")
    check_schema(found)
    assert any(message in line for line in found.unexpected), found.unexpected


def test_another_model_is_counted_and_said_to_be_none_of_ours(tmp_path: Path) -> None:
    RawGguf([], [Info("a.weight", (32, 2), 8, bytes(68))]).write(tmp_path / "x.gguf")
    found = inspect_path(tmp_path / "x.gguf")
    check_schema(found)
    assert (found.tensors, found.bytes) == (1, 68)
    assert "no DeepSeek-V4 model" in found.notes[0]


def test_an_importance_matrix_is_said_to_be_one(tmp_path: Path) -> None:
    layout = imatrix_file({"a.weight": (2, 32)}, datasets=["text.txt"], chunks=1, chunk_size=512)
    path = tmp_path / "imatrix.gguf"
    path.write_bytes(layout.header + bytes(layout.nbytes - len(layout.header)))
    found = inspect_path(path)
    check_schema(found)
    assert found.notes == [
        "an importance matrix of 1 tensor, from 1 chunk of text.txt: hf-to-gguf takes it as --imatrix"
    ]


# Shards


def test_shards_are_described(tiny: Path, tmp_path: Path) -> None:
    execute(plan_shards(tiny, tmp_path / "shards", ShardOptions(mp=2)).plan, threads=1)
    found = inspect_path(tmp_path / "shards")
    document = check_schema(found)
    assert document["kind"] == "model-parallel shards"
    assert (document["ranks"], document["files"]) == (2, 2)
    assert document["layers"] == TINY_LAYERS
    assert document["unexpected"] == []
    assert encoding(found, "routed experts") == {("fp4", "F8_E8M0", (1, 32))}
    assert "2 ranks" in run_cli("inspect", tmp_path / "shards").out.splitlines()[1]
    assert found.elements == inspect_path(tiny).elements


def test_a_missing_rank_is_listed(tiny: Path, tmp_path: Path) -> None:
    execute(plan_shards(tiny, tmp_path / "shards", ShardOptions(mp=2)).plan, threads=1)
    (tmp_path / "shards" / "model0-mp2.safetensors").unlink()
    found = inspect_path(tmp_path / "shards")
    assert "model0-mp2.safetensors" in found.unexpected[0]
    assert found.tensors > 0


# Nothing of the kind, and the command line


def test_other_paths_are_one_line(tmp_path: Path, gguf: Callable[..., Path]) -> None:
    with pytest.raises(InputMissingError, match="no such file or folder"):
        inspect_path(tmp_path / "nowhere")
    with pytest.raises(InputMissingError, match="no safetensors files"):
        inspect_path(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputMissingError, match="neither a checkpoint folder nor a GGUF"):
        inspect_path(tmp_path / "notes.txt")
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(gguf(), tmp_path / name)
    with pytest.raises(UsageError, match="several GGUF models"):
        inspect_path(tmp_path)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dsv4convert", "inspect", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_prints_lines_or_json(tiny: Path) -> None:
    done = run(tiny)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].startswith(f"{tiny}: checkpoint folder, custom")
    document = json.loads(run(tiny, "--json").stdout)
    assert document == check_schema(inspect_path(tiny))


def test_the_command_fails_in_one_line(tmp_path: Path) -> None:
    done = run(tmp_path / "nowhere")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("embed.weight", "embedding"),
        ("head.weight", "head"),
        ("norm.weight", "norms"),
        ("hc_head_fn", "hyper-connections"),
        ("layers.0.hc_attn_base", "hyper-connections"),
        ("layers.0.attn_norm.weight", "norms"),
        ("layers.0.attn.q_norm.weight", "norms"),
        ("layers.0.attn.compressor.norm.weight", "compressor"),
        ("layers.0.attn.indexer.compressor.wkv.weight", "indexer"),
        ("layers.0.attn.wq_a.scale", "attention"),
        ("layers.0.ffn.gate.tid2eid", "router"),
        ("layers.0.ffn.experts.7.w1.scale", "routed experts"),
        ("layers.0.ffn.shared_experts.w2.weight", "shared experts"),
        ("mtp.2.markov_head.markov_w1.weight", "draft"),
        ("image_pad", "vision"),
        ("something.else", "other"),
    ],
)
def test_families(name: str, family: str) -> None:
    assert family_of(name) == family


@pytest.mark.parametrize("preset", ["tiny", "v41-tiny"])
@pytest.mark.parametrize("dense", ["mxfp8", "affine8", "bf16"])
def test_a_folder_in_mlxs_layout_has_nothing_unexpected(
    preset: str, dense: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint(preset)
    dsv4convert.convert_mlx(source, tmp_path / "mlx", dense=dense)
    found, original = inspect_path(tmp_path / "mlx"), inspect_path(source)
    assert found.kind == "MLX folder"
    assert found.unexpected == []
    assert found.variant == original.variant
    assert found.layers == original.layers
    assert found.bytes == sum(stored.nbytes for stored in read_header(tmp_path / "mlx/model.safetensors").values())
    encodings = {use.encoding for use in found.encodings}
    assert {"mxfp4", dense} <= encodings
    assert {use.block for use in found.encodings if use.encoding == "mxfp4"} == {(1, 32)}


def test_what_an_mlx_folder_lacks_or_has_too_much_is_listed(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "mlx"
    dsv4convert.convert_mlx(tiny, out)
    path = out / "model.safetensors"
    raw = RawSafetensors.read(path)
    stem = "language_model.model.layers.1"
    del raw.tensors[f"{stem}.attn_norm.weight"], raw.tensors[f"{stem}.attn.wq_a.scales"]
    raw.tensors[f"{stem}.odd"] = raw.tensors.pop(f"{stem}.ffn_norm.weight")
    raw.write(path)
    assert sorted(inspect_path(out).unexpected) == [
        f"tensor {stem}.attn.wq_a.scales is missing, the scales of words",
        f"tensor {stem}.attn_norm.weight is missing",
        f"tensor {stem}.ffn_norm.weight is missing",
        f"tensor {stem}.odd: unknown to the MLX layout",
    ]


@pytest.mark.parametrize("is_mlx", [False, True], ids=["published", "mlx"])
def test_the_header_of_a_file_is_read_once_for_names_and_shapes(
    is_mlx: bool, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_mlx:
        dsv4convert.convert_mlx(tiny, tmp_path / "mlx")
    read: list[Path] = []

    def noted(path: Path) -> dict[str, Stored]:
        read.append(path)
        return read_header(path)

    monkeypatch.setattr("dsv4convert.checkpoint.folder.read_header", noted)
    assert inspect_path(tmp_path / "mlx" if is_mlx else tiny).unexpected == []
    assert len(read) == len(set(read)) > 0
