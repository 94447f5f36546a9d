"""``--draft`` of the commands that write folders: the draft is gone, alone, or in a folder of its own."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import dsv4convert
from dsv4convert.containers.safetensors import read_header
from dsv4convert.engine import resources
from dsv4convert.engine.conversion import execute
from dsv4convert.engine.manifest import check_manifest
from dsv4convert.errors import InputOutputError, OutputExistsError, ResumeError, SpaceError, UsageError
from dsv4convert.inspection.describe import inspect_path
from dsv4convert.targets.dequantize import plan_dequantize
from dsv4convert.verification import verify

from ..checkpoints import MakeCheckpoint
from ..command_line import run_cli
from ..engine.plans import failing_after

COMMANDS = {
    "dequantize": ("dequantize",),
    "stacked": ("dequantize", "--names", "transformers"),
    "repack": ("repack", "--experts", "fp8"),
    "repack to nvfp4": ("repack", "--experts", "nvfp4", "--draft-experts"),
    "unshard": ("unshard",),
}


def tensors(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every tensor of a folder; those of a rank's shard as NAME@RANK."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.safetensors")):
        rank = re.search(r"\d+(?=-mp)", path.name)
        content = path.read_bytes()
        for name, stored in read_header(path).items():
            key = name if rank is None else f"{name}@{rank[0]}"
            found[key] = content[stored.offset : stored.offset + stored.nbytes]
    return found


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


WRITERS = {
    "dequantize": ("dequantize", "--dtype", "f32"),
    "repack": ("repack", "--experts", "fp8"),
    "shard": ("shard", "--mp", 2),
    "shard to fp8": ("shard", "--mp", 2, "--experts", "fp8"),
    "unshard": ("unshard",),
}


def write(command: str, source: Path, out: Path, draft: str, *options: str) -> dict[str, Any]:
    """Run a command of WRITERS; return its summary."""
    if command == "unshard":
        shards = out.parent / f"{out.name}-shards"
        assert run_cli("shard", source, shards, "--mp", 2, "--quiet").code == 0
        source = shards
    name, *own = WRITERS[command]
    result = run_cli(name, source, out, *own, "--draft", draft, "--json", *options)
    assert result.code == 0, result.error
    found: dict[str, Any] = json.loads(result.out)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Every command with an MTP layer, and of V4.1 with DSpark stages and a vision tower; one with DSpark stages of V4.
SOURCES: dict[str, dict[str, str]] = {"MTP": {}, "DSpark": {"variant": "dspark"}, "V4.1": {"preset": "v41-tiny"}}


@pytest.mark.parametrize(
    ("command", "kind"), [("repack", "DSpark"), *((command, kind) for command in WRITERS for kind in ("MTP", "V4.1"))]
)
def test_a_split_is_the_model_without_its_draft_and_the_draft_alone(
    command: str, kind: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint(**SOURCES[kind])
    whole = write(command, source, tmp_path / "whole", "keep")
    drop, only = (write(command, source, tmp_path / mode, mode) for mode in ("drop", "only"))
    split = write(command, source, tmp_path / "o", "split")
    assert files(tmp_path / "o") == files(tmp_path / "drop")
    assert files(tmp_path / "o-draft") == files(tmp_path / "only")
    # Each tensor of the whole model stands in one of the two, with the same bytes.
    trunk, alone = tensors(tmp_path / "o"), tensors(tmp_path / "o-draft")
    assert trunk | alone == tensors(tmp_path / "whole")
    assert all(name.startswith("mtp.") for name in alone)
    assert not any(name.startswith("mtp.") for name in trunk)
    assert split["dropped"] == whole["dropped"]
    assert [entry["reason"] for entry in only["dropped"]] == ["--draft only"]
    assert split["tensors"] == whole["tensors"] == drop["tensors"] + only["tensors"]
    assert split["written_bytes"] == drop["written_bytes"] + only["written_bytes"]
    assert [file["path"] for file in split["files"]] == [
        str(tmp_path / folder / Path(file["path"]).name)
        for folder, part in (("o", drop), ("o-draft", only))
        for file in part["files"]
    ]
    if command == "repack":
        assert split["expert_elements"] == whole["expert_elements"]
    if command.startswith("shard"):
        assert split["costs"]["replicated"] == whole["costs"]["replicated"]
    report = verify(source, tmp_path / "o-draft")
    assert report.ok, report.problems
    assert [entry.what for entry in report.left_out] == ["the model without its draft"]
    assert report.results
    assert all("mtp." in name for name in report.results)
    assert verify(source, tmp_path / "o").ok
    found = inspect_path(tmp_path / "o-draft")
    assert found.unexpected == []
    assert found.draft == inspect_path(source).draft
    assert any(note.startswith("a draft alone") for note in found.notes)
    # The config is that of the whole model: what the two share stands in it.
    mine, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "o-draft", source))
    for key in ("text_config", "num_hidden_layers", "compress_ratios", "num_nextn_predict_layers", "vision_dim"):
        assert mine.get(key) == theirs.get(key), key


def test_a_changed_byte_of_a_draft_alone_is_found(tiny: Path, tmp_path: Path) -> None:
    write("repack", tiny, tmp_path / "o", "only")
    weights = tmp_path / "o" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[read_header(weights)["mtp.0.attn.wq_a.weight"].offset] ^= 1
    weights.write_bytes(data)
    assert [problem.where for problem in verify(tiny, tmp_path / "o").problems] == ["tensor mtp.0.attn.wq_a.weight"]


@pytest.mark.parametrize("draft", ["drop", "only"])
def test_a_rank_of_another_choice_of_draft_is_found(draft: str, tiny: Path, tmp_path: Path) -> None:
    write("shard", tiny, tmp_path / "o", "keep")
    write("shard", tiny, tmp_path / "other", draft)
    shutil.copy(tmp_path / "other" / "model1-mp2.safetensors", tmp_path / "o" / "model1-mp2.safetensors")
    problems = verify(tiny, tmp_path / "o").problems
    assert {problem.kind for problem in problems} == {"missing"}
    assert all(problem.where.startswith("rank 1: tensor ") for problem in problems)


def test_a_draft_alone_is_no_model(tiny: Path, tmp_path: Path) -> None:
    write("shard", tiny, tmp_path / "shards", "only")
    write("repack", tiny, tmp_path / "folder", "only")
    for arguments in (
        ("unshard", tmp_path / "shards", tmp_path / "o"),
        ("dequantize", tmp_path / "folder", tmp_path / "o"),
        ("hf-to-gguf", tmp_path / "folder", tmp_path / "o.gguf"),
        ("forward", tmp_path / "shards", "--tokens", "1"),
        ("check", tmp_path / "folder"),
    ):
        result = run_cli(*arguments)
        assert result.code == 7, arguments
        assert "a draft without its model, as --draft only and split write it; pass the folder" in result.error


def test_a_source_without_a_draft_has_none_to_write(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("tiny", mtp=False)
    for draft in ("only", "split"):
        result = run_cli("dequantize", source, tmp_path / "o", "--draft", draft)
        assert result.code == 2
        assert result.error == f"{source}: --draft: the source has no draft to be written to a folder of its own"
    assert list(tmp_path.iterdir()) == []


def test_a_draft_has_no_names_of_transformers(tiny: Path, tmp_path: Path) -> None:
    for draft in ("only", "split"):
        result = run_cli("dequantize", tiny, tmp_path / "o", "--draft", draft, "--names", "transformers")
        assert result.code == 2
        assert "--names transformers: transformers has no draft; write the draft by a second run" in result.error
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_way_to_treat_a_draft_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--draft: unknown: expected keep, drop or only, got split"):
        plan_dequantize(tiny, tmp_path / "out", draft="split")
    with pytest.raises(UsageError, match="--draft: unknown: expected keep, drop, only or split, got none"):
        dsv4convert.dequantize(tiny, tmp_path / "out", draft="none")


# A split is two outputs, one after the other


def test_nothing_is_written_where_the_folder_of_the_draft_is_in_the_way(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "o-draft").mkdir()
    (tmp_path / "o-draft" / "mine").write_text("x")
    result = run_cli("repack", tiny, tmp_path / "o", "--experts", "fp8", "--draft", "split")
    assert (result.code, result.error.split(";")[0]) == (9, f"{tmp_path / 'o-draft'}: already exists and is not empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o-draft"]


def test_room_for_both_parts_is_needed_before_the_first_begins(tiny: Path, tmp_path: Path) -> None:
    both = write("dequantize", tiny, tmp_path / "o", "split", "--dry-run")["disk_needed"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resources, "free_bytes", lambda _: both - 1)
        with pytest.raises(SpaceError, match=f"expected {both} bytes free, got {both - 1}"):
            dsv4convert.dequantize(tiny, tmp_path / "o", dtype="f32", draft="split")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", [20, 230], ids=["in the model", "in the draft"])
def test_an_interrupted_split_resumes_where_it_stopped(after: int, tiny: Path, tmp_path: Path) -> None:
    whole = write("dequantize", tiny, tmp_path / "whole", "split")
    convert = partial(dsv4convert.dequantize, tiny, tmp_path / "o", dtype="f32", draft="split", threads=1)
    with failing_after(after), pytest.raises(InputOutputError):
        convert()
    assert (tmp_path / "o").exists() == (after == 230)
    assert not (tmp_path / "o-draft").exists()
    with pytest.raises((ResumeError, OutputExistsError)):
        convert()
    done: list[tuple[int, int]] = []
    summary = convert(resume=True, progress=lambda *now: done.append(now))
    for suffix in ("", "-draft"):
        assert files(tmp_path / f"o{suffix}") == files(tmp_path / f"whole{suffix}")
        assert not (tmp_path / f"o{suffix}.journal").exists()
        assert check_manifest(tmp_path / f"o{suffix}").ok
    assert 0 < summary.resumed_bytes < summary.written_bytes == whole["written_bytes"]
    assert done == sorted(done)
    assert done[-1] == (whole["written_bytes"], whole["written_bytes"])
    assert convert(resume=True).resumed_bytes == whole["written_bytes"]
