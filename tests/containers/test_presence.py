"""What is there is told from what may not be looked at, in every version of Python."""

from __future__ import annotations

import ast
import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv4convert.containers.presence import exists, is_file, is_folder, is_link

PACKAGE = Path(__file__).resolve().parents[2] / "dsv4convert"
QUESTIONS = (exists, is_file, is_folder, is_link)

# These look at the package's own files and at libraries and devices of the machine: what may not be read is not there.
OF_THE_MACHINE = {"containers/json_object.py", "formats/compiled/library.py", "formats/ggml.py", "reference/devices.py"}


def test_each_kind_of_entry_is_told(tmp_path: Path) -> None:
    file, folder, link, dead, pipe = (tmp_path / name for name in ("file", "folder", "link", "dead", "pipe"))
    file.write_bytes(b"")
    folder.mkdir()
    link.symlink_to(folder)
    dead.symlink_to("nowhere")
    os.mkfifo(pipe)
    answers = {path.name: [ask(path) for ask in QUESTIONS] for path in (file, folder, link, dead, pipe)}
    assert answers == {
        "file": [True, True, False, False],
        "folder": [True, False, True, False],
        "link": [True, False, True, True],
        "dead": [False, False, False, True],
        "pipe": [True, False, False, False],
    }


@pytest.mark.parametrize("ask", QUESTIONS, ids=lambda ask: str(ask.__name__))
def test_nothing_is_there(ask: Callable[[Path], bool], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "circle").symlink_to("circle")
    for name in ("missing", "missing/below", "file/below", "circle/below", "a\0b", "half \udc00\ud800 pair"):
        assert not ask(tmp_path / name), name


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG])
@pytest.mark.parametrize("ask", QUESTIONS, ids=lambda ask: str(ask.__name__))
def test_what_cannot_be_looked_at_is_an_error(
    ask: Callable[[Path], bool], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        ask(Path("somewhere"))


def test_the_package_asks_pathlib_for_none_of_this() -> None:
    asked = {
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if str(path.relative_to(PACKAGE)) not in OF_THE_MACHINE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr in {"exists", "is_file", "is_dir", "is_symlink", "is_mount"}
        # An entry of os.scandir raises in every version.
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "entry")
        if ast.unparse(node.func.value) != "os.path"
    }
    assert not asked, "ask dsv4convert.containers.presence, which tells what is absent from what may not be looked at"
