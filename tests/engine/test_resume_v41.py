"""A run that stopped inside an n-gram table goes on inside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dsv4convert.engine.conversion import execute
from dsv4convert.engine.journal import Journal, journal_path
from dsv4convert.engine.manifest import check_manifest
from dsv4convert.plan import Plan
from dsv4convert.synth.write import write_synth
from dsv4convert.targets import segments
from dsv4convert.targets.dequantize import plan_dequantize
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions
from dsv4convert.targets.shard_tensors import ShardOptions
from dsv4convert.targets.shards import plan_shards

from .plans import contents, interrupt

PIECE_BYTES = 4096

PLANS: dict[str, Callable[[Path, Path], Plan]] = {
    "q8_0": lambda source, out: plan_gguf(source, out / "m.gguf", GgufOptions()),
    "row264": lambda source, out: plan_gguf(source, out / "m.gguf", GgufOptions(engram="i8-row264")),
    "bf16": lambda source, out: plan_dequantize(source, out / "o"),
    "shards": lambda source, out: plan_shards(source, out / "o", ShardOptions(mp=2)).plan,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v41") / "source"
    write_synth(folder, "v41-tiny", layers=1, mtp=False, experts=2, engram_rows=3_000)
    return folder


@pytest.mark.parametrize("kind", PLANS)
def test_a_run_that_stopped_inside_a_table_goes_on_inside_it(
    kind: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "COPY_SEGMENT_BYTES", PIECE_BYTES)
    monkeypatch.setattr("dsv4convert.plan.COPY_SEGMENT_BYTES", PIECE_BYTES)
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    whole, plan = (PLANS[kind](source, tmp_path / folder) for folder in ("whole", "parts"))
    execute(whole, threads=2)
    tensors = plan.files[0].tensors
    at = next(n for n, tensor in enumerate(tensors) if "engram" in tensor.name and len(tensor.segments) > 20)
    interrupt(plan, sum(len(tensor.segments) for tensor in tensors[:at]) + len(tensors[at].segments) // 2)
    with Journal(journal_path(plan)) as journal:
        finished = sum(task[:2] == (0, at) for task in journal.finished())
    assert 0 < finished < len(tensors[at].segments)
    assert execute(plan, threads=2, resume=True).resumed_bytes > 0
    assert contents(plan) == contents(whole)
    assert check_manifest(plan.output_path()).ok
