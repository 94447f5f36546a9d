"""The manifest: what is in it, and that checking it catches any change of the output."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import jsonschema
import pytest
import xxhash

from dsv4convert.containers.json_object import schema_path
from dsv4convert.engine.conversion import execute
from dsv4convert.engine.manifest import check_manifest, manifest_path, read_manifest
from dsv4convert.errors import FileFormatError, InputMissingError
from dsv4convert.plan import Plan

from ..command_line import run_cli
from .plans import PLANS

FLIPS = 60


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> Plan:
    plan = PLANS[request.param](tiny, tmp_path)
    execute(plan, threads=2)
    return plan


def test_a_manifest_fits_its_schema(plan: Plan) -> None:
    schema = json.loads(schema_path("manifest.schema.json").read_text())
    jsonschema.validate(json.loads(manifest_path(plan).read_text()), schema)


def test_checksums_are_those_of_the_bytes_as_documented(plan: Plan) -> None:
    """Worked out anew from the file: header, segments, tensors, file."""
    manifest = json.loads(manifest_path(plan).read_text())
    for entry in manifest["files"]:
        data = (plan.destination / entry["name"]).read_bytes()
        assert len(data) == entry["bytes"]
        assert xxhash.xxh3_128_hexdigest(data[: entry["header_bytes"]]) == entry["header"]
        for tensor in entry["tensors"]:
            position, parts = tensor["offset"], []
            for count, size in tensor["segments"]:
                for _ in range(count):
                    parts.append(xxhash.xxh3_128_digest(data[position : position + size]))
                    position += size
            whole = parts[0].hex() if len(parts) == 1 else xxhash.xxh3_128_hexdigest(b"".join(parts))
            assert whole == tensor["checksum"]
        listed = bytes.fromhex(entry["header"] + "".join(tensor["checksum"] for tensor in entry["tensors"]))
        assert xxhash.xxh3_128_hexdigest(listed) == entry["checksum"]


def test_equal_outputs_have_equal_manifests(plan: Plan, tmp_path: Path) -> None:
    first = manifest_path(plan).read_bytes()
    execute(plan, threads=1, overwrite=True)
    assert manifest_path(plan).read_bytes() == first


def test_any_flipped_bit_is_found_and_placed(plan: Plan) -> None:
    rng = random.Random(0)
    output = plan.output_path()
    sizes = [file.nbytes for file in plan.files]
    for _ in range(FLIPS):
        index = rng.choices(range(len(sizes)), sizes)[0]
        path = plan.final_paths()[index]
        at = rng.randrange(sizes[index])
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))
        report = check_manifest(output)
        assert [mismatch.file for mismatch in report.mismatches] == [path.name]
        tensor = report.mismatches[0].tensor
        inside = [t.name for t in plan.files[index].tensors if t.offset <= at < t.offset + t.nbytes]
        if inside:
            assert tensor == inside[0]
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([byte]))
    assert check_manifest(output).ok


@pytest.mark.parametrize("damage", ["shorter", "longer", "gone"])
def test_files_that_are_not_as_listed_are_found(plan: Plan, damage: str) -> None:
    path = plan.final_paths()[-1]
    if damage == "shorter":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "longer":
        path.write_bytes(path.read_bytes() + b"\0")
    else:
        path.unlink()
    report = check_manifest(plan.output_path())
    assert len(report.mismatches) == 1


def test_a_file_too_many_in_a_folder_is_found(tiny: Path, tmp_path: Path) -> None:
    plan = PLANS["shard"](tiny, tmp_path)
    execute(plan, threads=2)
    (plan.destination / "extra").write_text("")
    (mismatch,) = check_manifest(plan.output_path()).mismatches
    assert (mismatch.file, mismatch.what) == ("extra", "is not in the manifest")


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_verify_manifest_says_ok_or_exits_with_12(plan: Plan, as_json: bool) -> None:
    arguments = ("verify", "--manifest", plan.output_path(), *(["--json"] if as_json else []))
    result = run_cli(*arguments)
    assert result.code == 0
    if as_json:
        assert json.loads(result.out)["verdict"] == "ok"
    path = plan.final_paths()[0]
    data = bytearray(path.read_bytes())
    data[plan.files[0].tensors[0].offset] ^= 1
    path.write_bytes(data)
    result = run_cli(*arguments)
    assert result.code == 12
    name = plan.files[0].tensors[0].name
    assert f"{path.name}: tensor {name}: the bytes differ" in result.error
    if as_json:
        document = json.loads(result.out)
        assert document["verdict"] == "differs"
        assert [(m["file"], m["tensor"]) for m in document["mismatches"]] == [(path.name, name)]


def test_an_output_without_manifest_says_so(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    result = run_cli("verify", "--manifest", tmp_path / "model.gguf")
    assert result.code == 3
    assert "model.gguf.manifest.json: manifest is missing" in result.error
    with pytest.raises(InputMissingError):
        check_manifest(tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["../../etc/passwd", "..", "", "a/b", "a\0b"])
def test_a_manifest_that_leads_out_of_the_folder_is_refused(tiny: Path, tmp_path: Path, name: str) -> None:
    plan = PLANS["gguf"](tiny, tmp_path)
    execute(plan, threads=2)
    manifest = json.loads(manifest_path(plan).read_text())
    manifest["files"][0]["name"] = name
    manifest_path(plan).write_text(json.dumps(manifest))
    with pytest.raises(FileFormatError, match="not a manifest"):
        read_manifest(manifest_path(plan))


def test_a_moved_output_keeps_its_manifest(tiny: Path, tmp_path: Path) -> None:
    plan = PLANS["shard"](tiny, tmp_path)
    execute(plan, threads=2)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(plan.output_path(), tmp_path / "elsewhere" / "shards")
    shutil.move(manifest_path(plan), tmp_path / "elsewhere")
    assert check_manifest(tmp_path / "elsewhere" / "shards").ok
