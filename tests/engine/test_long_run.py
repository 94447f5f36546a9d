"""A short form of the long run, and what its checks must find."""

from __future__ import annotations

from pathlib import Path

import pytest

from .commands import NOTES, USES_UP, Promise
from .long_run import LongRun

KILLS = 16
NOTE = {NOTES: b"three years of work"}


def test_killed_commands_go_on_to_the_same_files(fast_tmp: Path) -> None:
    run = LongRun(fast_tmp, seed=0, commands=["hf-to-gguf --draft split", "repack", USES_UP])
    while sum(run.kills.values()) < KILLS:
        run.convert()
    assert run.wrong == []
    assert set(run.kills) == {"call", "moment"}


SPLIT_OLD = {f"model-0000{number}-of-00004.gguf": b"old %d" % number for number in (1, 2, 3, 4)}
SPLIT_NEW = {name: b"new " + data for name, data in SPLIT_OLD.items()}
FIRST, SECOND, *_ = SPLIT_OLD
FOLDER_OLD = {"bf16/config.json": b"old config", "bf16/model.safetensors": b"old"}
FOLDER_NEW = {"bf16/config.json": b"new config", "bf16/model.safetensors": b"new"}


@pytest.mark.parametrize(
    ("old", "new", "found", "done", "what"),
    [
        ({}, SPLIT_NEW, {FIRST: b"new"}, False, "neither old nor whole"),
        ({}, SPLIT_NEW, {FIRST: SPLIT_NEW[FIRST]}, False, "not all of the output"),
        ({}, SPLIT_NEW, {}, True, "has not made its output"),
        (SPLIT_OLD, SPLIT_NEW, {**SPLIT_OLD, SECOND: SPLIT_NEW[SECOND]}, False, "a mixture"),
        (FOLDER_OLD, FOLDER_NEW, {"bf16/config.json": b"new config"}, False, "not all of the output"),
        (FOLDER_OLD, FOLDER_NEW, {}, False, "neither the old nor the new output"),
    ],
    ids=["part of a file", "part of a split", "nothing made", "mixture", "part of a folder", "name without output"],
)
def test_the_checks_find(
    old: dict[str, bytes], new: dict[str, bytes], found: dict[str, bytes], done: bool, what: str
) -> None:
    promise = Promise({**old, **NOTE}, {**new, **NOTE})
    assert any(what in line for line in promise.broken({**found, **NOTE}, done=done))


def test_the_checks_find_a_lost_file_of_somebody_else() -> None:
    assert Promise(NOTE, {**SPLIT_NEW, **NOTE}).broken({}) == ["the file of somebody else is not as it was"]


@pytest.mark.parametrize(
    "found",
    [SPLIT_OLD, SPLIT_NEW, {SECOND: SPLIT_NEW[SECOND]}],
    ids=["the old split", "the new split", "files that no reader finds"],
)
def test_what_is_as_promised_passes_the_checks(found: dict[str, bytes]) -> None:
    assert Promise({**SPLIT_OLD, **NOTE}, {**SPLIT_NEW, **NOTE}).broken({**found, **NOTE}) == []
