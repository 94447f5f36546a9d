"""``verify`` from the command line: exit codes by verdict, one-line errors, reports that keep to their schema."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from dsv4convert.api import parse_sample
from dsv4convert.containers.json_object import schema_path
from dsv4convert.engine.manifest import manifest_of
from dsv4convert.errors import UsageError, VerifyError

from ..oracles.gguf_bytes import RawGguf
from .conversions import Make


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dsv4convert", "verify", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def check_schema(document: dict[str, Any], name: str = "verify.schema.json") -> None:
    schema = json.loads(schema_path(name).read_text())
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(document)


def damage(path: Path) -> None:
    raw = RawGguf.read(path)
    info = raw.info("blk.0.attn_sinks.weight")
    info.data = bytes(len(info.data))
    raw.key("deepseek4.block_count").value = b"\x05\0\0\0"
    raw.write(path)


def test_a_good_output_says_so_and_exits_with_0(small: Path, outputs: Make) -> None:
    done = run(small, outputs("gguf"))
    assert done.returncode == 0, done
    lines = done.stdout.splitlines()
    assert lines[0].startswith("GGUF: ")
    assert lines[0].endswith(" 0 wrong")
    assert lines[-1] == "verified"
    assert any(line.split()[:2] == ["fp8", "q8_0"] for line in lines)
    assert any(line.startswith("the draft layers ") for line in lines)
    assert done.stderr == ""


@pytest.mark.parametrize("kind", ["gguf", "bf16", "shards-2"])
def test_the_report_of_a_good_output_keeps_to_its_schema(kind: str, small: Path, outputs: Make) -> None:
    done = run(small, outputs(kind), "--json")
    assert done.returncode == 0, done
    report = json.loads(done.stdout)
    check_schema(report)
    assert report["verdict"] == "ok"
    assert report["elements_compared"] == report["elements"] > 0
    assert report["tensors"]["wrong"] == 0
    assert report["sample"] is None


def test_a_bad_output_is_listed_and_exits_with_12(small: Path, copy_of: Make) -> None:
    path = copy_of("gguf")
    damage(path)
    done = run(small, path)
    assert done.returncode == VerifyError.exit_code == 12
    assert "key: deepseek4.block_count: expected 4, got 5" in done.stdout
    assert "tensor: tensor blk.0.attn_sinks.weight: 8 of 8 elements are wrong (f32 to f32)" in done.stdout
    assert "verified" not in done.stdout
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {path}: the output differs from the source: ")
    assert "more problem" in done.stderr


def test_the_report_of_a_bad_output_keeps_to_its_schema(small: Path, copy_of: Make) -> None:
    path = copy_of("gguf")
    damage(path)
    done = run(small, path, "--json", "--threads", "2")
    assert done.returncode == 12
    report = json.loads(done.stdout)
    check_schema(report)
    assert report["verdict"] == "differs"
    assert {problem["kind"] for problem in report["problems"]} == {"key", "tensor"}
    wrong = [entry for entry in report["inexact"] if entry["verdict"] == "wrong"]
    assert [entry["name"] for entry in wrong] == ["blk.0.attn_sinks.weight"]
    assert wrong[0]["first_index"] == [0]


def test_an_output_that_cannot_be_read_is_a_verdict(small: Path, copy_of: Make) -> None:
    path = copy_of("gguf")
    path.write_bytes(path.read_bytes()[:1000])
    done = run(small, path, "--json")
    assert done.returncode == 12
    report = json.loads(done.stdout)
    check_schema(report)
    assert "extends past the end of the file" in report["problems"][0]["what"]


def test_a_sample_is_said_to_be_one(small: Path, outputs: Make) -> None:
    done = run(small, outputs("gguf"), "--sample", "2%", "--seed", "3")
    assert done.returncode == 0, done
    assert "sample of 2%: " in done.stdout
    report = json.loads(run(small, outputs("gguf"), "--sample", "2%", "--seed", "3", "--json").stdout)
    check_schema(report)
    assert (report["sample"], report["seed"]) == (0.02, 3)
    assert 0 < report["elements_compared"] < report["elements"]


def test_quiet_says_nothing(small: Path, outputs: Make) -> None:
    done = run(small, outputs("gguf"), "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("SMALL",), 2, "output is missing"),
        (("SMALL", "nowhere.gguf"), 3, "nowhere.gguf: no such file or folder"),
        (("nowhere", "OUT"), 3, "nowhere: no such folder"),
        (("SMALL", "SMALL"), 2, "source and output are the same"),
        (("SMALL", "OUT", "--sample", "0%"), 2, "--sample: not a fraction"),
        (("SMALL", "OUT", "--sample", "150%"), 2, "--sample: not a fraction"),
        (("SMALL", "OUT", "--manifest"), 2, "--manifest takes only the output"),
        (("OUT", "--manifest", "--seed", "0"), 2, "--manifest takes only the output"),
        (("OUT", "--manifest", "--ignore-key", "general.name"), 2, "--manifest takes only the output"),
        (("OUT", "OUT"), 5, "a GGUF file cannot be converted"),
    ],
    ids=[
        "no_output",
        "no_such_output",
        "no_such_source",
        "same",
        "sample_0",
        "sample_150",
        "manifest",
        "seed",
        "key",
        "not_a_source",
    ],
)
def test_bad_usage_is_one_line(arguments: tuple[str, ...], code: int, message: str, small: Path, outputs: Make) -> None:
    known = {"SMALL": small, "OUT": outputs("gguf")}
    done = run(*(known.get(argument, argument) for argument in arguments))
    assert done.returncode == code, done
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    ("text", "fraction"), [("2%", 0.02), ("0.5", 0.5), ("100%", 1.0), (".25%", 0.0025), ("1", 1.0)]
)
def test_samples_are_percentages_or_fractions(text: str, fraction: float) -> None:
    assert parse_sample(text) == pytest.approx(fraction)


@pytest.mark.parametrize("text", ["", "%", "-1", "1e-3", "nan", "2 %%", "0", "101%", "1.5"])
def test_other_samples_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_sample(text)


def copy_with_manifest(output: Path, folder: Path) -> Path:
    """Copy an output and the manifest beside it."""
    target = folder / output.name
    if output.is_dir():
        shutil.copytree(output, target)
    else:
        shutil.copy(output, target)
    shutil.copy(manifest_of(output), manifest_of(target))
    return target


@pytest.mark.parametrize("kind", ["gguf", "bf16", "shards-2"])
def test_manifest_rechecks_checksums_without_the_source(kind: str, outputs: Make) -> None:
    done = run("--manifest", outputs(kind), "--json")
    assert done.returncode == 0, done
    report = json.loads(done.stdout)
    check_schema(report, "verify-manifest.schema.json")
    assert report["verdict"] == "ok"
    assert report["bytes"] > 1_000_000


@pytest.mark.parametrize("kind", ["gguf", "shards-2"])
def test_manifest_names_the_tensor_that_changed(kind: str, outputs: Make, tmp_path: Path) -> None:
    output = copy_with_manifest(outputs(kind), tmp_path)
    path = output if output.is_file() else output / "model1-mp2.safetensors"
    with path.open("r+b") as file:
        file.seek(-100, 2)
        byte = file.read(1)[0]
        file.seek(-100, 2)
        file.write(bytes([byte ^ 4]))
    done = run("--manifest", output)
    assert done.returncode == 12
    assert done.stdout.splitlines()[1].endswith(": the bytes differ")
    assert "the output differs from the manifest" in done.stderr
    assert done.stderr.count("\n") == 1
    report = json.loads(run("--manifest", output, "--json").stdout)
    check_schema(report, "verify-manifest.schema.json")
    assert [mismatch["file"] for mismatch in report["mismatches"]] == [path.name]


def test_without_a_manifest_the_error_says_so(outputs: Make, tmp_path: Path) -> None:
    output = shutil.copy(outputs("gguf"), tmp_path / "lonely.gguf")
    done = run("--manifest", output)
    assert done.returncode == 3
    assert "manifest is missing" in done.stderr
