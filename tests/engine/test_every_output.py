"""Every command that writes an output, stopped (SIGSTOP) in the middle while a stranger takes the output's name."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ..cli.walk import COMMANDS as ALL_COMMANDS
from ..cli.walk import parameters
from .commands import COMMANDS, OUT, WITHOUT_RESUME, empty_out, files_of, make_sources, run_alone, words
from .test_interrupt import STARTS_WITHIN, start
from .test_stopped import EXISTS, THESIS, end, stopped

# Commands that only read, and at most write a small result (``test_saying``).
READING = {"verify", "check", "estimate", "inspect", "compare", "demo"}

# A moment before the last look at the names, to be stopped in.
SLOW_END = """
from dsv4convert.engine.new_folder import NewFolder
from dsv4convert.engine.outputs import FileOutputs
look, finish = NewFolder._look_again, FileOutputs.finish
NewFolder._look_again = lambda self: (time.sleep(0.5), look(self))[1]
FileOutputs.finish = lambda self: (time.sleep(0.5), finish(self))[1]
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_sources(folder)
    return folder


def test_no_command_that_writes_an_output_is_left_out() -> None:
    tried = {line.split()[0] for line in COMMANDS.values()}
    assert tried == ALL_COMMANDS.keys() - READING
    assert all("overwrite" in parameters(name) for name in tried)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_takes_the_name_while_a_run_is_stopped_stays(command: str, base: Path) -> None:
    out = empty_out(base)
    whole = run_alone(command, base)
    empty_out(base)
    file = next((name for name in whole if name.endswith(".gguf")), None)
    final = out / (file or next(name for name in whole if "/" in name).partition("/")[0])
    process = start(*words(command, base), more=SLOW_END if command in WITHOUT_RESUME else "")
    wait_for_work(command, out)
    with stopped(process):
        theirs = final if file else final / "thesis.tex"
        theirs.parent.mkdir(exist_ok=True)
        theirs.write_bytes(THESIS)
    code, err = end(process)
    assert code == EXISTS
    assert f"{final}: appeared or changed during the conversion and is left in place" in err
    assert theirs.read_bytes() == THESIS
    theirs.unlink()
    if not file:
        final.rmdir()
    run_alone(command, base, *(() if command in WITHOUT_RESUME else ("--resume",)))
    assert files_of(base / OUT) == whole


def wait_for_work(command: str, out: Path) -> None:
    """Wait until a run has finished some of its work; of one without a journal, until it has begun."""
    until = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < until:
        if command in WITHOUT_RESUME and list(out.glob("*.partial")):
            return
        if any(b'{"s":' in journal.read_bytes() for journal in out.glob("*.journal")):
            return
        time.sleep(0.002)
    raise AssertionError("the run did not begin")
