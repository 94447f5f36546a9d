"""Two runs on one output: the second learns who the first is; a dead one's lock is no lock."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4convert.engine.conversion import execute
from dsv4convert.engine.journal import Journal, journal_path
from dsv4convert.engine.outputs import outputs_of
from dsv4convert.errors import LockedError
from dsv4convert.plan import Plan
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions

from .plans import PLANS, contents, interrupt, leftovers
from .test_interrupt import start, wait_for


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> Plan:
    return PLANS[request.param](tiny, tmp_path)


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"fresh": True}, {"overwrite": True}], ids=str)
def test_the_second_run_is_told_who_holds_the_output(plan: Plan, how: dict[str, bool]) -> None:
    interrupt(plan, 30)
    with Journal(journal_path(plan)) as journal:
        journal.resume()
        before = journal_path(plan).read_bytes()
        with pytest.raises(LockedError, match="another run is writing this output") as caught:
            execute(plan, **how)  # type: ignore[arg-type]
        assert f"process {os.getpid()} on {socket.gethostname()} since 20" in str(caught.value)
        assert journal_path(plan).read_bytes() == before
    execute(plan, threads=2, resume=True)


def test_a_second_process_is_refused_and_the_first_is_not_disturbed(tiny: Path, tmp_path: Path) -> None:
    first = start("hf-to-gguf", tiny, tmp_path / "model.gguf", "--threads", "2")
    wait_for(tmp_path / "model.gguf.journal", b'{"s":')
    second = subprocess.run(
        [sys.executable, "-m", "dsv4convert", "hf-to-gguf", tiny, tmp_path / "model.gguf", "--fresh"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert second.returncode == 14
    assert f"got process {first.pid} on " in second.stderr
    assert first.communicate(timeout=60)[1] == ""
    assert first.returncode == 0
    (tmp_path / "whole").mkdir()
    whole = plan_gguf(tiny, tmp_path / "whole" / "model.gguf", GgufOptions())
    execute(whole, threads=2)
    assert contents(plan_gguf(tiny, tmp_path / "model.gguf", GgufOptions())) == contents(whole)


def test_the_lock_of_a_killed_process_is_taken_over(tiny: Path, tmp_path: Path) -> None:
    first = start("hf-to-gguf", tiny, tmp_path / "model.gguf", "--threads", "2")
    wait_for(tmp_path / "model.gguf.journal", b'{"s":')
    first.kill()
    first.communicate(timeout=20)
    plan = plan_gguf(tiny, tmp_path / "model.gguf", GgufOptions())
    assert execute(plan, threads=2, resume=True).resumed_bytes > 0
    assert leftovers(tmp_path) == []


def test_outputs_that_share_a_file_exclude_each_other(tiny: Path, tmp_path: Path) -> None:
    """The model with its MTP file, and the MTP file alone: two journals, one temporary file."""
    both = plan_gguf(tiny, tmp_path / "model.gguf", GgufOptions(draft="split"))
    alone = plan_gguf(tiny, tmp_path / "mtp-model.gguf", GgufOptions(draft="only"))
    assert both.files[1].name == alone.files[0].name
    held = outputs_of(both)
    held.create()
    size = held.paths[1].stat().st_size
    with pytest.raises(LockedError, match=r"mtp-model\.gguf\.partial: another run is writing this output"):
        execute(alone, fresh=True)
    assert held.paths[1].stat().st_size == size
    assert leftovers(tmp_path) == ["model.gguf.partial", "mtp-model.gguf.partial"]
    held.close()


def test_unfinished_work_of_another_output_is_not_overwritten_unasked(tiny: Path, tmp_path: Path) -> None:
    from dsv4convert.errors import ResumeError

    both = plan_gguf(tiny, tmp_path / "model.gguf", GgufOptions(draft="split"))
    interrupt(both, 150)
    alone = plan_gguf(tiny, tmp_path / "mtp-model.gguf", GgufOptions(draft="only"))
    with pytest.raises(ResumeError, match=r"mtp-model\.gguf\.partial: unfinished work of another run"):
        execute(alone)
    assert execute(both, threads=2, resume=True).resumed_bytes > 0
    assert leftovers(tmp_path) == []
