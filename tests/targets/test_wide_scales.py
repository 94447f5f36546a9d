"""Scales of other types and names than the published ones: the same bytes come out, or the odd value is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import MakeCheckpoint
from tests.command_line import run_cli
from tests.oracles.safetensors_bytes import RawSafetensors, RawTensor
from tests.targets.folders import Editable, refusals

MakeEditable = Callable[..., Editable]

# E8M0 byte e as float32 is 2^(e-127): its exponent bits, and half of the smallest normal number for byte 0.
F32_BITS = (np.arange(256, dtype=np.uint32) << 23) | np.where(np.arange(256) == 0, 1 << 22, 0).astype(np.uint32)
F32_BITS[255] = 0x7FC00000
WIDE: dict[str, Callable[[np.ndarray[Any, Any]], bytes]] = {
    "F32": lambda codes: F32_BITS[codes].astype("<u4").tobytes(),
    "BF16": lambda codes: (F32_BITS[codes] >> 16).astype("<u2").tobytes(),
    "U8": lambda codes: codes.tobytes(),
}
SUFFIXES = {"F32": ".weight_scale_inv", "BF16": ".weight_scale", "U8": ".scale"}


def restore(folder: Path, dtype: str, only_fp4: bool = False, suffix: str = ".scale") -> None:
    """Store E8M0 scales as ``dtype``, under names that end in ``suffix``."""
    renamed: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        raw = RawSafetensors.read(path)
        tensors: dict[str, RawTensor] = {}
        for name, tensor in raw.tensors.items():
            if tensor.dtype == "F8_E8M0" and (".ffn.experts." in name or not only_fp4):
                tensor.data = WIDE[dtype](np.frombuffer(tensor.data, np.uint8))
                tensor.dtype = dtype
                renamed[name] = name.removesuffix(".scale") + suffix
            tensors[renamed.get(name, name)] = tensor
        RawSafetensors(tensors, raw.metadata).write(path)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {renamed.get(name, name): file for name, file in index["weight_map"].items()}
    path.write_text(json.dumps(index))


CONVERSIONS: dict[str, list[str]] = {
    "a.gguf": ["hf-to-gguf"],
    "q.gguf": ["hf-to-gguf", "--experts", "q8_0", "--dense", "bf16"],
    "s2": ["shard", "--mp", "2"],
    "s8": ["shard", "--mp", "2", "--experts", "fp8"],
    "d": ["dequantize"],
    "f": ["dequantize", "--dtype", "f16", "--names", "transformers"],
    "r": ["repack", "--experts", "fp8"],
}


def copied(folder: Path, to: Path) -> Path:
    """Return a copy of a checkpoint, all under one name: outputs are called after it."""
    return Path(shutil.copytree(folder, to / "model"))


def outputs(source: Path, root: Path) -> dict[str, bytes]:
    """Return the files of every conversion of a folder, each of which ``verify`` finds right."""
    root.mkdir()
    found: dict[str, bytes] = {}
    for name, (command, *options) in CONVERSIONS.items():
        result = run_cli(command, source, root / name, "--quiet", *options)
        assert result.code == 0, result.err
        result = run_cli("verify", source, root / name)
        assert result.code == 0, (name, result.out, result.err)
        paths = [root / name] if (root / name).is_file() else sorted((root / name).glob("*.safetensors"))
        found |= {f"{name} {path.name}": path.read_bytes() for path in paths}
    return found


@pytest.fixture(scope="module")
def official(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("official")
    return outputs(copied(tiny, folder), folder / "o")


@pytest.mark.parametrize("dtype", ["F32", "BF16", "U8"])
def test_every_command_makes_of_them_what_it_makes_of_the_published_form(
    dtype: str, official: dict[str, bytes], tiny: Path, tmp_path: Path
) -> None:
    source = copied(tiny, tmp_path)
    # F32 scales of FP8 are a published form of their own, which shards keep.
    restore(source, dtype, only_fp4=dtype == "F32", suffix=SUFFIXES[dtype])
    found = outputs(source, tmp_path / "o")
    assert found.keys() == official.keys()
    for name, content in official.items():
        assert found[name] == content, name
    forward = [run_cli("forward", folder, "--tokens", "1,2,3", "--json") for folder in (source, tiny)]
    assert forward[0].code == 0, forward[0].err
    logits = [json.loads(result.out)["positions"] for result in forward]
    assert logits[0] == logits[1]
    checked = run_cli("check", source, "--json", "--strict")
    assert (checked.code, json.loads(checked.out)["findings"]) == (0, [])
    assert run_cli("inspect", source).code == 0


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_shards_with_such_scales_are_read_too(dtype: str, tiny: Path, tmp_path: Path) -> None:
    assert run_cli("shard", tiny, tmp_path / "s", "--mp", "2", "--quiet").code == 0
    assert run_cli("unshard", tmp_path / "s", tmp_path / "u", "--quiet").code == 0
    for path in (tmp_path / "s").glob("*.safetensors"):
        raw = RawSafetensors.read(path)
        for name, tensor in raw.tensors.items():
            if tensor.dtype == "F8_E8M0" and ".experts." in name:
                tensor.data, tensor.dtype = WIDE[dtype](np.frombuffer(tensor.data, np.uint8)), dtype
        raw.write(path)
    forward = [
        json.loads(run_cli("forward", f, "--tokens", "1,2", "--json").out)["positions"] for f in (tmp_path / "s", tiny)
    ]
    assert forward[0] == forward[1]
    assert run_cli("unshard", tmp_path / "s", tmp_path / "w", "--quiet").code == 0
    made = [{p.name: p.read_bytes() for p in (tmp_path / f).glob("*.safetensors")} for f in ("u", "w")]
    assert made[0] == made[1]


NAME = "layers.1.ffn.experts.2.w1.scale"
MENDS = {"names that stay": ("--drop-draft",), "stacks": ("--rename", "transformers")}


@pytest.mark.parametrize("mend", MENDS.values(), ids=MENDS)
@pytest.mark.parametrize("dtype", ["F32", "BF16", "U8"])
def test_mend_leaves_them_in_their_type_and_verify_reads_them(
    dtype: str, mend: tuple[str, ...], editable: MakeEditable, tmp_path: Path
) -> None:
    source, out = editable(files=3).folder, tmp_path / "out"
    restore(source, dtype, only_fp4=dtype == "F32")
    assert run_cli("mend", source, out, *mend, "--quiet").code == 0
    verified = run_cli("verify", source, out)
    assert verified.code == 0, verified.err
    path = next(out.glob("model-00002-*"))
    raw = RawSafetensors.read(path)
    name = next(name for name in raw.tensors if ".experts." in name and "scale" in name)
    assert raw.tensors[name].dtype == dtype
    other = WIDE[dtype](np.array([0x70], np.uint8))
    raw.tensors[name].data = other + raw.tensors[name].data[len(other) :]
    path.unlink()  # a file that is shared with the source
    raw.write(path)
    assert run_cli("verify", source, out).code == 12


@pytest.mark.parametrize("mend", [("--reindex",), *MENDS.values()], ids=["shared files", *MENDS])
def test_mend_counts_bytes_that_are_nan_as_scales(
    mend: tuple[str, ...], editable: MakeEditable, tmp_path: Path
) -> None:
    source, wanted = editable().folder, 2
    restore(source, "U8")
    for path in source.glob("*.safetensors"):
        raw = RawSafetensors.read(path)
        if NAME in raw.tensors:
            raw.tensors[NAME].data = bytes([0xFF]) * wanted + raw.tensors[NAME].data[wanted:]
            raw.write(path)
    result = json.loads(run_cli("mend", source, tmp_path / "out", *mend, "--json").out)
    assert [entry["nan"] for entry in result["counted"]] == [wanted]
    assert run_cli("mend", source, tmp_path / "strict", *mend, "--strict").code == 7


@pytest.mark.parametrize(("dtype", "value"), [("F32", 3.0), ("BF16", 0.0)])
def test_a_value_that_e8m0_does_not_hold_is_named_by_tensor_and_position(
    dtype: str, value: float, editable: MakeEditable, tiny: Path, tmp_path: Path
) -> None:
    source = editable().folder
    restore(source, dtype, only_fp4=True)
    size = {"F32": 4, "BF16": 2}[dtype]
    bits = int(np.float32(value).view(np.uint32)) >> (32 - 8 * size)
    for path in source.glob("*.safetensors"):
        raw = RawSafetensors.read(path)
        if NAME in raw.tensors:
            tensor = raw.tensors[NAME]
            columns = tensor.shape[1]
            content = bytearray(tensor.data)
            at = (5 * columns + 1) * size
            content[at : at + size] = bits.to_bytes(size, "little")
            tensor.data = bytes(content)
            raw.write(path)
    for command, error in refusals(source, tmp_path).items():
        assert f"tensor {NAME}: {dtype} scale [5, 1] is not a power of two" in error, command
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name]
    # An output that was made before: verify refuses the source as well.
    assert run_cli("dequantize", tiny, tmp_path / "d", "--quiet").code == 0
    assert (
        f"tensor {NAME}: {dtype} scale [5, 1] is not a power of two" in run_cli("verify", source, tmp_path / "d").error
    )


def test_bytes_are_e8m0_unless_the_config_names_another_format(editable: MakeEditable, tmp_path: Path) -> None:
    source = editable()
    restore(source.folder, "U8")
    raw = json.loads((source.folder / "config.json").read_text())["quantization_config"]
    source.edit_config(quantization_config={key: value for key, value in raw.items() if key != "scale_fmt"})
    assert run_cli("dequantize", source.folder, tmp_path / "d", "--dry-run").code == 0
    source.edit_config(quantization_config=raw | {"scale_fmt": "int8"})
    assert "not a scale of FP8" in run_cli("dequantize", source.folder, tmp_path / "c").error


ROWS = ("--engram", "i8-row264")


def test_an_n_gram_table_has_its_scales_in_a_wider_type_too(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = copied(make_checkpoint("v41-tiny"), tmp_path)
    for folder, out in ((source, "t"), (source, "w")):
        if out == "w":
            restore(source, "BF16")
        assert run_cli("hf-to-gguf", folder, tmp_path / f"{out}.gguf", *ROWS, "--quiet").code == 0
        assert run_cli("shard", folder, tmp_path / out, "--mp", "2", "--quiet").code == 0
        assert run_cli("verify", folder, tmp_path / out).code == 0
        assert run_cli("verify", folder, tmp_path / f"{out}.gguf").code == 0
    assert (tmp_path / "t.gguf").read_bytes() == (tmp_path / "w.gguf").read_bytes()
    for path in (tmp_path / "t").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "w" / path.name).read_bytes()
