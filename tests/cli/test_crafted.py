"""Files made to do harm: impossible lengths, deep and dense JSON, names that lead elsewhere or drive a terminal."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4convert.checkpoint import open_folder
from dsv4convert.checkpoint.folder import MAX_INDEX_BYTES
from dsv4convert.checkpoint.tokenizer import MAX_TOKENIZER_BYTES
from dsv4convert.containers.json_object import MAX_CONFIG_BYTES
from dsv4convert.containers.safetensors import MAX_HEADER_BYTES, read_header
from dsv4convert.engine.manifest import MAX_MANIFEST_BYTES
from dsv4convert.errors import FileFormatError, InventoryError

from ..command_line import Result, run_cli
from .mutations import nest

MEMORY_LIMIT = 2**30


@pytest.fixture
def source(tiny: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny, tmp_path / "source")


def shard_of(source: Path) -> Path:
    return sorted(source.glob("*.safetensors"))[0]


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    """Change the parsed header of a safetensors file, ``change`` being given the object; return a tensor's name."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    replaced = change(header)
    text = json.dumps(header if replaced is None else replaced).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return name


def convert(source: Path, out: Path) -> Result:
    """Convert and make sure that nothing is there afterwards."""
    result = run_cli("hf-to-gguf", source, out / "model.gguf")
    assert not [path.name for path in out.iterdir() if path.name.startswith("model.gguf")]
    return result


@pytest.mark.parametrize("length", [2**63, 2**63 - 1, 2**64 - 1, 2**62, 10**12, 2**32], ids=lambda n: f"{n:.0e}")
def test_a_header_of_impossible_length(length: int, source: Path, tmp_path: Path) -> None:
    path = shard_of(source)
    with path.open("r+b") as file:
        file.write(length.to_bytes(8, "little"))
    result = convert(source, tmp_path)
    assert result.code == 6
    assert f"{path}: header longer than the file" in result.error
    assert f"got {length}" in result.error


@pytest.mark.parametrize(
    "shape",
    [
        [10**9],
        [10**9, 10**9],
        [2**63 - 1],
        [2**64],
        [2**32, 2**32],
        [10**400],
        [10**9, [1]],
        ["a", 10**9],
        [[]],
        [1.0],
        [True],
        [-1, -1],
        [1] * 10_000,
        "12",
        {"1": 2},
        None,
    ],
    ids=lambda shape: str(shape)[:24],
)
def test_an_impossible_shape(shape: Any, source: Path, tmp_path: Path) -> None:
    path = shard_of(source)
    name = edit_header(path, lambda header: next(v for k, v in header.items() if "dtype" in v).update(shape=shape))
    result = convert(source, tmp_path)
    assert result.code == 6
    assert f"{path}: tensor {name!r}: " in result.error


@pytest.mark.parametrize(
    "offsets",
    [[0, 2**63], [0, 2**64], [2**63, 0], [-1, 1], [0], [0, 1, 2], "01", [0.0, 1.0], [10**400, 10**400], [True, False]],
    ids=lambda offsets: str(offsets)[:24],
)
def test_impossible_offsets(offsets: Any, source: Path, tmp_path: Path) -> None:
    path = shard_of(source)
    name = edit_header(path, lambda h: next(v for k, v in h.items() if "dtype" in v).update(data_offsets=offsets))
    result = convert(source, tmp_path)
    assert result.code == 6
    assert f"{path}: tensor {name!r}: " in result.error


JSON_FILES = ["config.json", "tokenizer.json", "model.safetensors.index.json", "a safetensors file"]


@pytest.mark.parametrize("depth", [100, 900, 1000, 5000, 1_000_000])
@pytest.mark.parametrize("file", JSON_FILES)
def test_deep_json(file: str, depth: int, source: Path, tmp_path: Path) -> None:
    text = b'{"architectures": ["DeepseekV4ForCausalLM"], "hidden_size": %s}' % nest(depth)
    if file == "a safetensors file":
        path = shard_of(source)
        path.write_bytes(len(text).to_bytes(8, "little") + text)
    else:
        path = source / file
        path.write_bytes(text)
    result = convert(source, tmp_path)
    assert result.code in (4, 6, 8)
    assert str(path) in result.error


