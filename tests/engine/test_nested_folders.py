"""Folders within an output folder: made, resumed and replaced with it, and nothing of anybody else's in them lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4convert.engine.conversion import execute
from dsv4convert.engine.manifest import check_manifest
from dsv4convert.engine.names import entries_within, folders_of_names
from dsv4convert.engine.outputs import partial_path
from dsv4convert.errors import InputOutputError, OutputExistsError, ResumeError
from dsv4convert.plan import CopySegments, OutputFile, OutputTensor, Plan

from .plans import contents, failing_after, interrupt

CONTENT = b"weights of a source, more or less"
ARRAY = "0/items/params.params.{leaf}/0"


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return plan_of(tmp_path, ["kernel", "scale", "sinks"])


def plan_of(folder: Path, leaves: list[str]) -> Plan:
    """Return a plan of a folder with files next to folders, whose content is that of one source."""
    source = folder / "source"
    source.write_bytes(CONTENT)
    names = ["maxtext.yml", *(ARRAY.format(leaf=leaf) for leaf in leaves)]
    files = [OutputFile(name, b"head", (tensor(name, source),), len(b"head") + len(CONTENT)) for name in names]
    return Plan("maxtext", source, folder / "out", True, tuple(files), (), {"leaves": leaves}, len(CONTENT))


def tensor(name: str, source: Path) -> OutputTensor:
    return OutputTensor(name, "U8", (len(CONTENT),), 4, len(CONTENT), CopySegments(source, 0, len(CONTENT)))


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_is_made_with_folders_in_it(plan: Plan) -> None:
    execute(plan, threads=1)
    assert all((plan.destination / file.name).read_bytes() == b"head" + CONTENT for file in plan.files)
    assert check_manifest(plan.destination).ok
    assert names_in(plan.destination.parent) == sorted(
        ["source", "out", "out.manifest.json", "out/0", "out/0/items", "out/maxtext.yml"]
        + [f"out/0/items/params.params.{leaf}{end}" for leaf in ("kernel", "scale", "sinks") for end in ("", "/0")]
    )


@pytest.mark.parametrize("after", [0, 2, 3])
def test_an_interrupted_run_is_resumed(plan: Plan, after: int, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = plan_of(tmp_path / "whole", ["kernel", "scale", "sinks"])
    execute(whole, threads=1)
    interrupt(plan, after)
    with pytest.raises(ResumeError):
        execute(plan, threads=1)
    execute(plan, threads=1, resume=True)
    manifest = "out.manifest.json"
    assert {**contents(plan), manifest: b""} == {**contents(whole), manifest: b""}


def test_a_file_that_is_gone_from_an_inner_folder_is_named(plan: Plan) -> None:
    interrupt(plan, 3)
    gone = partial_path(plan.destination) / plan.files[1].name
    gone.unlink()
    gone.parent.rmdir()
    with pytest.raises(ResumeError, match=r"kernel/0: file of the interrupted run is missing or changed"):
        execute(plan, threads=1, resume=True)
    execute(plan, threads=1, fresh=True)
    assert check_manifest(plan.destination).ok


def test_an_older_output_with_other_folders_is_replaced(plan: Plan, tmp_path: Path) -> None:
    execute(plan_of(tmp_path, ["other", "kernel"]), threads=1)
    execute(plan, threads=1, overwrite=True)
    assert check_manifest(plan.destination).ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.manifest.json", "source"]


def test_an_older_output_stays_whole_when_its_successor_fails(plan: Plan, tmp_path: Path) -> None:
    older = plan_of(tmp_path, ["other", "kernel"])
    execute(older, threads=1)
    before = contents(older)
    with failing_after(2), pytest.raises(InputOutputError):
        execute(plan, threads=1, overwrite=True)
    assert contents(older) == before
    execute(plan, threads=1, overwrite=True, resume=True)
    assert check_manifest(plan.destination).ok


@pytest.mark.parametrize("name", ["0/notes", "0/items/params.params.kernel/notes", "notes/deep/file", "models/run.py"])
def test_what_no_conversion_wrote_keeps_a_folder_from_being_replaced(plan: Plan, name: str) -> None:
    execute(plan, threads=1)
    stranger = plan.destination / name
    stranger.parent.mkdir(parents=True, exist_ok=True)
    stranger.write_text("mine")
    assert not check_manifest(plan.destination).ok
    with pytest.raises(OutputExistsError, match="which no conversion wrote"):
        execute(plan, threads=1, overwrite=True)
    assert stranger.read_text() == "mine"


def test_a_linked_folder_is_not_followed(plan: Plan, tmp_path: Path) -> None:
    execute(plan, threads=1)
    (tmp_path / "elsewhere").mkdir()
    mine = tmp_path / "elsewhere" / "0"
    mine.write_text("mine")
    link = plan.destination / "0" / "items" / "params.params.mine"
    link.symlink_to(mine.parent)
    (mismatch,) = check_manifest(plan.destination).mismatches
    assert str(mismatch) == "0/items/params.params.mine: is not in the manifest"
    with pytest.raises(OutputExistsError, match=r"contains 0/items/params\.params\.mine, which no conversion wrote"):
        execute(plan, threads=1, overwrite=True)
    assert mine.read_text() == "mine"


def test_an_empty_folder_of_somebody_else_is_kept_too(plan: Plan) -> None:
    execute(plan, threads=1)
    empty = plan.destination / "0" / "items" / "params.params.mine"
    empty.mkdir()
    assert [str(mismatch) for mismatch in check_manifest(plan.destination).mismatches] == [
        "0/items/params.params.mine: is not in the manifest"
    ]
    with pytest.raises(OutputExistsError, match=r"contains 0/items/params\.params\.mine, which no conversion wrote"):
        execute(plan, threads=1, overwrite=True)


def test_folders_that_a_killed_run_left_empty_are_made_anew(plan: Plan, tmp_path: Path) -> None:
    interrupt(plan, 0)
    working = partial_path(plan.destination)
    for path in working.rglob("*"):
        if path.is_file():
            path.unlink()
    (working / "0" / "items" / "params.params.older").mkdir()
    execute(plan, threads=1, fresh=True)
    assert check_manifest(plan.destination).ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.manifest.json", "source"]


def test_a_strangers_file_in_the_working_folder_stops_a_run_and_stays(plan: Plan) -> None:
    interrupt(plan, 2)
    stranger = partial_path(plan.destination) / "0" / "notes"
    stranger.write_text("mine")
    with pytest.raises(OutputExistsError, match="contains 0/notes, which does not belong to this output"):
        execute(plan, threads=1, fresh=True)
    assert stranger.read_text() == "mine"


def test_an_older_output_that_changes_inside_during_the_run_stays(plan: Plan) -> None:
    execute(plan, threads=1)
    changed = plan.destination / plan.files[1].name

    def change(report: object) -> None:
        changed.unlink()
        changed.write_text("mine")

    with pytest.raises(OutputExistsError, match="appeared or changed"):
        execute(plan, threads=1, overwrite=True, before_finish=change)
    assert changed.read_text() == "mine"


def test_entries_and_folders_are_listed_by_name(tmp_path: Path) -> None:
    for name in ("a/b/file", "a/file", "c/file", "file"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "d" / "empty").mkdir(parents=True)
    found = [entry.path.removeprefix(f"{tmp_path}/") for entry in entries_within(tmp_path, lambda name: name != "c")]
    assert sorted(found) == ["a/b/file", "a/file", "c", "d/empty", "file"]
    assert folders_of_names(["a/b/file", "a/file", "file"]) == ["a", "a/b"]
