"""Walks every command: its arguments and options are read off the command line itself, so that none is left out.

Only values that make a command succeed are listed here, and a test says so where a command has none.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import click

from dsv4convert.cli import app
from dsv4convert.synth.write import write_synth

from ..command_line import run_cli

SECONDS = 20.0
INTERNAL = 70
RESULT_DESCRIPTOR, HIGHEST_DESCRIPTOR = 3, 4096
MEMORY_LIMIT = 2**33  # of addresses, of which a process of threads and libraries uses few

# A value, True for an option that is a flag, None for one that is not given.
Value: TypeAlias = "str | bool | None"

# What makes each command succeed, by the name of its arguments and options. In braces: a small checkpoint, its GGUF,
# whole and split, its shards, its floats, a text, and a name for an output.
GIVEN: Mapping[str, Mapping[str, Value]] = {
    "hf-to-gguf": {"source": "{checkpoint}", "out": "{out}.gguf"},
    "shard": {"source": "{checkpoint}", "out": "{out}", "mp": "2"},
    "merge": {"source": "{split}", "out": "{out}.gguf"},
    "unshard": {"source": "{shards}", "out": "{out}"},
    "dequantize": {"source": "{checkpoint}", "out": "{out}"},
    "repack": {"source": "{checkpoint}", "out": "{out}", "experts": "fp8"},
    "requantize": {"source": "{floats}", "out": "{out}"},
    "mlx": {"source": "{checkpoint}", "out": "{out}"},
    "maxtext": {"source": "{checkpoint}", "out": "{out}"},
    "mend": {"source": "{checkpoint}", "out": "{out}", "reindex": True},
    "verify": {"source": "{checkpoint}", "out": "{gguf}"},
    "check": {"model": "{checkpoint}"},
    "estimate": {"model": "{checkpoint}"},
    "inspect": {"path": "{checkpoint}"},
    "forward": {"path": "{checkpoint}", "tokens": "1,2", "layers": "0-0"},
    "compare": {"a": "{checkpoint}", "b": "{gguf}", "tokens": "1,2", "tolerance": "1", "layers": "0-0"},
    "imatrix": {
        "model": "{checkpoint}",
        "text": "{text}",
        "out": "{out}.gguf",
        "context_size": "8",
        "chunks": "1",
        "layers": "0-0",
    },
    "synth": {"out": "{out}", "layers": "0-0", "routed_experts": "4", "vocab": "320"},
    "demo": {},
}
# Options that count only together with others, or instead of them.
TOGETHER: Mapping[str, Mapping[str, Value]] = {
    "text": {"tokens": None},
    "chat": {"tokens": None},
    "random": {"tokens": None},
    "tokenizer": {"tokens": None, "text": "a"},
    "record_last": {"goldens": "{out}"},
    "temperature": {"generate": "2"},
    "manifest": {"source": "{gguf}", "out": None},
}
# Values of ``GIVEN`` that are folders with a config.json.
MODELS = ("{checkpoint}", "{shards}", "{floats}")


def commands() -> dict[str, click.Command]:
    """Return every command by name."""
    context = click.Context(app)
    found = {name: app.get_command(context, name) for name in app.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


COMMANDS = commands()


def parameters(command: str) -> dict[str, click.Parameter]:
    """Return the arguments and options of a command by name."""
    return {str(parameter.name): parameter for parameter in COMMANDS[command].params}


def is_path(parameter: click.Parameter) -> bool:
    """Return whether an argument or an option takes the name of a file or a folder."""
    words = ("FILE", "FOLDER", "PATH")
    return isinstance(parameter.type, click.Path) or any(word in (parameter.metavar or "") for word in words)


def takes_value(parameter: click.Parameter) -> bool:
    """Return whether an argument or an option takes text or a number of which there is no list."""
    return not (is_path(parameter) or isinstance(parameter.type, (click.Choice, click.types.BoolParamType)))


class Walk:
    """A folder with what the commands need, and the words of a shell for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0
        self.places = {name: str(folder / name) for name in ("checkpoint", "shards", "floats", "out")}
        self.places["gguf"] = str(folder / "model.gguf")
        options = {"ratios": [4, 128], "experts": 4, "vocab": 320, "files": 2}
        write_synth(folder / "checkpoint", "tiny", **options)
        self.places["text"] = str(folder / "text")
        (folder / "text").write_text("the cat sat on the mat " * 20)
        for command, out, more in (
            ("hf-to-gguf", "model.gguf", {}),
            ("hf-to-gguf", "split.gguf", {"split_max_tensors": "50"}),
            ("shard", "shards", {}),
            ("dequantize", "floats", {}),
        ):
            assert run_cli(*self.words(command, out=str(folder / out), **more)).code == 0
        self.places["split"] = str(min(folder.glob("split-00001-of-*.gguf")))

    def words(self, command: str, **other: Value) -> list[str]:
        """Return the words of a command that would succeed, but for ``other`` values of some parameters."""
        given = dict(GIVEN[command])
        for name in other:
            given |= TOGETHER.get(name, {})
        given |= other
        self.number += 1
        places = self.places | {"out": f"{self.places['out']}{os.getpid()}-{self.number}"}
        found = [command]
        for name, parameter in parameters(command).items():
            value = given.get(name)
            if value is None or value is False:
                continue
            if isinstance(parameter, click.Option):
                found.append(parameter.opts[0])
            if value is not True:
                found.append(_filled(str(value), places))
        return found


