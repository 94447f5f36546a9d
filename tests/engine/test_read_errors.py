"""A source that goes bad in the middle of a run: named, the work kept, and the run goes on when it is back."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dsv4convert.engine.conversion import execute
from dsv4convert.engine.worker import Worker
from dsv4convert.errors import InputOutputError
from dsv4convert.plan import Plan, Segment
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions

from .kernel_copies import make_in_python
from .plans import PLANS, contents, leftovers

BEFORE_IT_GOES_BAD = 20


@pytest.fixture
def source(tiny: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny, tmp_path / "source")


@pytest.fixture
def plan(source: Path, tmp_path: Path) -> Plan:
    return plan_gguf(source, tmp_path / "model.gguf", GgufOptions())


def go_bad(monkeypatch: pytest.MonkeyPatch, happen: Any) -> None:
    """Have something happen to the source once some segments are done."""
    run, count = Worker.run, 0

    def counting(self: Worker, segment: Segment, output: int, path: Path, offset: int) -> Any:
        nonlocal count
        count += 1
        if count == BEFORE_IT_GOES_BAD:
            happen()
        return run(self, segment, output, path, offset)

    monkeypatch.setattr(Worker, "run", counting)


def finish(plan: Plan, tiny: Path, tmp_path: Path) -> None:
    """Go on with the run and compare with one that was left alone."""
    assert execute(plan, threads=1, resume=True).resumed_bytes > 0
    (tmp_path / "whole").mkdir()
    whole = PLANS["gguf"](plan.source, tmp_path / "whole")
    execute(whole, threads=1)
    assert contents(plan) == contents(whole)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("kind", ["truncated", "gone", "a folder instead", "a bad block"])
def test_a_source_that_goes_bad_is_named_and_the_run_goes_on_when_it_is_back(
    kind: str, plan: Plan, source: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The file of the last tensor, which nobody has open yet after so few segments.
    shard = plan.files[0].tensors[-1].segments[0].operands[0].file
    saved = shutil.copy2(shard, tmp_path / "saved")

    def happen() -> None:
        if kind == "truncated":
            os.truncate(shard, 100)
        elif kind == "gone":
            shard.unlink()
        elif kind == "a folder instead":
            shard.unlink()
            shard.mkdir()
        else:

            def preadv(*_: object) -> int:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

            patch.setattr(os, "preadv", preadv)
            make_in_python(patch)

    with monkeypatch.context() as patch:
        go_bad(patch, happen)
        with pytest.raises(InputOutputError) as caught:
            execute(plan, threads=1, record_seconds=0.001)
    message = str(caught.value)
    assert shard.name in message or kind == "a bad block"
    assert "(while making tensor " in message
    assert message.endswith("the finished work is kept: run again with --resume")
    assert not plan.final_paths()[0].exists()

    if shard.is_dir():
        shard.rmdir()
    shard.unlink(missing_ok=True)
    shutil.copy2(saved, shard)
    Path(saved).unlink()
    finish(plan, tiny, tmp_path)


def test_an_unreadable_source_is_told_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    from ..command_line import run_cli

    shard = sorted(source.glob("*.safetensors"))[0]
    shard.unlink()
    shard.mkdir()
    result = run_cli("hf-to-gguf", source, tmp_path / "model.gguf")
    assert result.code == 3
    assert shard.name in result.error
    assert leftovers(tmp_path) == []
