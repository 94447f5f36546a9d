"""``dequantize`` and ``repack`` from the command line: summaries, plans, one-line errors and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ..checkpoints import MakeCheckpoint
from ..oracles.plain_folders import read_folder
from ..targets.folders import Editable


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dsv4convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def fails(code: int, *arguments: object) -> str:
    done = run(*arguments)
    assert done.returncode == code, done
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_dequantize_says_what_it_wrote_and_counted(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("dequantize", tiny, out, "--dtype", "f16", "--names", "transformers", "--max-file-size", "4MB")
    assert done.returncode == 0, done.stderr
    assert f"wrote {out}/model-00001-of-00003.safetensors" in done.stdout
    assert "note: mtp.* keeps its official names" in done.stdout
    assert "counted in lm_head.weight: 10 underflow" in done.stdout
    assert len(list(out.glob("*.safetensors"))) == 3


def test_repack_says_how_many_elements_changed(editable: Callable[..., Editable], tmp_path: Path) -> None:
    source = editable()
    name = "layers.2.ffn.experts.5.w2"

    def spread(scales: np.ndarray[Any, Any]) -> None:
        scales[:] = 120
        scales[7, 1] = 80

    source.edit(f"{name}.scale", spread)
    codes = read_folder(source.folder)[f"{name}.weight"].values.view(np.uint8)[7, 16:32]
    nonzero = int(np.count_nonzero(codes & 0x07) + np.count_nonzero(codes & 0x70))  # -0.0 stays -0.0
    text = run("repack", source.folder, tmp_path / "out", "--experts", "fp8").stdout
    assert f"{nonzero:,} of 1,843,200 elements of the experts changed" in text
    assert f"counted in {name}.weight: {nonzero} changed" in text
    summary = json.loads(
        run("repack", source.folder, tmp_path / "out", "--experts", "fp8", "--json", "--overwrite").stdout
    )
    assert (summary["changed_elements"], summary["expert_elements"]) == (nonzero, 1843200)
    assert [(entry["tensor"], entry["changed"]) for entry in summary["counted"]] == [(f"{name}.weight", nonzero)]
    error = fails(11, "repack", source.folder, tmp_path / "exact", "--experts", "fp8", "--strict")
    assert f"tensor {name}.weight: not exact" in error
    assert f"got {nonzero} changed" in error
    assert not list(tmp_path.glob("exact*"))


@pytest.mark.parametrize("command", [["dequantize"], ["repack", "--experts", "fp8"]], ids=["dequantize", "repack"])
def test_dry_run_writes_nothing_and_tells_the_needs(command: list[str], tiny: Path, tmp_path: Path) -> None:
    done = run(*command, tiny, tmp_path / "out", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert list(tmp_path.iterdir()) == []
    run(*command, tiny, tmp_path / "out", "--quiet")
    assert plan["disk_needed"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


def test_strict_ends_with_its_own_exit_code(tiny: Path, tmp_path: Path) -> None:
    error = fails(11, "dequantize", tiny, tmp_path / "out", "--dtype", "f16", "--strict")
    assert "head.weight: not exact" in error
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_line_and_its_exit_code(
    tiny: Path, make_checkpoint: MakeCheckpoint, editable: Callable[..., Editable], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    fails(3, "dequantize", tmp_path / "nowhere", out)
    assert "not a size" in fails(2, "dequantize", tiny, out, "--max-file-size", "much")
    assert "lies inside" in fails(2, "dequantize", tiny, tiny / "out")
    assert "no packed FP4 experts" in fails(
        5, "repack", make_checkpoint("tiny", variant="base"), out, "--experts", "fp8"
    )
    source = editable().folder
    with (source / "model-00002-of-00002.safetensors").open("r+b") as file:
        file.truncate(100_000)
    assert "model-00002-of-00002.safetensors" in fails(6, "dequantize", source, out)
    (source / "model-00002-of-00002.safetensors").unlink()
    fails(3, "repack", source, out, "--experts", "fp8")
    assert not out.exists()
