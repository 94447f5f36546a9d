"""What of remote files a plan reads more than once, and is kept meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from dsv4convert.containers import sources
from dsv4convert.containers.fetching import Transport
from dsv4convert.containers.sources import RemoteFile
from dsv4convert.engine.ranges import RangeReader, SharedRanges
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


def test_weights_and_their_scales_are_asked_for_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before either is read: one after the other, each tensor would wait twice for the server."""
    asked: list[tuple[int, int]] = []
    both = threading.Event()

    class Server(Transport):
        @contextmanager
        def fetch(self, begin: int, end: int) -> Iterator[Iterator[bytes]]:
            asked.append((begin, end))
            if len(asked) == 2:
                both.set()
            yield iter([bytes(end - begin)])

    file = tmp_path / "model.safetensors"
    monkeypatch.setattr(sources, "_files", {file: RemoteFile("hf://a/b/model.safetensors", 128, "commit", Server())})
    operands = (Operand(file, 0, 16, 1, "u1"), Operand(file, 64, 1, 1, "u1"))
    segment = Segment(Convert("fp4", "bf16", None), operands, rows=4, row_bytes=64)
    with RangeReader(SharedRanges([segment]), lambda: False) as ranges:
        ranges.begin(segment)
        assert both.wait(20)
        assert sorted(asked) == [(0, 64), (64, 68)]
        assert ranges.read_into(file, 64, memoryview(bytearray(4)))
        assert ranges.read_into(file, 0, memoryview(bytearray(64)))
    assert len(asked) == 2