@pytest.mark.parametrize("file", JSON_FILES)
def test_a_key_that_is_there_twice_is_named(file: str, source: Path, tmp_path: Path) -> None:
    if file == "a safetensors file":
        path = shard_of(source)
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length]
        name = next(iter(json.loads(header)))
        entry = json.dumps({name: json.loads(header)[name]}).encode()
        text = entry[:-1] + b"," + header[1:]
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    else:
        path = source / file
        name = next(iter(json.loads(path.read_bytes())))
        path.write_bytes(b'{"%s": 1,' % name.encode() + path.read_bytes()[1:])
    result = convert(source, tmp_path)
    assert result.code in (4, 6, 8)
    assert f"duplicate key {name!r}" in result.error


STRANGE_NAMES = [
    pytest.param("../../etc/passwd", id="a path up"),
    pytest.param("a\0b", id="NUL"),
    pytest.param("two\nlines", id="newline"),
    pytest.param("\x1b]0;title\x07\x1b[31mred", id="terminal escapes"),
    pytest.param("\u202egnp.exe", id="right to left"),
    pytest.param("\x9b31m", id="C1 control"),
    pytest.param("\ud800", id="half a surrogate pair"),
    pytest.param("n" * 100_000, id="very long"),
]


@pytest.mark.parametrize("name", STRANGE_NAMES)
def test_a_tensor_of_a_strange_name_is_told_on_one_printable_line(name: str, source: Path, tmp_path: Path) -> None:
    for path in source.glob("*.safetensors"):
        path.unlink()
    header = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (source / "model.safetensors.index.json").unlink()
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")
    before = set(tmp_path.rglob("*"))
    result = convert(source, tmp_path)
    assert result.code in (6, 7)
    assert result.error.isprintable()
    assert len(result.error) < 1000
    assert set(tmp_path.rglob("*")) == before
    inspected = run_cli("inspect", source)
    assert all(line.isprintable() for line in (inspected.out + inspected.err).splitlines())


@pytest.mark.parametrize(
    "name", [*STRANGE_NAMES, pytest.param("..", id="the parent"), pytest.param("/etc/passwd", id="a path")]
)
def test_an_index_that_leads_elsewhere_is_refused(name: str, source: Path, tmp_path: Path) -> None:
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    tensor = next(iter(index["weight_map"]))
    index["weight_map"][tensor] = name
    path.write_text(json.dumps(index))
    result = convert(source, tmp_path)
    assert result.code in (3, 6)
    assert result.error.isprintable()
    assert len(result.error) < 5000


@pytest.mark.parametrize("name", STRANGE_NAMES)
def test_strange_values_of_the_config_are_escaped(name: str, source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
    result = convert(source, tmp_path)
    assert result.code == (4 if name == "\ud800" else 5)
    assert result.error.isprintable()
    assert len(result.error) < 1000


def test_an_output_of_a_strange_name_is_printed_escaped(tiny: Path, tmp_path: Path) -> None:
    result = run_cli("hf-to-gguf", tiny, tmp_path / "red\x1b[31m.gguf")
    assert result.code == 0
    assert all(line.isprintable() for line in (result.out + result.err).splitlines())


def test_a_folder_of_links_to_blobs_converts_as_the_hub_caches_it(tiny: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(tiny.iterdir())):
        shutil.copy2(path, blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / f"{number:064x}")
    assert run_cli("hf-to-gguf", snapshot, tmp_path / "links.gguf").code == 0
    assert run_cli("hf-to-gguf", tiny, tmp_path / "files.gguf", "--name", "abc").code == 0
    assert run_cli("verify", snapshot, tmp_path / "links.gguf", "--quiet").code == 0
    assert run_cli("shard", snapshot, tmp_path / "shards", "--mp", "2", "--quiet").code == 0
    assert run_cli("dequantize", snapshot, tmp_path / "bf16", "--quiet").code == 0


OPTIONAL_FILES = ["generation_config.json", "tokenizer_config.json", "README.md"]


@pytest.mark.parametrize("kind", ["dangling", "in a circle", "to a folder", "to a pipe", "to a device"])
@pytest.mark.parametrize("file", [*JSON_FILES, *OPTIONAL_FILES])
def test_a_link_that_leads_to_no_file_is_an_error_at_once(kind: str, file: str, source: Path, tmp_path: Path) -> None:
    path = shard_of(source) if file == "a safetensors file" else source / file
    path.unlink(missing_ok=True)
    targets = {"dangling": "nowhere", "in a circle": path.name, "to a folder": ".", "to a device": "/dev/zero"}
    if kind == "to a pipe":
        os.mkfifo(tmp_path / "pipe")
        targets[kind] = str(tmp_path / "pipe")
    path.symlink_to(targets[kind])
    if file in OPTIONAL_FILES:  # an error of ours, or a conversion without it
        run_cli("hf-to-gguf", source, tmp_path / "model.gguf")
        return
    result = convert(source, tmp_path)
    assert result.code in (3, 6, 8)
    assert path.name in result.error


def test_an_output_link_is_replaced_and_its_target_left_alone(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "model.gguf").symlink_to(tmp_path / "precious")
    assert run_cli("hf-to-gguf", tiny, tmp_path / "model.gguf").code == 9
    assert run_cli("hf-to-gguf", tiny, tmp_path / "model.gguf", "--overwrite").code == 0
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "model.gguf").is_symlink()


