"""Whatever a model card or a chat template says: a conversion ends well, and ``verify`` agrees with it.

More cases: CASES=20000 python -m pytest tests/cli/test_card_fuzz.py
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import dsv4convert.targets.gguf
import dsv4convert.verification
from dsv4convert.checkpoint.meaning import open_checked
from dsv4convert.errors import Dsv4Error
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions
from dsv4convert.verification import prepare

from ..checkpoints import MakeCheckpoint
from .card_fuzz import write_card, write_templates

CASES = int(os.environ.get("CASES", "1000"))


@pytest.fixture(scope="module")
def folder(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = make_checkpoint(ratios=[0], experts=3, vocab=320, mtp=False, files=1)
    return Path(shutil.copytree(source, tmp_path_factory.mktemp("fuzz") / "DeepSeek-V4-Nano"))


def convert_and_verify(source: Path, out: Path) -> list[str]:
    """Plan a GGUF, write its header, and return what ``verify`` says against it; no tensor is made."""
    for path in out.iterdir():
        path.unlink()
    plan = plan_gguf(source, out, GgufOptions())
    (file,) = plan.files
    assert "/" not in file.name
    assert len(file.name) < 200
    assert file.name.isascii()
    assert file.name.isprintable()
    path = out / file.name
    assert path.parent == out
    with path.open("wb") as made:
        made.write(file.header)
        made.truncate(file.nbytes)
    report = prepare(source, path).report
    return [str(problem) for problem in report.problems]


@pytest.fixture(autouse=True)
def opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open the folder's weights once: they are the same in every case."""
    checkpoint = open_checked(folder)
    for module in (dsv4convert.targets.gguf, dsv4convert.verification):
        monkeypatch.setattr(module, "open_checked", lambda *_, **__: checkpoint)


@pytest.mark.parametrize("write", [write_card, write_templates], ids=["cards", "templates"])
def test_conversion_and_verify_agree_about_any_case(
    write: Callable[[Path, int], None], folder: Path, tmp_path: Path
) -> None:
    wrong: list[str] = []
    for number in range(CASES):
        write(folder, number)
        try:
            problems = convert_and_verify(folder, tmp_path)
        except Dsv4Error as error:
            problems = [f"error: {error}"]
        except Exception as error:  # noqa: BLE001 - whatever it is, the number of its case is wanted
            problems = [f"{type(error).__name__}: {error}"]
        wrong += [f"case {number}: {problem}" for problem in problems]
    assert not wrong, "\n".join(wrong[:20])
