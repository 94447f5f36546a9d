"""A folder that is written in one go: killed before any change of a name it is old or new, and can be written again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from dsv4convert.engine.new_folder import NewFolder
from dsv4convert.errors import LockedError, OutputExistsError

from .crash import Killer

MUST_HOLD = "config.json"


def write(out: Path, text: str, *, overwrite: bool = True) -> None:
    with NewFolder(out, MUST_HOLD, lambda name: name.endswith(".json"), overwrite=overwrite).written() as folder:
        for name in (MUST_HOLD, "a.json", "b.json", "z.json"):
            (folder / name).write_text(text)


def stop_with_a_strangers_folder(out: Path) -> None:
    with NewFolder(out, MUST_HOLD, lambda name: name.endswith(".json"), overwrite=True).written() as folder:
        (folder / MUST_HOLD).write_text("new")
        (folder / "sub").mkdir()
        (folder / "sub" / "thesis.json").write_text("three years of work")
        raise OutputExistsError("stopped")


def texts(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("has_old", [False, True])
def test_killed_before_any_change_it_is_old_or_new_and_can_be_written_again(has_old: bool, tmp_path: Path) -> None:
    for call in range(100):
        base = tmp_path / str(call)
        out = base / "out"
        if has_old:
            write(out, "old")
        child = os.fork()
        if not child:
            try:
                Killer(call, None).install()
                write(out, "new")
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if out.exists():
            assert texts(out) in ({"old"}, {"new"})
            assert len(list(out.iterdir())) == 4
        else:
            assert not has_old
        write(out, "newer")
        assert texts(out) == {"newer"}
        assert [path.name for path in base.iterdir()] == ["out"]
        if not code:
            break
        assert code < 0
    assert call > (7 if has_old else 1)


def test_a_second_run_leaves_the_folder_of_the_first_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with NewFolder(out, MUST_HOLD, lambda name: name.endswith(".json"), overwrite=True).written() as folder:
        (folder / MUST_HOLD).write_text("first")
        with pytest.raises(LockedError, match=f"{folder}: another run is writing this output"):
            write(out, "second")
    assert texts(out) == {"first"}


def test_what_joins_the_older_or_the_unfinished_folder_stays(tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    write(out, "old")
    for folder in (out, partial):
        folder.mkdir(exist_ok=True)
        (folder / "thesis").write_text("three years of work")
        with pytest.raises(OutputExistsError, match=f"{folder}: not replaced: contains thesis"):
            write(out, "new")
        (folder / "thesis").unlink()
    with pytest.raises(OutputExistsError, match="stopped"):
        stop_with_a_strangers_folder(out)
    assert (partial / "sub" / "thesis.json").read_text() == "three years of work"
    assert texts(out) == {"old"}
    with pytest.raises(OutputExistsError, match="not replaced: contains sub/thesis"):
        write(out, "new")
    shutil.rmtree(partial / "sub")
    with pytest.raises(OutputExistsError, match="out: already exists; pass --overwrite"):
        write(out, "new", overwrite=False)
    write(out, "new")
    assert texts(out) == {"new"}
    assert not partial.exists()
