"""Layouts that are known and not read: one line names each, with what to do. And those that are read all the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4convert.checkpoint.layouts import LAYOUTS
from tests.checkpoints import MakeCheckpoint
from tests.command_line import run_cli
from tests.oracles.safetensors_bytes import RawSafetensors
from tests.targets.folders import Editable

MakeEditable = Callable[..., Editable]
INDEX = "model.safetensors.index.json"


def config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; None takes one out."""
    path = folder / "config.json"
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def rename(folder: Path, new_name: Callable[[str], str | None]) -> None:
    """Give tensors other names in files and index; None takes one out."""
    for path in folder.glob("*.safetensors"):
        raw = RawSafetensors.read(path)
        kept = {new: tensor for name, tensor in raw.tensors.items() if (new := new_name(name)) is not None}
        RawSafetensors(kept, raw.metadata).write(path)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {
        new: file for name, file in index["weight_map"].items() if (new := new_name(name)) is not None
    }
    (folder / INDEX).write_text(json.dumps(index))


def first_file(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def only(folder: Path, **contents: str) -> None:
    """Leave nothing of a folder but config.json, and some other files."""
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    for name, content in contents.items():
        (folder / name.replace("__", ".")).write_text(content)


def hub(folder: Path) -> None:
    """Make the folder what the hub's cache has: snapshots below it, and which of them is main."""
    inside = folder / "snapshots" / "0123abcd"
    inside.parent.mkdir()
    shutil.copytree(folder, inside, ignore=shutil.ignore_patterns("snapshots"))
    (folder / "snapshots" / "ffff").mkdir()
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abcd")


def suffixed(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: rename(
        folder, lambda name: name.removesuffix(old) + new if name.endswith(old) and ".experts." in name else name
    )


def narrow_router(layers: tuple[int, ...]) -> Callable[[Path], None]:
    """Take an expert's row out of the routers of some layers."""

    def change(folder: Path) -> None:
        for path in folder.glob("*.safetensors"):
            raw = RawSafetensors.read(path)
            for layer in layers:
                name = f"layers.{layer}.ffn.gate.weight"
                if name in raw.tensors:
                    tensor = raw.tensors[name]
                    row = len(tensor.data) // tensor.shape[0]
                    tensor.data = tensor.data[:-row]
                    tensor.shape[0] -= 1
            raw.write(path)

    return change


def unscaled(folder: Path) -> None:
    """Take the experts' scales out."""
    rename(folder, lambda name: None if ".experts." in name and name.endswith(".scale") else name)


def moved_into(folder: Path, name: str) -> None:
    """Move what a folder holds into a folder in it."""
    (folder / name).mkdir()
    for path in list(folder.iterdir()):
        if path.name != name:
            path.rename(folder / name / path.name)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5\n"
DONE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "LFS pointer for weights": (lambda f: first_file(f).write_text(LFS), "Git LFS pointers", "git lfs pull"),
    "LFS pointer for config": (lambda f: (f / "config.json").write_text(LFS), "Git LFS pointers", "git lfs pull"),
    "HTML page": (
        lambda f: first_file(f).write_text("\n<!DOCTYPE html><html>"),
        "error page",
        "download the file again",
    ),
    "XML page": (lambda f: first_file(f).write_text('<?xml version="1.0"?><Error>'), "error page", "download"),
    "text page": (lambda f: first_file(f).write_text("Invalid username or password."), "error page", "log in"),
    "page for config": (lambda f: (f / "config.json").write_text("<html>"), "error page", "download the file again"),
    "unfinished": (
        lambda f: first_file(f).rename(f / "model.safetensors.incomplete"),
        "not finished",
        "start the download",
    ),
    "hub repository": (hub, "repository folder", "snapshots/0123abcd"),
    "pickles": (lambda f: only(f, pytorch_model__bin="x"), "PyTorch's pickles", "save it as safetensors"),
    "Orbax": (lambda f: only(f, _METADATA="{}"), "an Orbax checkpoint, as of maxtext: _METADATA", "start from"),
    "GGUF": (lambda f: only(f, a__gguf="x"), "GGUF already", "start from safetensors"),
    "distcp": (lambda f: only(f, __0_0__distcp="x"), "another framework", "export it to safetensors"),
    "V3": (
        lambda f: config(f, architectures=["DeepseekV3ForCausalLM"]),
        "another DeepSeek model: DeepseekV3",
        "llama.cpp",
    ),
    "V3.2": (lambda f: config(f, architectures=["DeepseekV32ForCausalLM"]), "another DeepSeek model", "llama.cpp"),
    "ModelOpt": (
        lambda f: (config(f, moe_quant_algo="NVFP4"), suffixed(".scale", ".weight_scale_2")(f)),
        "ModelOpt's NVFP4: moe_quant_algo NVFP4",
        "take the published checkpoint",
    ),
    "ModelOpt by tensors": (suffixed(".scale", ".weight_scale_2"), "ModelOpt's NVFP4", "take the published"),
    "compressed-tensors": (
        lambda f: (
            config(f, quantization_config={"quant_method": "compressed-tensors", "format": "pack-quantized"}),
            suffixed(".weight", ".weight_packed")(f),
        ),
        "compressed-tensors: format pack-quantized",
        "convert the checkpoint that it was made of",
    ),
    "GPTQ": (suffixed(".weight", ".qweight"), "GPTQ or AWQ", "convert the checkpoint"),
    "AWQ": (
        lambda f: (config(f, quantization_config={"quant_method": "awq"}), suffixed(".weight", ".qweight")(f)),
        "GPTQ or AWQ: quant_method awq",
        "convert the checkpoint",
    ),
    "bitsandbytes": (suffixed(".scale", ".weight.absmax"), "bitsandbytes", "convert the checkpoint"),
    "gpt-oss": (suffixed(".w1.weight", ".gate_up_proj_blocks"), "gpt-oss", "gate and up"),
    "MLX": (
        lambda f: (config(f, quantization={"group_size": 64, "bits": 4}), suffixed(".scale", ".biases")(f)),
        "MLX: 4 bits in groups of 64",
        "convert the checkpoint",
    ),
    "MLX by modules": (
        lambda f: (
            config(f, quantization={"group_size": 64, "bits": 8, "a": {"mode": "mxfp8"}, "b": {"mode": "mxfp4"}}),
            suffixed(".scale", ".scales")(f),
        ),
        "MLX: mxfp4 and mxfp8",
        "convert the checkpoint",
    ),
    "adapter": (
        lambda f: rename(f, lambda name: f"base_model.model.{name}.lora_A.weight"),
        "a LoRA adapter, not a model",
        "merge it into its base model",
    ),
    "adapter's leftovers": (
        lambda f: rename(f, lambda name: name.replace(".wq_a.weight", ".wq_a.base_layer.weight")),
        "leftovers of a LoRA adapter",
        "merge and unload",
    ),
    "another quantiser": (
        lambda f: (config(f, quantization_config={"quant_method": "quanto"}), suffixed(".scale", "._scale")(f)),
        "another quantiser: quant_method quanto",
        "convert the checkpoint",
    ),
    "ModelOpt's FP8": (
        lambda f: (config(f, quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"}), unscaled(f)),
        "another of ModelOpt's formats: quant_algo FP8",
        "convert the checkpoint",
    ),
    "LoRA beside the weights": (
        lambda f: rename(f, lambda name: name.replace(".bias", ".lora_B.default.weight")),
        "leftovers of a LoRA adapter",
        "merge and unload",
    ),
    "merged under PEFT's names": (
        lambda f: rename(f, lambda name: f"base_model.model.{name}"),
        "leftovers of a LoRA adapter",
        "merge and unload",
    ),
    "the hub's cache": (
        lambda f: (hub(f), moved_into(f, "models--deepseek-ai--DeepSeek-V4-Flash")),
        "repository folder",
        "models--deepseek-ai--DeepSeek-V4-Flash/snapshots/0123abcd",
    ),
    "HTML page with a mark": (
        lambda f: first_file(f).write_bytes(b"\xef\xbb\xbf\r\n<HTML lang=en>"),
        "error page",
        "download the file again",
    ),
    "compressed page": (lambda f: first_file(f).write_bytes(b"\x1f\x8b\x08\0\0"), "error page", "download the file"),
    "page for an index": (lambda f: (f / INDEX).write_text("<!-- 401 --><html>"), "error page", "log in"),
    "V3 by its type": (
        lambda f: config(f, architectures=None, model_type="deepseek_v3"),
        "another DeepSeek model: deepseek_v3",
        "llama.cpp",
    ),
    "pruned, and a number for each layer": (
        lambda f: (narrow_router((1,))(f), config(f, n_routed_experts=[8, 7, 8, 8])),
        "experts removed unevenly: layers have different numbers of them: 7 in layer 1, 8 in others",
        "as many in every layer",
    ),
    "pruned, and routers left": (
        lambda f: rename(f, lambda name: None if name.startswith("layers.1.ffn.experts.7.") else name),
        "experts removed, and routers as they were: layer 1 has 7 experts, its router chooses among 8",
        "set n_routed_experts",
    ),
    "pruned unevenly": (narrow_router((1,)), "experts removed unevenly", "as many in every layer"),
    "pruned evenly": (
        narrow_router(tuple(range(64))),
        "routers choose among 7, n_routed_experts is 8",
        "set n_routed_experts",
    ),
    "top-k": (
        lambda f: config(f, num_experts_per_tok=2),
        "tables of 3 experts a token, num_experts_per_tok is 2",
        "tid2eid",
    ),
    "vocabulary": (lambda f: config(f, vocab_size=999), "a resized vocabulary: embed has", "as many rows"),
    "no names": (
        lambda f: (
            (f / INDEX).unlink(),
            [path.rename(f / f"{i}x.safetensors") for i, path in enumerate(sorted(f.glob("*.safetensors")))],
        ),
        "files without an index",
        "--index headers",
    ),
}


@pytest.mark.parametrize(("change", "name", "advice"), DONE.values(), ids=DONE)
def test_a_known_layout_is_named_in_one_line_with_what_to_do(
    change: Callable[[Path], Any], name: str, advice: str, editable: MakeEditable, tmp_path: Path
) -> None:
    source = editable(mtp=False).folder
    change(source)
    for command in (["dequantize", source, tmp_path / "d"], ["hf-to-gguf", source, tmp_path / "a.gguf"]):
        result = run_cli(*command)
        assert result.code in (3, 5, 7), result.error
        assert name in result.error
        assert advice in result.error
        assert "check that the download is complete" not in result.error
    described = run_cli("inspect", source)
    text = (described.out + described.err).replace("\n", " ")
    assert name.split(":")[0] in text or "truncated or corrupt" in text  # a file called .gguf is read as one


@pytest.mark.parametrize("case", ["adapter", "merged under PEFT's names"])
def test_a_layout_without_the_names_of_roles_is_named_for_v41_too(
    case: str, editable: MakeEditable, tmp_path: Path
) -> None:
    source = editable(preset="v41-tiny").folder
    change, name, advice = DONE[case]
    change(source)
    error = run_cli("dequantize", source, tmp_path / "d").error
    assert (name in error, advice in error) == (True, True), error


def test_what_mlx_makes_of_v41_is_named(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    assert run_cli("mlx", make_checkpoint("v41-tiny"), tmp_path / "mlx").code == 0
    error = run_cli("check", tmp_path / "mlx").error
    assert error.startswith(f"{tmp_path / 'mlx'}: MLX: mxfp4 and mxfp8 (key kv_source_layer_ids")


def test_every_row_of_the_table_has_a_case() -> None:
    seen = {layout.name for layout in LAYOUTS for _, name, _ in DONE.values() if name.split(":")[0] in layout.name}
    seen |= {
        "a folder of shards",
        "experts removed, and config.json as it was",
        "another number of experts a token than the tables have",
        "experts removed from the trunk and not from the draft",
    }
    assert {layout.name for layout in LAYOUTS} - seen == {"experts of half the width: packed FP4 that was read as FP8"}


def test_a_draft_that_kept_its_experts_is_told_from_a_trunk_that_lost_some(
    editable: MakeEditable, tmp_path: Path
) -> None:
    source = editable().folder
    narrow_router(tuple(range(64)))(source)
    kept = {"layers": 7, "mtp": 8}
    rename(source, lambda name: name if expert_of(name) < kept.get(name.split(".")[0], 8) else None)
    config(source, n_routed_experts=7, num_hash_layers=0)
    rename(source, lambda name: None if name.endswith("tid2eid") else name)
    for path in source.glob("*.safetensors"):
        raw = RawSafetensors.read(path)
        for name, tensor in raw.tensors.items():
            if name.startswith("layers.") and name.endswith("ffn.gate.bias"):
                tensor.data, tensor.shape = tensor.data[:28], [7]
        raw.write(path)
    error = run_cli("dequantize", source, tmp_path / "d").error
    assert "experts removed from the trunk and not from the draft: draft layer 0 chooses among 8, the trunk" in error
    assert "--draft drop" in error


def expert_of(name: str) -> int:
    """Return the number of the expert that a tensor is of, -1 for any other tensor."""
    return int(name.split(".experts.")[1].split(".")[0]) if ".ffn.experts." in name else -1


BESIDE = {
    "pointer": ("tokenizer_config.json", LFS, "Git LFS pointers instead of files: tokenizer_config.json; run git lfs"),
    "page": ("tokenizer.json", "<html>401</html>", "an error page saved under a file's name: tokenizer.json begins"),
    "unfinished": ("model-00002-of-00002.safetensors.aria2", "x", "a download that is not finished: model-00002-of"),
}


@pytest.mark.parametrize(("name", "content", "note"), BESIDE.values(), ids=BESIDE)
def test_what_lies_beside_sound_weights_is_noted(
    name: str, content: str, note: str, editable: MakeEditable, tmp_path: Path
) -> None:
    source = editable().folder
    (source / name).write_text(content)
    for command in (
        ["shard", source, tmp_path / "s", "--mp", "1", "--dry-run"],
        ["check", source],
        ["inspect", source],
    ):
        result = run_cli(*command, "--json")
        assert result.code == 0, result.err
        assert any(found.startswith(note) for found in json.loads(result.out)["notes"]), command
    if name.startswith("tokenizer"):
        error = run_cli("hf-to-gguf", source, tmp_path / "a.gguf").error
        assert f"{name}: a" in error
        assert "not the file; " in error


# Read all the same


def converted(source: Path, out: Path, *options: str) -> dict[str, bytes]:
    result = run_cli("dequantize", source, out, "--quiet", *options)
    assert result.code == 0, result.err
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".safetensors"}


def test_numbered_files_without_an_index_are_read_by_their_headers(
    editable: MakeEditable, tiny: Path, tmp_path: Path
) -> None:
    source = editable().folder
    (source / INDEX).unlink()
    assert converted(source, tmp_path / "a") == converted(tiny, tmp_path / "b")
    first_file(source).unlink()
    error = run_cli("dequantize", source, tmp_path / "c").error
    assert "file 1 of 2 is missing" in error


def test_one_of_many_numbered_files_that_is_missing_is_named(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = Path(shutil.copytree(make_checkpoint("tiny", files=4), tmp_path / "model"))
    (source / INDEX).unlink()
    (source / "model-00003-of-00004.safetensors").unlink()
    error = run_cli("dequantize", source, tmp_path / "c").error
    assert "file 3 of 4 is missing" in error
    assert error.endswith("is the download complete?")


def test_an_index_that_is_wrong_is_answered_with_index_headers(
    editable: MakeEditable, tiny: Path, tmp_path: Path
) -> None:
    source = editable().folder
    index = json.loads((source / INDEX).read_text())
    for name in list(index["weight_map"])[:3]:
        del index["weight_map"][name]
    index["weight_map"]["ghost"] = first_file(source).name
    (source / INDEX).write_text(json.dumps(index))
    assert "--index headers" in run_cli("dequantize", source, tmp_path / "c").error
    assert converted(source, tmp_path / "a", "--index", "headers") == converted(tiny, tmp_path / "b")
    assert run_cli("verify", source, tmp_path / "a", "--index", "headers").code == 0
    assert "nothing unexpected" in run_cli("inspect", source, "--index", "headers").out


def test_what_is_missing_is_counted_and_the_file_that_holds_it_is_named(editable: MakeEditable, tmp_path: Path) -> None:
    source = editable(mtp=False).folder
    moved: dict[str, Any] = {}
    for path in source.glob("*.safetensors"):
        raw = RawSafetensors.read(path)
        taken = {n: t for n, t in raw.tensors.items() if ".experts." in n and n.endswith(".scale")}
        moved |= taken
        RawSafetensors({n: t for n, t in raw.tensors.items() if n not in taken}, raw.metadata).write(path)
    index = json.loads((source / INDEX).read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if n not in moved}
    (source / INDEX).write_text(json.dumps(index))
    assert (
        f": {len(moved)} tensors missing, all experts' scales: " in run_cli("dequantize", source, tmp_path / "a").error
    )
    RawSafetensors(moved, None).write(source / "mtp.safetensors")
    error = run_cli("dequantize", source, tmp_path / "a").error
    assert f"mtp.safetensors holds {len(moved)} of them: --index headers reads it" in error
    assert run_cli("dequantize", source, tmp_path / "a", "--index", "headers", "--quiet").code == 0


SPELLINGS = {
    ".weight_scale": lambda name: name.replace(".scale", ".weight_scale"),
    ".weight_scale_inv": lambda name: name.replace(".scale", ".weight_scale_inv"),
}


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_scales_under_other_names_give_the_same_bytes(
    spell: Callable[[str], str], editable: MakeEditable, tiny: Path, tmp_path: Path
) -> None:
    source = editable().folder
    rename(source, lambda name: spell(name) if name.endswith(".scale") else name)
    assert converted(source, tmp_path / "a") == converted(tiny, tmp_path / "b")
    for folder, out in ((source, "s"), (tiny, "t")):
        assert run_cli("shard", folder, tmp_path / out, "--mp", "2", "--quiet").code == 0
    shards = [{p.name: p.read_bytes() for p in (tmp_path / out).glob("*.safetensors")} for out in ("s", "t")]
    assert shards[0] == shards[1]
