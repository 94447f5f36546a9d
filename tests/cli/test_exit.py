"""How the process ends: with the command's exit code, whatever its threads are at."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

# A command that prints and ends while a thread works, or after it; exit(3) aborts, as where it meets a thread inside a
# C library.
PROGRAM = """
import ctypes, sys, threading, time
from dsv4convert import cli
from dsv4convert.__main__ import main
libc = ctypes.CDLL(None)
libc.__cxa_atexit(ctypes.cast(libc.abort, ctypes.c_void_p), None, None)
def run(arguments):
    def work():
        time.sleep({seconds})
        {work}
    thread = threading.Thread(target=work, daemon={daemon})
    thread.start()
    {wait}
    sys.stdout.write("told")
    {end}
cli.run = run
main()
"""
WAIT = "thread.join()"


def end(
    end: str = "pass", *, seconds: float = 60, daemon: bool = True, wait: str = "pass", work: str = "pass"
) -> tuple[int, str]:
    program = PROGRAM.format(seconds=seconds, daemon=daemon, wait=wait, end=end, work=work)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=30)
    return ended.returncode, ended.stdout


@pytest.mark.parametrize("at_work", [True, False], ids=["threads at work", "none"])
@pytest.mark.parametrize(
    ("ending", "code"),
    [("pass", 0), ("sys.exit(0)", 0), ("sys.exit(7)", 7), ("raise KeyboardInterrupt", 130), ("sys.exit('why')", 1)],
)
def test_a_process_ends_with_its_code_and_all_it_printed(ending: str, code: int, at_work: bool) -> None:
    assert (end(ending) if at_work else end(ending, seconds=0, wait=WAIT)) == (code, "told")


def test_a_thread_that_is_no_daemon_is_waited_for() -> None:
    assert end("sys.exit(7)", seconds=0.2, daemon=False, work="sys.stdout.write(' later')") == (7, "told later")


def test_what_is_registered_for_the_end_is_called() -> None:
    assert end("import atexit; atexit.register(sys.stdout.write, ' more'); sys.exit(7)") == (7, "told more")


def command_line(folder: Path, run: str) -> tuple[int, str]:
    """Return the exit code and stderr of the program, as ``python -m``, with this in place of its commands."""
    program = f"from dsv4convert import cli\nfrom dsv4convert.__main__ import main\n{run}\ncli.run = run\nmain()"
    (folder / "stoppable.py").write_text(program)
    python = [sys.executable, "-m", "stoppable"]
    ended = subprocess.run(python, capture_output=True, text=True, check=False, timeout=30, cwd=folder)
    return ended.returncode, ended.stderr


def test_ctrl_c_in_code_that_is_text_ends_as_anywhere(tmp_path: Path) -> None:
    run = "def run(arguments):\n    exec('raise KeyboardInterrupt')"
    assert command_line(tmp_path, run) == (130, "error: interrupted\n")


def test_ctrl_c_that_python_drops_stops_the_program_nevertheless(tmp_path: Path) -> None:
    run = """
import time
class Dropping:
    def __del__(self):
        raise KeyboardInterrupt
def run(arguments):
    Dropping()
    time.sleep(20)
"""
    assert command_line(tmp_path, run) == (130, "error: interrupted\n")


def test_ctrl_c_while_modules_are_imported_ends_the_process_without_a_word() -> None:
    program = """
import os, signal, sys
class Stop:
    def find_spec(self, name, path, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test under nohup inherits that it is ignored
sys.meta_path.insert(0, Stop())
from dsv4convert.__main__ import main
main()
"""
    command = [sys.executable, "-c", program, "--version"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")
