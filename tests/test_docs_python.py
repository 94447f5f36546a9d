"""The Python sessions in the documentation give what they show, on a tiny checkpoint."""

from __future__ import annotations

import doctest
import importlib.util
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if "```pycon" in page.read_text(encoding="utf-8")]


def sessions(page: Path) -> str:
    """Return the Python sessions of a page at the lines where they stand, and nothing between them."""
    text = page.read_text(encoding="utf-8")
    kept = ["\n"] * text.count("\n")
    for found in re.finditer(r"^```pycon\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        first = text.count("\n", 0, found.start(1))
        for number, line in enumerate(found[1].splitlines(keepends=True)):
            kept[first + number] = line
    return "".join(kept)


def test_the_page_about_python_has_sessions() -> None:
    assert ROOT / "docs" / "python.md" in PAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sessions_give_what_they_show(page: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny, tmp_path / "DeepSeek-V4-Flash")
    monkeypatch.chdir(tmp_path)
    session = doctest.DocTestParser().get_doctest(sessions(page), {}, page.name, str(page), 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    differences: list[str] = []
    failed, attempted = runner.run(session, out=differences.append)
    assert attempted
    assert not failed, "".join(differences)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_what_is_named_of_the_package_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {found[1] for found in re.finditer(r"`(dsv4convert(?:\.\w+)+)", text)}
    named |= {
        f"{found[1]}.{name}"
        for found in re.finditer(r"^(?:>>> )?from (dsv4convert[.\w]*) import (.+)$", text, re.MULTILINE)
        for name in found[2].split(", ")
    }
    for path in named:
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name) or importlib.util.find_spec(path), path
