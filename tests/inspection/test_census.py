"""``check`` reads every byte once: what is not finite, or all zero, is counted and named wherever it lies."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import validate

from dsv4convert.containers.json_object import schema_path
from dsv4convert.formats.e4m3 import NAN_CODE, SIGN_BIT
from dsv4convert.formats.e8m0 import e8m0_to_f32
from dsv4convert.formats.not_finite import count_not_finite
from tests.checkpoint.test_meaning import TABLE, edit_bytes, set_id
from tests.checkpoints import MakeCheckpoint
from tests.command_line import run_cli
from tests.targets.folders import Editable

MakeEditable = Callable[..., Editable]
CODES = np.arange(256, dtype=np.uint8)
HALVES = np.arange(2**16, dtype=np.uint16)
KINDS: dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = {
    "F8_E4M3": (CODES, np.where((CODES & ~np.uint8(SIGN_BIT)) == NAN_CODE, np.nan, 0.0)),
    "F8_E8M0": (CODES, e8m0_to_f32(CODES)),
    "BF16": (HALVES, (HALVES.astype(np.uint32) << 16).view(np.float32)),
    "F16": (HALVES, HALVES.view(np.float16)),
    "F32": (HALVES.astype(np.uint32) << 16 | 1, (HALVES.astype(np.uint32) << 16 | 1).view(np.float32)),
    "I8": (CODES, np.zeros(256)),
    "I64": (np.full(8, -1, np.int64), np.zeros(8)),
}


@pytest.mark.parametrize("dtype", KINDS)
def test_all_codes_are_told_apart(dtype: str) -> None:
    codes, values = KINDS[dtype]
    scratch = np.empty(codes.nbytes, np.uint8)
    for content, expected in ((codes, np.count_nonzero(~np.isfinite(values))), (codes[np.isfinite(values)], 0)):
        assert count_not_finite(dtype, np.ascontiguousarray(content).view(np.uint8), scratch) == expected


def checked(folder: Path, *options: str) -> dict[str, Any]:
    result = run_cli("check", folder, "--json", "--threads", "2", *options)
    assert result.code == 0, result.err
    report: dict[str, Any] = json.loads(result.out)
    validate(report, json.loads(schema_path("check.schema.json").read_text()))
    return report


@pytest.mark.parametrize("options", [{}, {"variant": "base"}, {"variant": "vision"}, {"preset": "v41-tiny"}], ids=str)
def test_a_sound_checkpoint_has_nothing_suspicious(options: dict[str, Any], make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(**options)
    report = checked(folder)
    payload = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            payload += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    assert (report["verdict"], report["findings"]) == ("ok", [])
    assert report["bytes_read"] == payload


def test_one_bad_value_anywhere_is_counted_and_named(editable: MakeEditable) -> None:
    source = editable().folder

    def last(code: int) -> Callable[[np.ndarray[Any, Any]], None]:
        return lambda content: content.__setitem__(-1, code)

    edit_bytes(source, "embed.weight", lambda content: content.view("<u2").__setitem__(slice(-2, None), 0x7F80))
    edit_bytes(source, "layers.1.attn.wq_b.weight", last(0xFF))
    edit_bytes(source, "layers.1.ffn.experts.3.w2.weight", last(0xFF), scale=True)
    (finding,) = checked(source)["findings"]
    assert finding["what"] == "NaN or infinite values in 3 tensors"
    assert sorted(finding["names"]) == [
        "embed.weight (2)",
        "layers.1.attn.wq_b.weight (1)",
        "layers.1.ffn.experts.3.w2.scale (1)",
    ]
    result = run_cli("check", source, "--strict")
    assert result.code == 7
    assert "NaN or infinite values in 3 tensors" in result.error
    assert run_cli("check", source).out.endswith("\n1 finding\n")


def test_zeros_are_named_as_experts_where_all_of_one_is_zero(editable: MakeEditable) -> None:
    source = editable().folder
    for matrix in ("w1", "w2", "w3"):
        edit_bytes(source, f"layers.2.ffn.experts.5.{matrix}.weight", lambda content: content.fill(0))
    edit_bytes(source, "layers.0.ffn.experts.1.w3.weight", lambda content: content.fill(0))
    edit_bytes(source, "layers.0.attn.wq_a.weight", lambda content: content[:-1].fill(0))
    findings = {finding["what"]: finding["names"] for finding in checked(source)["findings"]}
    assert findings == {
        "all bytes are zero in 1 expert": ["layers.2.ffn.experts.5"],
        "all bytes are zero in 1 tensor": ["layers.0.ffn.experts.1.w3.weight"],
    }


def test_tables_are_checked_too(editable: MakeEditable) -> None:
    source = editable().folder
    edit_bytes(source, TABLE, set_id(5, 0, 99))
    assert f"tensor {TABLE}: row 5 names an expert that is not there" in run_cli("check", source).error


def test_memory_stays_small_whatever_the_size(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("nano", ratios=[0, 4])
    program = (
        "import sys, runpy; sys.argv[0] = 'dsv4convert'\n"
        "from dsv4convert.api import check\n"
        "check(sys.argv[1], threads=2)\n"
        "from pathlib import Path\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 128 * 1024