def _filled(text: str, places: Mapping[str, str]) -> str:
    for name, place in places.items():
        text = text.replace("{" + name + "}", place)
    return text


def program(*arguments: object, shell: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a shell that closes or fills its outputs."""
    words = " ".join(f"'{word}'" for word in (sys.executable, "-m", "dsv4convert", *map(str, arguments)))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONUNBUFFERED": ""}
    return subprocess.run(
        ["bash", "-c", shell.format(words)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=cwd,
        **options,
    )


def in_child(
    runs: Iterable[list[str]], prepare: Callable[[], object] = lambda: None, codes: Collection[int] = range(INTERNAL)
) -> list[str]:
    """Run commands one by one in a forked child, ``prepare`` first; return what was not one line of ours, with why.

    ``codes`` are the exit codes with which they may end.
    """
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        try:
            os.dup2(writing, RESULT_DESCRIPTOR)
            os.closerange(RESULT_DESCRIPTOR + 1, HIGHEST_DESCRIPTOR)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
            prepare()
            wrong = [why for words in runs if (why := wrong_with(words, codes))]
        except BaseException:  # noqa: BLE001 - told to the parent
            wrong = [traceback.format_exc()]
        with open(RESULT_DESCRIPTOR, "wb") as pipe:
            pickle.dump(wrong, pipe)
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        told = pipe.read()
    os.waitpid(process, 0)
    found: list[str] = pickle.loads(told) if told else ["the child died"]
    return found


class _SlowError(BaseException):
    """A command hangs."""


def wrong_with(words: list[str], codes: Collection[int]) -> str | None:
    """Run a command; return what is wrong about how it ended: neither success nor one line, or not one of ``codes``."""

    def alarm(number: int, frame: object) -> None:
        raise _SlowError

    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        result = run_cli(*words)
        if result.code:
            assert result.error
        assert result.code in codes, f"exit code {result.code}: {result.err}"
    except (AssertionError, _SlowError) as error:
        return f"{words}: {type(error).__name__} {str(error)[:600]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


def strange_paths(folder: Path) -> dict[str, str]:
    """Make paths of every kind that a user can give by mistake; return them by what they are."""
    folder.mkdir()
    found = {
        "a name of 300 bytes": "n" * 300,
        "a path of 5000 bytes": "p/" * 2500,
        "a NUL": "a\0b",
        "nothing": "",
        "a name that is not UTF-8": str(folder / "a\udc80b"),
        "half a surrogate pair": str(folder / "a\ud800b"),
        "no such folder": "nowhere/at/all",
        "below a file": "/proc/self/status/model",
        "a folder": str(folder / "folder"),
        "an empty file": str(folder / "empty"),
        "a file of NULs": str(folder / "nuls"),
        "a text that is not UTF-8": str(folder / "latin"),
        "a JSON list": str(folder / "list.json"),
        "deep JSON": str(folder / "deep.json"),
        "a loop of links": str(folder / "loop"),
        "a pipe": str(folder / "pipe"),
        "a socket": str(folder / "socket"),
        "a device": str(folder / "device"),
        "a folder that may not be entered": str(folder / "locked"),
        "below a folder that may not be entered": str(folder / "locked" / "model"),
        "a file that may not be read": str(folder / "secret"),
    }
    (folder / "folder").mkdir()
    (folder / "folder" / "a\udc80b.json").touch()
    (folder / "empty").touch()
    (folder / "nuls").write_bytes(bytes(4096))
    (folder / "latin").write_bytes("Grüße".encode("latin-1"))
    (folder / "list.json").write_text("[1, 2]")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(folder)  # the name of a socket is short
        listener.bind("socket")
        os.chdir(here)
    (folder / "device").symlink_to("/dev/zero")
    (folder / "secret").write_text("{}")
    (folder / "secret").chmod(0)
    (folder / "locked").mkdir(mode=0)
    return found