@pytest.mark.parametrize("suffix", [".partial", ".journal"])
def test_a_link_under_a_temporary_name_is_not_followed(suffix: str, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / f"model.gguf{suffix}").symlink_to(tmp_path / "precious")
    for option in ("--resume", "--fresh", "--overwrite"):
        assert run_cli("hf-to-gguf", tiny, tmp_path / "model.gguf", option).code in (9, 13)
        assert (tmp_path / "precious").read_text() == "precious"


DENSE = [
    pytest.param(b"[],", id="empty lists"),
    pytest.param(b'"ab",', id="texts"),
    pytest.param("🦙".encode() * 8, id="wide characters"),
]
READERS = {
    "config.json": (MAX_CONFIG_BYTES, "from dsv4convert.model.config import load_config as read"),
    "model.safetensors.index.json": (
        MAX_INDEX_BYTES,
        "from dsv4convert.checkpoint.folder import read_folder_headers as read",
    ),
    "tokenizer.json": (
        MAX_TOKENIZER_BYTES,
        "from dsv4convert.checkpoint.tokenizer import load_tokenizer\ndef read(f): load_tokenizer(f, 1000)",
    ),
    "model.safetensors": (
        MAX_HEADER_BYTES,
        "from dsv4convert.containers.safetensors import read_header\ndef read(f): read_header(f / 'model.safetensors')",
    ),
    "model.manifest.json": (
        MAX_MANIFEST_BYTES,
        "from dsv4convert.engine.manifest import check_manifest\ndef read(f): check_manifest(f / 'model')",
    ),
}


@pytest.mark.parametrize("file", READERS)
@pytest.mark.parametrize("item", DENSE)
def test_json_that_is_all_objects_stays_within_a_gibibyte(file: str, item: bytes, fast_tmp: Path) -> None:
    """As large as the reader lets it be, and a little larger."""
    most, reader = READERS[file]
    for size in (most - 100, most + 100):
        body = item * (size // len(item))
        text = (b'{"a": ["' + body + b'"]}') if item.startswith(b"\xf0") else (b'{"a": [' + body + b"0]}")
        if file.endswith(".safetensors"):
            text = len(text).to_bytes(8, "little") + text
        (fast_tmp / file).write_bytes(text)
        program = (
            "import resource\nfrom pathlib import Path\nfrom dsv4convert.errors import Dsv4Error\n"
            f"{reader}\nresource.setrlimit(resource.RLIMIT_AS, ({MEMORY_LIMIT}, {MEMORY_LIMIT}))\n"
            f"try:\n read(Path({str(fast_tmp)!r}))\nexcept Dsv4Error as e:\n print('ours', e)\n"
        )
        ended = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert ended.stdout.startswith("ours "), ended.stderr[-500:]
        assert len(ended.stdout) < 2000


def test_a_million_names_of_which_one_is_there_twice_take_no_quadratic_time(tmp_path: Path) -> None:
    names = [f'"{number}":0' for number in range(1_000_000)]
    text = ("{" + ",".join((*names, '"999999":0')) + "}").encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    began = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with pytest.raises(FileFormatError, match="duplicate key '999999'"):
        read_header(tmp_path / "a.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - began < 10


def test_a_config_of_a_model_far_larger_than_its_files_is_refused_in_seconds(source: Path, tmp_path: Path) -> None:
    """65,536 experts in 1,024 layers would be four hundred million tensors."""
    config = json.loads((source / "config.json").read_text())
    config |= {"num_hidden_layers": 1024, "n_routed_experts": 65536, "compress_ratios": [0] * 1030}
    (source / "config.json").write_text(json.dumps(config))
    for path in source.glob("model*"):
        path.unlink()
    header = json.dumps({"something": {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}}).encode()
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    began = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with pytest.raises(InventoryError, match=r"200,001 tensors missing.* embed\.weight and others"):
        open_folder(source)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - began < 5
    assert convert(source, tmp_path).code == 7
