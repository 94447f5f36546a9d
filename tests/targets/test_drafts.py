"""``--draft drop`` of the commands that write checkpoint folders: the draft is gone, the rest is as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv4convert.containers.safetensors import Stored, read_header
from dsv4convert.engine.conversion import execute
from dsv4convert.errors import UsageError
from dsv4convert.targets.dequantize import plan_dequantize
from dsv4convert.verification import verify

from ..checkpoints import MakeCheckpoint
from ..command_line import run_cli

COMMANDS = {
    "dequantize": ("dequantize",),
    "stacked": ("dequantize", "--names", "transformers"),
    "repack": ("repack", "--experts", "fp8"),
    "unshard": ("unshard",),
}


def tensors(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every tensor of a folder."""

    def read(stored: Stored) -> bytes:
        with stored.file.open("rb") as file:
            file.seek(stored.offset)
            return file.read(stored.nbytes)

    return {name: read(t) for path in sorted(folder.glob("*.safetensors")) for name, t in read_header(path).items()}


@pytest.mark.parametrize("variant", [None, "dspark"], ids=["MTP", "DSpark"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_dropped_draft_leaves_the_rest_as_it_was(
    command: str, variant: str | None, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = source = make_checkpoint("tiny", variant=variant)
    if command == "unshard":
        source = tmp_path / "shards"
        assert run_cli("shard", checkpoint, source, "--mp", 2, "--quiet").code == 0
    name, *options = COMMANDS[command]
    assert run_cli(name, source, tmp_path / "whole", *options, "--draft", "keep", "--quiet").code == 0
    result = run_cli(name, source, tmp_path / "trunk", *options, "--draft", "drop", "--json")
    whole, trunk = tensors(tmp_path / "whole"), tensors(tmp_path / "trunk")
    assert trunk == {name: data for name, data in whole.items() if not name.startswith("mtp.")}
    assert len(trunk) < len(whole)
    config = json.loads((tmp_path / "trunk" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0
    assert not any(key.startswith("dspark_") for key in config)
    assert len(config["compress_ratios"]) == config["num_hidden_layers"]
    of_draft = [n for n in tensors(checkpoint) if n.startswith("mtp.")]
    dropped = next(entry for entry in json.loads(result.out)["dropped"] if entry["what"] == "mtp.*")
    assert dropped["reason"] == "--draft drop"
    if command != "unshard":  # where every rank's part counts
        assert dropped["count"] == len(of_draft)
    report = verify(checkpoint, tmp_path / "trunk")
    assert report.ok, report.problems
    assert any(entry.what == "the draft layers" for entry in report.left_out)


def test_a_source_without_a_draft_has_none_to_drop(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("tiny", mtp=False)
    assert execute(plan_dequantize(source, tmp_path / "out", draft="drop"), threads=1).dropped == ()


def test_other_ways_to_treat_a_draft_are_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--draft: unknown: expected keep or drop, got split"):
        plan_dequantize(tiny, tmp_path / "out", draft="split")
    for name, *options in COMMANDS.values():
        result = run_cli(name, tiny, tmp_path / "out", *options, "--draft", "only")
        assert result.code == 2
        assert "'only' is not one of 'keep', 'drop'" in result.error
