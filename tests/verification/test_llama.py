"""Files of llama.cpp's own converter verify: element for element, with a chat template of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4convert.verification import verify

from ..oracles.gguf_bytes import RawGguf
from ..oracles.llama_cpp import convert

pytestmark = pytest.mark.llama

# The checkpoint has no template, so each tool brings its own.
THEIRS = ("tokenizer.chat_template",)

OPTIONS = {"default": (), "mtp": ("--mtp",), "splits": ("--split-max-size", "1M")}


@pytest.fixture(scope="module", params=OPTIONS)
def theirs(request: pytest.FixtureRequest, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of llama.cpp's converter, the first one of a split model."""
    folder = tmp_path_factory.mktemp("theirs")
    convert(small, folder / "model.gguf", *OPTIONS[request.param])
    return min(folder.glob("*.gguf"))


def test_their_elements_are_exactly_what_the_source_says(theirs: Path, small: Path) -> None:
    report = verify(small, theirs, ignore_keys=THEIRS)
    assert report.problems == []
    assert report.verdicts()["wrong"] == 0
    assert len(report.results) > 30


def test_their_file_verifies_as_a_foreign_one(theirs: Path, small: Path) -> None:
    assert verify(small, theirs, foreign=True).problems == []


def test_their_template_is_the_only_thing_that_is_not_ours(theirs: Path, small: Path) -> None:
    assert [problem.where for problem in verify(small, theirs).problems] == list(THEIRS)


def test_damage_to_their_file_is_caught(small: Path, tmp_path: Path) -> None:
    path = convert(small, tmp_path / "model.gguf")
    raw = RawGguf.read(path)
    info = raw.info("blk.2.ffn_up_exps.weight")
    data = bytearray(info.data)
    data[17 * 40 + 3] ^= 0x08
    info.data = bytes(data)
    raw.write(path)
    report = verify(small, path, foreign=True)
    assert report.results["blk.2.ffn_up_exps.weight"].wrong == 1
