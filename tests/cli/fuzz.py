"""Feeds damaged files to everything that reads files; a program of its own, with its memory limited.

    python -m tests.cli.fuzz KIND FOLDER --cases N --seed S

Every case has to end in one of our errors or in success, within seconds, without a write outside FOLDER; a
conversion of a damaged source that succeeds has to satisfy ``verify``. It prints one JSON object.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from dsv4convert.checkpoint.folder import read_folder_headers
from dsv4convert.checkpoint.model_card import read_model_card
from dsv4convert.checkpoint.tokenizer import load_tokenizer
from dsv4convert.containers.gguf import open_gguf
from dsv4convert.containers.safetensors import read_header
from dsv4convert.engine.conversion import execute
from dsv4convert.engine.fingerprint import check_same, fingerprint_of
from dsv4convert.engine.journal import Journal, journal_path
from dsv4convert.engine.manifest import check_manifest, manifest_of
from dsv4convert.engine.run import peak_memory_bytes
from dsv4convert.engine.worker import Worker
from dsv4convert.errors import Dsv4Error, InputOutputError
from dsv4convert.inspection.describe import inspect_path
from dsv4convert.model.config import load_config
from dsv4convert.plan import Plan
from dsv4convert.synth.write import write_synth
from dsv4convert.targets.dequantize import plan_dequantize
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions
from dsv4convert.targets.mend import Mends, plan_mend
from dsv4convert.targets.repack import plan_repack
from dsv4convert.targets.shard_tensors import ShardOptions
from dsv4convert.targets.shards import UNSHARD, plan_shards, plan_unshard
from dsv4convert.verification import verify

from .mutations import mutate_bytes, mutate_json

MEMORY_LIMIT = 2**30
SECONDS_PER_CASE = 5.0
HUNG_SECONDS = 30.0
FAILURES_SHOWN = 12
MAX_LINE = 6000  # a path alone may have 4096 characters

# A few dozen tensors of every kind, half of the attention kinds; conversion and verification in a tenth of a second.
CHECKPOINT: dict[str, Any] = {
    "ratios": [4, 128],
    "experts": 2,
    "vocab": 320,
    "files": 2,
    "overrides": {"num_experts_per_tok": 1},
}

CONVERSIONS: list[Callable[[Path, Path], Plan]] = [
    lambda source, out: plan_gguf(source, out / "model.gguf", GgufOptions()),
    lambda source, out: plan_shards(source, out / "shards", ShardOptions(2)).plan,
    lambda source, out: plan_dequantize(source, out / "bf16"),
    lambda source, out: plan_repack(source, out / "fp8"),
    lambda source, out: plan_mend(source, out / "mended", Mends(reindex=True, prune_config=True)),
    lambda source, out: plan_mend(source, out / "renamed", Mends(rename="transformers")),
]

Case = Callable[[random.Random], str]


class SlowError(Exception):
    """A case that takes longer than it may."""


def watch_writes(allowed: Path) -> list[str]:
    """Note every write, rename and removal outside ``allowed``; return the list that will hold them."""
    strays: list[str] = []
    inside = str(allowed.resolve()) + "/"

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            changes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            paths = [arguments[0]] if changes else []
        elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            opened = arguments[-1] if event != "os.truncate" else -1
            folder = f"/proc/self/fd/{opened}/" if opened >= 0 else ""
            paths = [arguments[0] if isinstance(arguments[0], int) else folder + os.fsdecode(arguments[0])]
        elif event in ("os.rename", "os.link", "os.symlink"):
            paths = [arguments[0], arguments[1]]
        else:
            return
        for path in paths:
            if isinstance(path, int):
                continue
            full = os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(path))))
            if not (full + "/").startswith(inside):
                strays.append(f"{event} {path!r}")

    sys.addaudithook(audit)
    return strays


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raise SlowError in whatever takes too long."""

    def alarm(number: int, frame: object) -> None:
        raise SlowError

    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_PER_CASE)
    # What does not even come back to Python ends the program, with a traceback of every thread.
    faulthandler.dump_traceback_later(HUNG_SECONDS, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def mutate_either(data: bytes, rng: random.Random) -> bytes:
    """Damage JSON by its structure twice as often as by its bytes."""
    return mutate_json(data, rng) if rng.random() < 0.67 else mutate_bytes(data, rng)


def split_header(data: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """Damage a safetensors file: its header's JSON, or the header with its length."""
    header, payload = split_header(data)
    if rng.random() < 0.75:
        header = mutate_either(header, rng)
        return len(header).to_bytes(8, "little") + header + payload
    return mutate_bytes(data[: 8 + len(header)], rng) + payload


class Fuzz:
    """Everything that reads files, with good files to damage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = folder / "source"
        self.good = folder / "good"
        write_synth(self.source, "tiny", **CHECKPOINT)
        self.good.mkdir()
        execute(plan_gguf(self.source, self.good / "model.gguf", GgufOptions()), threads=1)
        self.converted = 0

    def header(self) -> Case:
        """Damage a header; read it."""
        data = sorted(self.source.glob("*.safetensors"))[0].read_bytes()
        header, payload = split_header(data)
        # The payload counts for its length alone.
        path = self.folder / "one.safetensors"

        def case(rng: random.Random) -> str:
            damaged = mutate_header(data[: 8 + len(header)], rng)
            with path.open("wb") as file:
                file.write(damaged)
                file.truncate(len(damaged) + len(payload))
            read_header(path)
            return "read"

        return case

    def source_file(self, name: str, read: Callable[[Path], object]) -> Case:
        """Damage a JSON file of the checkpoint; ``read`` the folder."""
        good = (self.source / name).read_bytes()

        def case(rng: random.Random) -> str:
            (self.source / name).write_bytes(mutate_either(good, rng))
            read(self.source)
            return "read"

        return case

    def index(self) -> Case:
        return self.source_file("model.safetensors.index.json", read_folder_headers)

    def config(self) -> Case:
        return self.source_file("config.json", load_config)

    def tokenizer(self) -> Case:
        return self.source_file("tokenizer.json", lambda folder: load_tokenizer(folder, CHECKPOINT["vocab"]))

    def tokenizer_config(self) -> Case:
        return self.source_file("tokenizer_config.json", lambda folder: load_tokenizer(folder, CHECKPOINT["vocab"]))

    def generation_config(self) -> Case:
        return self.source_file("generation_config.json", read_model_card)

    def gguf(self) -> Case:
        """Damage the header of a GGUF file; open and inspect it."""
        path = self.folder / "model.gguf"
        data = (self.good / "model.gguf").read_bytes()
        header = data[: open_gguf(self.good / "model.gguf").parts[0].data_start]
        # Most of it is the vocabulary: aim at the front and at the tensors' entries as well.
        begins = (0, 0, header.index(b"tokenizer.ggml.tokens"), header.index(b"token_embd.weight"))

        def case(rng: random.Random) -> str:
            at = rng.choice(begins)
            damaged = header[:at] + mutate_bytes(header[at:], rng)
            with path.open("wb") as file:
                file.write(damaged)
                file.truncate(len(data))
            open_gguf(path)
            inspect_path(path)
            return "read"

        return case

    def manifest(self) -> Case:
        """Damage a manifest; check the output by it."""
        output = self.good / "model.gguf"
        good = manifest_of(output).read_bytes()

        def case(rng: random.Random) -> str:
            damaged = mutate_either(good, rng)
            manifest_of(output).write_bytes(damaged)
            return "agrees" if check_manifest(output).ok else "differs"

        return case

    def journal(self) -> Case:
        """Damage a journal, mostly with checksums made right again; read it, and at times go on with it."""
        out = self.folder / "interrupted"
        out.mkdir()
        plan = plan_gguf(self.source, out / "model.gguf", GgufOptions())
        interrupt(plan, 30)
        fingerprint = fingerprint_of(plan)
        kept = {path.name: path.read_bytes() for path in out.iterdir()}
        path = journal_path(plan)
        lines = kept[path.name].splitlines(keepends=True)
        whole = (self.good / "model.gguf").read_bytes()

        def case(rng: random.Random) -> str:
            forged = rng.random() < 0.6
            if forged:
                number = rng.randrange(len(lines))
                text = mutate_json(lines[number].partition(b" ")[2], rng).replace(b"\n", b" ")
                line = xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"
                damaged = b"".join((*lines[:number], line, *lines[number + 1 :]))
            else:
                damaged = mutate_bytes(kept[path.name], rng)
            path.write_bytes(damaged)
            with Journal(path) as journal:
                if not journal.is_new:
                    check_same(journal.fingerprint or {}, fingerprint, path)
                    journal.check_plan(plan)
            # What a forger says is finished is believed; what damage leaves has to be true.
            if forged or rng.random() < 0.8:
                return "read"
            (out / "model.gguf.partial").write_bytes(kept["model.gguf.partial"])
            try:
                execute(plan, threads=1, resume=True)
                if (out / "model.gguf").read_bytes() != whole:
                    raise AssertionError("a resumed output differs")
            finally:
                for name in ("model.gguf", "model.gguf.manifest.json"):
                    (out / name).unlink(missing_ok=True)
            self.converted += 1
            return "resumed"

        return case

    def checkpoint(self) -> Case:
        """Damage any file of a checkpoint; describe it, plan a conversion, at times carry it out and verify it."""
        return self.folder_case(self.source, CONVERSIONS)

    def shards(self) -> Case:
        """Damage any file of a folder of shards; describe it, and put the shards together and verify it."""
        folder = self.folder / "shards"
        execute(plan_shards(self.source, folder, ShardOptions(2)).plan, threads=1)
        return self.folder_case(folder, [lambda source, out: plan_unshard(source, out / "whole")])

    def folder_case(self, folder: Path, conversions: Sequence[Callable[[Path, Path], Plan]]) -> Case:
        good = {path.name: path.read_bytes() for path in folder.iterdir()}
        names = sorted(good)
        out = self.folder / "out"

        def case(rng: random.Random) -> str:
            name = rng.choice(names)
            damaged = (mutate_header if name.endswith(".safetensors") else mutate_either)(good[name], rng)
            if rng.random() < 0.05 and name.endswith(".safetensors"):
                damaged = good[name][: rng.randrange(len(good[name]))]
            (folder / name).write_bytes(damaged)
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            try:
                with contextlib.suppress(Dsv4Error):
                    inspect_path(folder)
                plan = rng.choice(conversions)(folder, out)
                if rng.random() < 0.5:
                    return "planned"
                try:
                    execute(plan, threads=1)
                except Dsv4Error:
                    if list(out.iterdir()):
                        raise AssertionError(f"left over: {list(out.iterdir())}") from None
                    raise
                self.verify(folder, plan)
                self.converted += 1
                return "converted"
            finally:
                (folder / name).write_bytes(good[name])

        return case

    @staticmethod
    def verify(source: Path, plan: Plan) -> None:
        if plan.target == UNSHARD:  # what verify compares with is the checkpoint, not its shards
            if not check_manifest(plan.output_path()).ok:
                raise AssertionError("the output differs from the manifest")
            return
        report = verify(source, plan.output_path())
        if not report.ok:
            raise AssertionError(f"verify rejects it: {report.problems[:3]}")


def interrupt(plan: Any, after: int) -> None:
    """Carry out a plan until ``after`` segments are finished."""
    run, left = Worker.run, after

    def failing(self: Worker, *arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise InputOutputError("cannot be read", where="the fuzzer")
        return run(self, *arguments)

    Worker.run = failing  # type: ignore[method-assign]
    with contextlib.suppress(InputOutputError):
        execute(plan, threads=1)
    Worker.run = run  # type: ignore[method-assign]


KINDS = (
    "header", "index", "config", "tokenizer", "tokenizer_config", "generation_config", "gguf", "manifest", "journal",
    "checkpoint", "shards",
)  # fmt: skip


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this case alone, and show its error")
    arguments = parser.parse_args()

    fuzz = Fuzz(arguments.folder)
    case = getattr(fuzz, arguments.kind)()
    strays = watch_writes(arguments.folder)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    outcomes: collections.Counter[str] = collections.Counter()
    failures: dict[str, str] = {}
    failed = 0
    slowest = 0.0
    for number in range(arguments.cases) if arguments.only is None else [arguments.only]:
        rng = random.Random(f"{arguments.kind} {arguments.seed} {number}")
        began = time.monotonic()
        strays.clear()
        try:
            with time_limit():
                outcomes[case(rng)] += 1
        except Dsv4Error as error:
            outcomes[type(error).__name__] += 1
            line = str(error)
            if not line.isprintable() or len(line) > MAX_LINE:
                failed += 1
                failures.setdefault("line", f"case {number}: no line to print: {line[:200]!r}")
            if arguments.only is not None:
                sys.stderr.write(line + "\n")
        except BaseException as error:  # noqa: BLE001 - what this program is looking for
            failed += 1
            what = f"{type(error).__name__}: {str(error)[:300]}"
            if what[:80] not in failures and len(failures) < FAILURES_SHOWN:
                where = "".join(traceback.format_exception(error))[-1500:]
                failures[what[:80]] = f"case {number}: {what}\n{where}"
        if strays:
            failed += 1
            failures.setdefault("stray", f"case {number}: wrote outside: {strays[:3]}")
        slowest = max(slowest, time.monotonic() - began)
    json.dump(
        {
            "cases": sum(outcomes.values()) + failed,
            "outcomes": outcomes,
            "converted": fuzz.converted,
            "failed": failed,
            "failures": list(failures.values()),
            "slowest": slowest,
            "peak": peak_memory_bytes(),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
