"""Conversions that stop in the middle, and what they leave behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from dsv4convert.engine.conversion import execute
from dsv4convert.engine.manifest import manifest_path
from dsv4convert.engine.worker import Worker
from dsv4convert.errors import Dsv4Error, InputOutputError
from dsv4convert.plan import Plan
from dsv4convert.targets.dequantize import plan_dequantize
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions
from dsv4convert.targets.merge import plan_merge
from dsv4convert.targets.shard_tensors import ShardOptions
from dsv4convert.targets.shards import plan_shards

# Types whose blocks fit the rows of the tiny checkpoint, and which ggml makes quickly.
LOW_BIT = GgufOptions(dense="q4_0", experts="q5_0", output="f32")

MakePlan = Callable[[Path, Path], Plan]


def plan_of_set(source: Path, out: Path, *, delete_parts: bool) -> Plan:
    """Plan the merge of a split set of ``source``: each ``out`` has a copy of the same set beside it."""
    original, parts = out.with_name("split"), out.with_name(f"{out.name}-parts")
    if not original.exists():
        original.mkdir()
        execute(PLANS["split gguf"](source, original), threads=2)
    if not parts.exists():
        shutil.copytree(original, parts)
    return plan_merge(next(parts.glob("*-00001-of-*.gguf")), out / "model.gguf", delete_parts=delete_parts)


PLANS: dict[str, MakePlan] = {
    "gguf": lambda source, out: plan_gguf(source, out / "model.gguf", GgufOptions()),
    "low-bit gguf": lambda source, out: plan_gguf(source, out / "model.gguf", LOW_BIT),
    "split gguf": lambda source, out: plan_gguf(source, out / "model.gguf", GgufOptions(split_max_bytes=1_500_000)),
    "shard": lambda source, out: plan_shards(source, out / "shards", ShardOptions(2)).plan,
    "dequantize": lambda source, out: plan_dequantize(source, out / "bf16", max_file_bytes=4_000_000),
}
MERGES: dict[str, MakePlan] = {
    "merge": partial(plan_of_set, delete_parts=False),
    "merge --delete-parts": partial(plan_of_set, delete_parts=True),
}


def contents(plan: Plan) -> dict[str, bytes]:
    """Return the finished files of a plan and its manifest, by name."""
    files = {file.name: (plan.destination / file.name).read_bytes() for file in plan.files}
    return files | {manifest_path(plan).name: manifest_path(plan).read_bytes()}


def leftovers(folder: Path) -> list[str]:
    """Return the names in a folder that tell of an unfinished run."""
    return sorted(p.name for p in folder.iterdir() if p.name.endswith((".partial", ".journal", ".replaced")))


@contextmanager
def failing_after(segments: int, error: BaseException | None = None) -> Iterator[None]:
    """Let runs finish so many segments in all, then raise ``error``, by default that of a bad disk."""
    run, count = Worker.run, 0
    raised = error or InputOutputError("cannot be read (a bad block)", where="the test")

    def failing(self: Worker, segment: object, output: int, path: Path, offset: int) -> object:
        nonlocal count
        count += 1
        if count > segments:
            raise raised
        return run(self, segment, output, path, offset)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "run", failing)
        yield


def interrupt(plan: Plan, after: int, **options: object) -> Dsv4Error:
    """Carry out a plan until ``after`` segments are finished, then fail as a bad disk would; return the error."""
    with failing_after(after), pytest.raises(InputOutputError) as caught:
        execute(plan, threads=1, **options)  # type: ignore[arg-type]
    return caught.value


def check_resumed(whole: Plan, cut: Plan, after: int) -> None:
    """Carry out ``whole``, and ``cut`` in two runs, the first of which fails after so many segments.

    The two are plans of one output, in folders that are not there yet: their files must have the same bytes.
    """
    for plan in (whole, cut):
        plan.destination.parent.mkdir()
    execute(whole, threads=2)
    interrupt(cut, after)
    assert not cut.destination.exists()
    execute(cut, threads=2, resume=True)
    found, wanted = contents(cut), contents(whole)
    assert found.keys() == wanted.keys()
    assert all(found[name] == data for name, data in wanted.items() if not name.endswith(".manifest.json"))
