"""A process that is stopped at a moment, and what a stranger does meanwhile, on a disk and in memory.

The machine's temporary folder is on its disk, as a rule ext4; ``fast_tmp`` is on tmpfs.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ..command_line import run_cli
from . import restricted
from .plans import leftovers
from .test_interrupt import STARTS_WITHIN, start, wait_for

THESIS = b"three years of work"
DONE, EXISTS, LOCKED, INPUT_OUTPUT = 0, 9, 14, 16
RECORDED = b'{"s":'
SPLIT = ("--max-file-size", "1500000")
# Names change slowly, so that a moment between two renames can be met.
SLOW_NAMES = """
from dsv4convert.engine import names
renameat2 = names._renameat2
names._renameat2 = lambda *args: (renameat2(*args), time.sleep(0.3))
"""


@pytest.fixture(params=["disk", "memory"])
def out(request: pytest.FixtureRequest, tmp_path: Path, fast_tmp: Path) -> Path:
    """Return an empty folder for outputs."""
    folder = (tmp_path if request.param == "disk" else fast_tmp) / "out"
    folder.mkdir()
    return folder


def arguments(source: Path, out: Path, name: str, *options: str) -> list[object]:
    return ["hf-to-gguf" if name.endswith(".gguf") else "dequantize", source, out / name, *options]


@contextmanager
def stopped(process: subprocess.Popen[str]) -> Iterator[None]:
    """Keep every thread of a process from running."""
    process.send_signal(signal.SIGSTOP)
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2][0] != "T":
        time.sleep(0.01)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    return process.returncode, err


def whole(source: Path, folder: Path, name: str, *options: str) -> dict[str, bytes]:
    """Return the files of an output that was left alone."""
    folder.mkdir()
    assert run_cli(*arguments(source, folder, name, *options)).code == DONE
    return files(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["model.gguf", "bf16"])
def test_what_takes_the_name_while_a_run_is_stopped_stays(name: str, tiny: Path, out: Path, tmp_path: Path) -> None:
    process = start(*arguments(tiny, out, name))
    wait_for(out / f"{name}.journal", RECORDED)
    with stopped(process):
        theirs = out / name
        if name == "bf16":
            theirs.mkdir()
            theirs /= "thesis.tex"
        theirs.write_bytes(THESIS)
    code, err = end(process)
    assert code == EXISTS
    assert f"{out / name}: appeared or changed during the conversion and is left in place" in err
    assert theirs.read_bytes() == THESIS
    theirs.unlink()
    if name == "bf16":
        theirs.parent.rmdir()
    assert run_cli(*arguments(tiny, out, name, "--resume")).code == DONE
    assert files(out) == whole(tiny, tmp_path / "whole", name)


def test_garbage_under_the_temporary_name_gets_no_other(tiny: Path, out: Path) -> None:
    process = start(*arguments(tiny, out, "model.gguf"))
    wait_for(out / "model.gguf.journal", RECORDED)
    with stopped(process):
        partial = out / "model.gguf.partial"
        partial.rename(out / "moved")
        partial.write_bytes(b"garbage!")
    code, err = end(process)
    assert code == INPUT_OUTPUT
    assert "model.gguf.partial: no longer the file that was written" in err
    assert not (out / "model.gguf").exists()
    assert partial.read_bytes() == b"garbage!"


@pytest.mark.parametrize("name", ["model.gguf", "bf16"])
def test_a_second_run_without_the_first_ones_journal_mixes_nothing(
    name: str, tiny: Path, out: Path, tmp_path: Path
) -> None:
    process = start(*arguments(tiny, out, name))
    wait_for(out / f"{name}.journal", RECORDED)
    with stopped(process):
        (out / f"{name}.journal").unlink()
        second = run_cli(*arguments(tiny, out, name, "--fresh"))
        assert second.code == LOCKED
        assert f"{name}.partial: another run is writing this output" in second.error
    assert end(process) == (DONE, "")
    assert files(out) == whole(tiny, tmp_path / "whole", name)


@pytest.mark.parametrize("moment", [".replaced", "-00003-of-00003.gguf", "-00002-of-00003.gguf"])
def test_a_split_that_dies_between_two_names_is_no_mixture(moment: str, tiny: Path, out: Path, tmp_path: Path) -> None:
    """The old first part leaves first, the new one comes last; the next run goes on from there."""
    assert run_cli(*arguments(tiny, out, "model.gguf", *SPLIT, "--name", "Older")).code == DONE
    old = files(out)
    new = whole(tiny, tmp_path / "whole", "model.gguf", *SPLIT)
    first = "model-00001-of-00003.gguf"
    assert old.keys() == new.keys()
    assert old[first] != new[first]
    path = out / (first + moment if moment == ".replaced" else f"model{moment}")
    before = path.stat().st_ino if path.exists() else None
    process = start(*arguments(tiny, out, "model.gguf", *SPLIT, "--overwrite"), more=SLOW_NAMES)
    until = time.monotonic() + STARTS_WITHIN
    while not path.exists() or path.stat().st_ino == before:
        assert time.monotonic() < until
        time.sleep(0.01)
    with stopped(process):
        assert not (out / first).exists()
        assert (out / f"{first}.replaced").read_bytes() == old[first]
        process.kill()
    process.communicate(timeout=20)
    assert run_cli(*arguments(tiny, out, "model.gguf", *SPLIT, "--overwrite", "--resume")).code == DONE
    assert files(out) == new


# ---- locks


@pytest.mark.parametrize(
    "system", [restricted.without_flock, restricted.without_locks], ids=["without flock", "without any locks"]
)
def test_runs_exclude_each_other_whatever_locks_there_are(
    system: Callable[[], None], tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    words = arguments(tiny, out, "model.gguf")
    process = start(*words, before=system)
    wait_for(out / "model.gguf.journal", RECORDED)
    second = restricted.run(*words, "--fresh", before=system)
    assert second.returncode == LOCKED
    assert f"got process {process.pid} on " in second.stderr
    process.kill()
    process.communicate(timeout=20)
    third = restricted.run(*words, "--resume", before=system)
    assert third.returncode == DONE, third.stderr
    assert files(out) == whole(tiny, tmp_path / "whole", "model.gguf")


def test_without_locks_a_run_takes_none_where_asked(tiny: Path, tmp_path: Path) -> None:
    process = start(*arguments(tiny, tmp_path, "model.gguf", "--no-lock"), before=restricted.without_locks)
    wait_for(tmp_path / "model.gguf.journal", RECORDED)
    assert not (tmp_path / "model.gguf.lock").exists()
    assert end(process) == (DONE, "")
    assert leftovers(tmp_path) == []
