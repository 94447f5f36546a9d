"""The converting commands as users type them, in forked children that can be killed, and what must be true afterwards.

Shared by the long runs: ``power_cuts``, ``long_run`` and ``many_histories``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4convert import api, cli
from dsv4convert.engine.conversion import execute
from dsv4convert.engine.locks import LOCK_SUFFIX
from dsv4convert.engine.outputs import JOURNAL_SUFFIX, PARTIAL_SUFFIX, REPLACED_SUFFIX, TRIAL_SUFFIX
from dsv4convert.synth.write import write_synth

from .crash import RECORD_SECONDS, THREADS, slow_down

# Name: the words of the command, with folders for {out} and the sources, a set's first file for {split} and {parts}.
COMMANDS = {
    "hf-to-gguf": "hf-to-gguf {checkpoint} {out}/model.gguf",
    "hf-to-gguf --max-file-size": "hf-to-gguf {checkpoint} {out}/model.gguf --max-file-size 400K",
    "hf-to-gguf --draft split": "hf-to-gguf {checkpoint} {out}/model.gguf --draft split",
    "hf-to-gguf, low-bit types": "hf-to-gguf {checkpoint} {out}/model.gguf --dense q4_0 --experts q5_0",
    "shard": "shard {checkpoint} {out}/shards --mp 2",
    "unshard": "unshard {shards} {out}/joined --max-file-size 1M",
    "dequantize": "dequantize {checkpoint} {out}/bf16 --max-file-size 1M",
    "repack": "repack {checkpoint} {out}/fp8 --experts fp8 --max-file-size 1M",
    "mlx": "mlx {checkpoint} {out}/mlx --max-file-size 1M",
    "maxtext": "maxtext {checkpoint} {out}/maxtext",
    "requantize": "requantize {floats} {out}/official --max-file-size 1M",
    "merge": "merge {split} {out}/model.gguf",
    "merge --delete-parts": "merge {parts} {out}/model.gguf --delete-parts",
    "imatrix": "imatrix {shards} --text {text} --tokenizer {checkpoint} --context-size 8 -o {out}/model.gguf",
    "mend": "mend {checkpoint} {out}/mended --drop-draft",
    "repack --experts nvfp4": "repack {checkpoint} {out}/nvfp4 --experts nvfp4 --max-file-size 1M",
    "synth": "synth {out}/synthetic --layers 0-0 --routed-experts 4 --vocab 320 --files 2",
    "forward --goldens": "forward {checkpoint} --tokens 1,2 --layers 0-0 --goldens {out}/goldens",
}
CHECKPOINT = "checkpoint"
SHARDS = "shards"
FLOATS = "floats"
SPLIT = "split"
TEXT = "text"
SOURCES = (CHECKPOINT, SHARDS, FLOATS, SPLIT, TEXT)
OUT = "out"

USES_UP = "merge --delete-parts"
PARTS = "parts"  # a copy of the split set, which that command uses up

# The commands that keep no journal and begin anew each time.
WITHOUT_RESUME = ("imatrix", "synth", "forward --goldens")

# What a run leaves next to an output while it is not finished.
TEMPORARY = (PARTIAL_SUFFIX, REPLACED_SUFFIX, TRIAL_SUFFIX, JOURNAL_SUFFIX, LOCK_SUFFIX)

# The file of an output by which its readers find the others; of a folder any file, since it appears whole.
LEAD = re.compile(r"model(-00001-of-\d{5})?\.gguf")
MANIFEST = ".manifest.json"
NOTES = "notes.txt"  # somebody else's, next to the output

CHILD_SECONDS = 120.0


def words(command: str, base: Path, *options: str) -> list[str]:
    """Return the arguments of a command whose folders stand in ``base``."""
    places = {name: str(base / name) for name in (*SOURCES, OUT)}
    places[SPLIT], places[PARTS] = (str(base / name / first_of_split(base)) for name in (SPLIT, PARTS))
    line = [word.format(**places) for word in COMMANDS[command].split()]
    threads = () if command in WITHOUT_RESUME else ("--threads", str(THREADS))
    return [*line, *options, *threads, *(() if line[0] == "forward" else ("--quiet",))]


def first_of_split(base: Path) -> str:
    """Return the name of the first file of the split set."""
    (first,) = (path.name for path in (base / SPLIT).glob("*-00001-of-*.gguf"))
    return first


def make_sources(base: Path, seed: int = 0) -> None:
    """Write a small checkpoint with a draft, the same as shards, floats and a split GGUF, and a text into ``base``."""
    write_synth(base / CHECKPOINT, "tiny", layers=1, experts=4, seed=seed, files=2)
    api.shard(base / CHECKPOINT, base / SHARDS, mp=2)
    api.dequantize(base / CHECKPOINT, base / FLOATS)
    (base / SPLIT).mkdir()
    api.convert_gguf(base / CHECKPOINT, base / SPLIT, max_file_size="400K")
    (base / TEXT).write_text("a text to run the model on, of some length")
    empty_out(base)
    with contextlib.redirect_stdout(io.StringIO()):
        for command in COMMANDS:  # imports whatever a child would import
            cli.run([*words(command, base), *(() if command in WITHOUT_RESUME else ("--dry-run",))])
    empty_out(base)


def empty_out(base: Path, older: Path | None = None) -> Path:
    """Make the folder of outputs anew, with the file of somebody else in it and, where given, an older output.

    The split set that a command uses up is made anew too.
    """
    shutil.rmtree(base / PARTS, ignore_errors=True)
    shutil.copytree(base / SPLIT, base / PARTS)
    out = base / OUT
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    if older is not None:
        shutil.copytree(older, out, dirs_exist_ok=True)
    (out / NOTES).write_text("three years of work")
    return out


def run_alone(command: str, base: Path, *options: str) -> dict[str, bytes]:
    """Run a command that nothing disturbs; return all files that are in the folder of outputs then.

    Raises:
        SystemExit: it failed.
    """
    code, said = Child(words(command, base, *options)).end()
    if code:
        raise SystemExit(f"{command}: {said}")
    return files_of(base / OUT)


class Child:
    """A command in a forked process."""

    def __init__(self, line: list[str], *, slow: bool = False, prepare: Callable[[], None] | None = None) -> None:
        reading, writing = os.pipe()
        self.process = os.fork()
        if self.process:
            os.close(writing)
            self._pipe = reading
            return
        try:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            if slow:
                slow_down()
                assert execute.__kwdefaults__ is not None
                execute.__kwdefaults__["record_seconds"] = RECORD_SECONDS
            if prepare is not None:
                prepare()
            sys.argv = ["dsv4convert", *line]
            code = 0
            try:
                cli.main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException as error:  # noqa: BLE001 - reported to the parent
            os.write(2, f"{type(error).__name__}: {error}".encode())
            code = 99
        finally:
            os._exit(code)

    def is_alive(self) -> bool:
        """Return whether the process still runs; it is not waited for."""
        return os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def kill(self) -> None:
        """End the process at once, if it still runs."""
        os.kill(self.process, signal.SIGKILL)

    def end(self) -> tuple[int, str]:
        """Wait for the end; return the exit code (negative: the signal) and what was printed."""
        give_up, said = time.monotonic() + CHILD_SECONDS, b""
        with os.fdopen(self._pipe, "rb", buffering=0) as pipe:
            while True:
                if not select.select([pipe], [], [], max(0.0, give_up - time.monotonic()))[0]:
                    self.kill()
                data = pipe.read(1 << 16)
                if not data:
                    break
                said += data
        _, status = os.waitpid(self.process, 0)
        return os.waitstatus_to_exitcode(status), said.decode(errors="replace").strip()


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder and of those in it, by their names from there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def final_files(out: Path) -> dict[str, bytes]:
    """Return the files under final names: all but those that a run leaves while it is not finished."""
    return {
        name: data
        for name, data in files_of(out).items()
        if not any(part.endswith(TEMPORARY) for part in Path(name).parts)
    }


@dataclass(frozen=True)
class Promise:
    """What a command promises: files before it, with an older output where that is to be replaced, and after it."""

    before: dict[str, bytes]
    after: dict[str, bytes]

    @property
    def is_folder(self) -> bool:
        return not any(name.endswith(".gguf") for name in self.after)

    def broken(self, finals: dict[str, bytes], *, done: bool = False) -> list[str]:
        """Return what is wrong with the files under final names at any moment; once ``done``, all must be there."""
        wrong = [
            f"{name} has its final name and is neither old nor whole"
            for name, data in finals.items()
            if data not in (self.after.get(name), self.before.get(name))
        ]
        if finals.get(NOTES) != self.before[NOTES]:
            wrong.append("the file of somebody else is not as it was")
        new, old, present = of_outputs(self.after), of_outputs(self.before), of_outputs(finals)
        leads = (name for name in finals if (name in new if self.is_folder else LEAD.fullmatch(name)))
        lead = next(leads, None)
        if lead is not None and present not in (new, old):
            wrong.append(f"a mixture, or not all of the output, under {lead}")
        # One name, or a folder's, changes hands in one step; of a split the first file is away meanwhile.
        if lead is None and old and (self.is_folder or len(new) == 1):
            wrong.append("neither the old nor the new output has its name")
        if done and finals != self.after:
            wrong.append("a run with exit code 0 has not made its output")
        return wrong

    def state(self, out: Path) -> str:
        """Return in words what a death left in the folder of outputs."""
        present = of_outputs(final_files(out))
        new, old = of_outputs(self.after), of_outputs(self.before)
        named = "no output" if not present else "new" if present == new else "old" if present == old else "some files"
        journals = list(out.glob("*.journal"))
        if not journals:
            return f"{named}, no journal"
        recorded = any(b'"s":' in line for line in journals[0].read_bytes().splitlines())
        return f"{named}, journal with finished parts" if recorded else f"{named}, journal"

    def differing(self, out: Path) -> list[str]:
        """Return the names of files that are not as they are after a run that was left alone."""
        found = files_of(out)
        return sorted(name for name in {*found, *self.after} if found.get(name) != self.after.get(name))


def of_outputs(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files of an output, without its manifest."""
    return {name: data for name, data in files.items() if name != NOTES and not name.endswith(MANIFEST)}


def about_this_machine() -> dict[str, Any]:
    """Return date, commit, kernel and processors, for records."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": subprocess.run(git, check=False, capture_output=True, text=True).stdout.strip(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "processors": len(os.sched_getaffinity(0)),
    }


def save_record(found: Mapping[str, Any], seed: int, began: float, file: Path | None) -> None:
    """Write what a long run has found since ``began`` (monotonic), and where, as JSON: to ``file``, or to stdout."""
    about = {**about_this_machine(), "seed": seed, "seconds": round(time.monotonic() - began)}
    text = json.dumps({**about, **found}, indent=1) + "\n"
    if file is None:
        sys.stdout.write(text)
    else:
        file.write_text(text)
