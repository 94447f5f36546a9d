"""Bad input of hf-to-gguf: one line, its own exit code, nothing written, nothing left behind."""

# ruff: noqa: E501 - a table, one row a line

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsv4convert.engine.resources as resources
from dsv4convert.checkpoint import open_folder

from ..checkpoints import MakeCheckpoint
from ..command_line import run_cli

Change = Callable[["Damaged"], None]

# Exit codes, by kind of error.
USAGE, MISSING, CONFIG, UNSUPPORTED, FORMAT, INVENTORY, TOKENIZER, EXISTS, SPACE = 2, 3, 4, 5, 6, 7, 8, 9, 10


class Damaged:
    """A copy of a checkpoint and the ways to damage it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.options: list[str] = []

    @property
    def shards(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    def edit_json(self, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
        path = self.folder / name
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    def config(self, **keys: Any) -> None:
        self.edit_json("config.json", lambda config: config.update(keys))

    def drop_config(self, key: str) -> None:
        self.edit_json("config.json", lambda config: config.pop(key))

    def index(self, change: Callable[[dict[str, str]], Any]) -> None:
        self.edit_json("model.safetensors.index.json", lambda index: change(index["weight_map"]))

    def file_of(self, tensor: str) -> Path:
        return next(path for path in self.shards if tensor in read_header(path))

    def header(self, tensor: str, change: Callable[[dict[str, Any]], Any], *, repack: bool = False) -> None:
        """Change the header of the file that holds ``tensor``; ``repack`` lays the payload out anew."""
        path = self.file_of(tensor)
        header, payload = split(path)
        change(header)
        if repack:
            parts, position = [], 0
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                begin, end = entry["data_offsets"]
                parts.append(payload[begin:end])
                entry["data_offsets"] = [position, position + end - begin]
                position += end - begin
            payload = b"".join(parts)
        write(path, header, payload)

    def remove(self, tensor: str) -> None:
        """Remove a tensor from file and index."""
        self.header(tensor, lambda header: header.pop(tensor), repack=True)
        self.index(lambda weight_map: weight_map.pop(tensor))

    def add(self, tensor: str, dtype: str, shape: list[int], nbytes: int, beside: str) -> None:
        """Add a tensor of zeros to the file that holds ``beside``, and to the index."""
        path = self.file_of(beside)
        header, payload = split(path)
        header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [len(payload), len(payload) + nbytes]}
        write(path, header, payload + bytes(nbytes))
        self.index(lambda weight_map: weight_map.update({tensor: path.name}))


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def read_header(path: Path) -> dict[str, Any]:
    return split(path)[0]


def write(path: Path, header: dict[str, Any], payload: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + payload)


@dataclass(frozen=True)
class Case:
    """A way to damage a checkpoint, the exit code that it must have and what the line must say."""

    name: str
    code: int
    says: tuple[str, ...]
    change: Change


GATE = "layers.0.ffn.gate.weight"
EXPERT = "layers.1.ffn.experts.0.w1"
NORM = "norm.weight"
SINK = "layers.0.attn.attn_sink"


def swap_first_two(header: dict[str, Any]) -> None:
    """Have the second tensor begin inside the first."""
    first, second = sorted(
        (entry for name, entry in header.items() if name != "__metadata__"), key=lambda e: e["data_offsets"]
    )[:2]
    size = second["data_offsets"][1] - second["data_offsets"][0]
    second["data_offsets"] = [first["data_offsets"][1] - 1, first["data_offsets"][1] - 1 + size]


def beyond(header: dict[str, Any]) -> None:
    entry = max((e for n, e in header.items() if n != "__metadata__"), key=lambda e: e["data_offsets"])
    entry["data_offsets"] = [offset + 10**6 for offset in entry["data_offsets"]]


CASES = [
    Case("no such folder", MISSING, ("no such folder",), lambda d: shutil.rmtree(d.folder)),
    Case("a file for a folder", MISSING, ("source",), lambda d: (shutil.rmtree(d.folder), d.folder.write_text(""))),  # type: ignore[func-returns-value]
    Case("config.json is missing", MISSING, ("config.json",), lambda d: (d.folder / "config.json").unlink()),
    Case("config.json is no JSON", CONFIG, ("config.json: not valid JSON",), lambda d: (d.folder / "config.json").write_text("{")),
    Case("config.json is empty", CONFIG, ("config.json: not valid JSON",), lambda d: (d.folder / "config.json").write_text("")),
    Case("config.json is a list", CONFIG, ("config.json: not a JSON object: got list",), lambda d: (d.folder / "config.json").write_text("[]")),
    Case("a key of the config is missing", CONFIG, ("config.json: key", "hidden_size"), lambda d: d.drop_config("hidden_size")),
    Case("a key of the config is a text", CONFIG, ("key hidden_size", "'wide'"), lambda d: d.config(hidden_size="wide")),
    Case("a key of the config is negative", CONFIG, ("key q_lora_rank",), lambda d: d.config(q_lora_rank=-1)),
    Case("an unknown compress ratio", CONFIG, ("key compress_ratios[0]", "64"), lambda d: d.edit_json("config.json", lambda c: c["compress_ratios"].__setitem__(0, 64))),
    Case("compress_ratios too short", CONFIG, ("key compress_ratios: list too short",), lambda d: d.config(compress_ratios=[0])),
    Case("more hash layers than layers", CONFIG, ("key num_hash_layers",), lambda d: d.config(num_hash_layers=99)),
    Case("groups that do not divide the heads", CONFIG, ("key o_groups",), lambda d: d.config(o_groups=3)),
    Case("more experts a token than experts", CONFIG, ("key num_experts_per_tok",), lambda d: d.config(num_experts_per_tok=9999)),
    Case("an unknown rope scaling", CONFIG, ("key rope_scaling.type", "linear"), lambda d: d.config(rope_scaling={"type": "linear"})),
    Case("unsupported architecture", UNSUPPORTED, ("unsupported architecture: expected DeepseekV4ForCausalLM or DeepseekV41ForCausalLM, got LlamaForCausalLM",), lambda d: d.config(architectures=["LlamaForCausalLM"])),
    Case("V4.1 by name alone", CONFIG, ("kv_source_layer_ids",), lambda d: d.config(architectures=["DeepseekV41ForCausalLM"])),
    Case("no architectures", CONFIG, ("key architectures",), lambda d: d.drop_config("architectures")),
    Case("no safetensors at all", MISSING, ("no safetensors files",), lambda d: [p.unlink() for p in (*d.shards, d.folder / "model.safetensors.index.json")]),  # type: ignore[func-returns-value,misc]
    Case("no index, and a file missing", MISSING, ("file 1 of ", "without model.safetensors.index.json"), lambda d: [(d.folder / "model.safetensors.index.json").unlink(), d.shards[0].unlink()]),  # type: ignore[func-returns-value]
    Case("the index is no JSON", FORMAT, ("index.json: not valid JSON",), lambda d: (d.folder / "model.safetensors.index.json").write_text("nothing")),
    Case("the index has no weight_map", FORMAT, ("key weight_map",), lambda d: d.edit_json("model.safetensors.index.json", lambda i: i.pop("weight_map"))),
    Case("the index leads out of the folder", FORMAT, ("the file name is not a plain name", "../../etc/passwd"), lambda d: d.index(lambda m: m.update({NORM: "../../etc/passwd"}))),
    Case("the index has an absolute path", FORMAT, ("the file name is not a plain name", "/etc/passwd"), lambda d: d.index(lambda m: m.update({NORM: "/etc/passwd"}))),
    Case("the index names another file", INVENTORY, ("the index and the file disagree", NORM), lambda d: d.index(lambda m: m.update({NORM: next(p.name for p in d.shards if p != d.file_of(NORM))}))),
    Case("the index lists what no file holds", INVENTORY, ("listed in the index and missing from the file", "norm.extra"), lambda d: d.index(lambda m: m.update({"norm.extra": d.file_of(NORM).name}))),
    Case("a tensor that the index does not list", INVENTORY, ("the index and the file disagree", "not listed"), lambda d: d.index(lambda m: m.pop(NORM))),
    Case("a file is missing", MISSING, ("no such file", "model-00001"), lambda d: d.shards[0].unlink()),
    Case("a file is empty", FORMAT, ("truncated: expected at least 8 bytes, got 0",), lambda d: d.shards[0].write_bytes(b"")),
    Case("a file is cut in its header", FORMAT, ("header longer than the file",), lambda d: d.shards[0].write_bytes(d.shards[0].read_bytes()[:100])),
    Case("a file is cut in its payload", FORMAT, ("truncated, the data extends past the end of the file",), lambda d: d.shards[0].write_bytes(d.shards[0].read_bytes()[:-5])),
    Case("a file has bytes too many", FORMAT, ("bytes after the last tensor",), lambda d: d.shards[0].write_bytes(d.shards[0].read_bytes() + b"x")),
    Case("a header that is no JSON", FORMAT, ("header is not valid JSON",), lambda d: d.shards[0].write_bytes((4).to_bytes(8, "little") + b"{oh}")),
    Case("a header that is a list", FORMAT, ("header is not a JSON object: got list",), lambda d: d.shards[0].write_bytes((2).to_bytes(8, "little") + b"[]")),
    Case("a header that is no UTF-8", FORMAT, ("header is not valid JSON", "utf-8"), lambda d: d.shards[0].write_bytes((4).to_bytes(8, "little") + b'"\xff\xfe"')),
    Case("overlapping offsets", FORMAT, ("overlaps the tensor before it",), lambda d: d.header(NORM, swap_first_two)),
    Case("offsets beyond the file", FORMAT, ("truncated, the data extends past the end of the file",), lambda d: d.header(NORM, beyond)),
    Case("offsets that do not fit the shape", FORMAT, (f"tensor '{NORM}': bytes do not match",), lambda d: d.header(NORM, lambda h: h[NORM].update(shape=[1]))),
    Case("an unknown dtype", FORMAT, (f"tensor '{NORM}': unknown dtype: got 'F12'",), lambda d: d.header(NORM, lambda h: h[NORM].update(dtype="F12"))),
    Case("a tensor is missing", INVENTORY, (f"tensor {GATE} is missing",), lambda d: d.remove(GATE)),
    Case("an unknown tensor", INVENTORY, ("tensor layers.0.attn.wq_c.weight: unknown",), lambda d: d.add("layers.0.attn.wq_c.weight", "F32", [1], 4, NORM)),
    Case("a wrong shape", INVENTORY, (f"tensor {SINK}: wrong shape",), lambda d: d.header(SINK, lambda h: h[SINK].update(shape=[1, *h[SINK]["shape"]]))),
    Case("a wrong dtype", INVENTORY, (f"tensor {SINK}: wrong dtype", "got I32"), lambda d: d.header(SINK, lambda h: h[SINK].update(dtype="I32"))),
    Case("a tensor twice, once prefixed", INVENTORY, ("stored under two names",), lambda d: d.add(f"model.{NORM}", "F32", [1], 4, NORM)),
    Case("a tensor in two files", INVENTORY, (f"duplicate tensor {NORM}",), lambda d: duplicate(d, NORM)),
    Case("a scale without weight", INVENTORY, ("tensor layers.0.attn.wq_a.weight is missing (its scale is not)",), lambda d: d.remove("layers.0.attn.wq_a.weight")),
    Case("an unknown scale without weight", INVENTORY, ("tensor layers.0.attn.wq_c.scale: a scale without its weight",), lambda d: d.add("layers.0.attn.wq_c.scale", "F8_E8M0", [1, 1], 1, NORM)),
    Case("unexpected scale", INVENTORY, ("tensor norm.scale: unexpected scale",), lambda d: d.add("norm.scale", "F8_E8M0", [1], 1, NORM)),
    Case("a weight without scale", INVENTORY, (f"tensor {EXPERT}.scale is missing, the scale of a I8 weight",), lambda d: d.remove(f"{EXPERT}.scale")),
    Case("a scale of a wrong shape", INVENTORY, (f"tensor {EXPERT}.scale: not the scale of packed FP4",), lambda d: d.header(f"{EXPERT}.scale", lambda h: flatten(h[f"{EXPERT}.scale"]))),
    Case("an expert missing from a stack", INVENTORY, ("3 tensors missing, experts' weights (3)", f"{EXPERT}.weight"), lambda d: [d.remove(f"layers.1.ffn.experts.0.{w}.{part}") for w in ("w1", "w2", "w3") for part in ("weight", "scale")]),  # type: ignore[func-returns-value,misc]
    Case("no tokenizer", TOKENIZER, ("tokenizer.json is missing",), lambda d: (d.folder / "tokenizer.json").unlink()),
    Case("a tokenizer that is no JSON", TOKENIZER, ("tokenizer.json: not valid JSON",), lambda d: (d.folder / "tokenizer.json").write_text("{")),
    Case("a tokenizer of another kind", TOKENIZER, ("unknown kind of tokenizer: expected BPE", "got Unigram"), lambda d: d.edit_json("tokenizer.json", lambda t: t["model"].update(type="Unigram"))),
    Case("an unknown pre-tokenizer", TOKENIZER, ("unknown pre-tokenizer", "--tokenizer-pre"), lambda d: d.edit_json("tokenizer.json", lambda t: t.update(pre_tokenizer={"type": "Whitespace"}))),
    Case("a tokenizer larger than the vocabulary", TOKENIZER, ("tokenizer larger than the vocabulary",), lambda d: d.edit_json("tokenizer.json", lambda t: t["model"]["vocab"].update({"Ġtoo": 10**9}))),
    Case("an output of another name", USAGE, ("must end in .gguf",), lambda d: d.options.append("out:model.bin")),
    Case("no folder for the output", EXISTS, ("output folder is missing",), lambda d: d.options.append("out:nowhere/model.gguf")),
    Case("layers that the model does not have", USAGE, ("layers outside the model", "0-99"), lambda d: d.options.extend(["--layers", "0-99"])),
    Case("layers that are no range", USAGE, ("--layers: not a range",), lambda d: d.options.extend(["--layers", "all"])),
    Case("a size that is none", USAGE, ("--max-file-size: not a size",), lambda d: d.options.extend(["--max-file-size", "big"])),
]  # fmt: skip


def duplicate(damaged: Damaged, tensor: str) -> None:
    """Put a tensor into a second file as well."""
    first = damaged.file_of(tensor)
    second = next(path for path in damaged.shards if path != first)
    entry = read_header(first)[tensor]
    header, payload = split(second)
    size = entry["data_offsets"][1] - entry["data_offsets"][0]
    header[tensor] = {**entry, "data_offsets": [len(payload), len(payload) + size]}
    write(second, header, payload + bytes(size))


def flatten(entry: dict[str, Any]) -> None:
    entry["shape"] = [int(np.prod(entry["shape"])), 1]


@pytest.fixture
def damaged(tiny: Path, tmp_path: Path) -> Damaged:
    return Damaged(shutil.copytree(tiny, tmp_path / "source"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_one_line_with_its_own_exit_code_and_leaves_nothing(
    case: Case, damaged: Damaged, tmp_path: Path
) -> None:
    case.change(damaged)
    out = next((option[4:] for option in damaged.options if option.startswith("out:")), "model.gguf")
    options = [option for option in damaged.options if not option.startswith("out:")]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    result = run_cli("hf-to-gguf", damaged.folder, tmp_path / out, *options)
    assert result.code == case.code, result.error
    for text in case.says:
        assert text in result.error
    assert result.out == ""
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_kinds_of_errors_have_distinct_exit_codes() -> None:
    from dsv4convert import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.Dsv4Error)]
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes)
    assert 0 not in codes
    assert {case.code for case in CASES} <= set(codes)


def test_an_output_that_is_there_stays_as_it_is(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("precious")
    result = run_cli("hf-to-gguf", tiny, tmp_path / "model.gguf")
    assert result.code == EXISTS
    assert "model.gguf: already exists; pass --overwrite to replace the output" in result.error
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert (tmp_path / "model.gguf").read_text() == "precious"
    assert run_cli("hf-to-gguf", tiny, tmp_path / "model.gguf", "--overwrite").code == 0


def test_a_folder_under_the_name_of_the_output_is_not_replaced(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00003.gguf").mkdir()
    arguments = ("hf-to-gguf", tiny, tmp_path / "model.gguf", "--max-file-size", "2M", "--overwrite")
    result = run_cli(*arguments)
    assert result.code == EXISTS
    assert "already exists and is not a file" in result.error
    assert [path.name for path in tmp_path.iterdir()] == ["model-00001-of-00003.gguf"]


def test_no_room_on_the_disk_is_told_before_anything_is_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "free_bytes", lambda folder: 1000)
    result = run_cli("hf-to-gguf", tiny, tmp_path / "model.gguf")
    assert result.code == SPACE
    assert "not enough disk space for the output: expected " in result.error
    assert "got 1000; free some space or choose another folder" in result.error
    assert list(tmp_path.iterdir()) == []


def test_nan_codes_are_counted_and_reported_with_the_tensors_name(damaged: Damaged, tmp_path: Path) -> None:
    weight = open_folder(damaged.folder).weights["layers.0.attn.wq_a.weight"]
    with weight.stored.file.open("r+b") as file:
        file.seek(weight.stored.offset)
        file.write(b"\x7f\xff\x7f")  # NaN of both signs in float8_e4m3fn
    result = run_cli("hf-to-gguf", damaged.folder, tmp_path / "model.gguf", "--json")
    assert result.code == 0
    counted = json.loads(result.out)["counted"]
    assert [entry["nan"] for entry in counted if entry["tensor"] == "blk.0.attn_q_a.weight"] == [3]
    lines = run_cli("hf-to-gguf", damaged.folder, tmp_path / "again.gguf").out
    assert "counted in blk.0.attn_q_a.weight: 3 nan" in lines


def test_a_file_of_several_mtp_layers_is_refused(tiny: Path, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    two = make_checkpoint(overrides={"num_nextn_predict_layers": 2})
    for mode in ("split", "only"):
        result = run_cli("hf-to-gguf", two, tmp_path / "model.gguf", "--draft", mode)
        assert result.code == UNSUPPORTED
        assert (
            f"--draft {mode}: llama.cpp's file of an MTP layer has place for one: expected 1 MTP layer, got 2"
            in result.error
        )
    assert list(tmp_path.iterdir()) == []
    assert run_cli("hf-to-gguf", tiny, tmp_path / "model.gguf", "--draft", "split").code == 0
    assert run_cli("verify", two, tmp_path / "mtp-model.gguf").code == UNSUPPORTED
    for options in (("--draft", "drop"), ("--dialect", "deepseek-v4")):
        assert run_cli("hf-to-gguf", two, tmp_path / "two.gguf", *options, "--overwrite").code == 0
        assert run_cli("verify", two, tmp_path / "two.gguf", "--ignore-key", "general.name").code == 0
