"""What of remote files a plan reads more than once, and is kept meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from dsv4convert.containers import sources
from dsv4convert.containers.fetching import Transport
from dsv4convert.containers.sources import RemoteFile
from dsv4convert.engine.ranges import SharedRanges
from dsv4convert.plan import Convert, Operand, OutputFile, OutputTensor, Plan, Segment


class Unread(Transport):
    """A server that nothing is asked of."""

    def fetch(self, begin: int, end: int) -> AbstractContextManager[Iterator[bytes]]:
        raise AssertionError("bytes were asked for")


def test_scales_that_two_tensors_read_are_kept_where_the_codes_are_on_this_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, scales = tmp_path / "cached.safetensors", tmp_path / "elsewhere.safetensors"
    remote = RemoteFile("hf://a/b/elsewhere.safetensors", 64, "commit", Unread())
    monkeypatch.setattr(sources, "_files", {scales: remote})
    segment = Segment(
        Convert("fp4", "bf16", None),
        (Operand(codes, 0, 16, 1, "u1"), Operand(scales, 8, 1, 1, "u1")),
        rows=4,
        row_bytes=64,
    )
    tensors = tuple(OutputTensor(name, "BF16", (4, 32), 256 * at, 256, (segment,)) for at, name in enumerate("ab"))
    plan = Plan(
        target="dequantize",
        source=tmp_path,
        destination=tmp_path / "out",
        is_folder=True,
        files=(OutputFile("model.safetensors", b"", tensors, 512),),
        dropped=(),
        options={},
        source_bytes=0,
    )
    shared = SharedRanges(segment for file in plan.files for tensor in file.tensors for segment in tensor.segments)
    assert shared.holds(remote, 8, 12)
    assert not shared.holds(remote, 0, 8)
    assert not shared.holds(remote, 12, 64)
