"""Fetching ahead: each byte asked for once, over several connections, in bounded memory, and given up at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import pytest

from dsv4convert.containers.fetching import BLOCK_BYTES, Ahead, Connections, Transport, all_at_once
from dsv4convert.containers.sources import RemoteFile
from dsv4convert.errors import InputOutputError

STOP_SECONDS = 20.0
CONTENT = bytes(range(251)) * (7 * BLOCK_BYTES // 251)


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + STOP_SECONDS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


class Server(Transport):
    """Sends ``CONTENT``; notes what was asked for, and how many requests are being answered at once."""

    def __init__(self, holds: Callable[[int], bool] = lambda begin: False) -> None:
        self.holds = holds
        self.asked: list[tuple[int, int]] = []
        self.lock = threading.Lock()
        self.now = 0
        self.most = 0

    @contextmanager
    def fetch(self, begin: int, end: int) -> Iterator[Iterator[bytes]]:
        with self.lock:
            self.asked.append((begin, end))
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            yield self.pieces(begin, end)
        finally:
            with self.lock:
                self.now -= 1

    def pieces(self, begin: int, end: int) -> Iterator[bytes]:
        wait_until(lambda: not self.holds(begin))
        for at in range(begin, end, 100_000):
            yield CONTENT[at : min(at + 100_000, end)]

    def times_asked(self) -> list[int]:
        """Return for each byte between the first and the last that was asked for how often it was."""
        ends = sorted((at, change) for begin, end in self.asked for at, change in ((begin, 1), (end, -1)))
        counts, now = set(), 0
        for (at, change), (following, _) in pairwise(ends):
            now += change
            if following > at:
                counts.add(now)
        return sorted(counts)


def read(reader: Ahead, step: int) -> bytes:
    got = bytearray()
    while reader.position < reader.end:
        piece = bytearray(min(step, reader.end - reader.position))
        reader.read_into(memoryview(piece))
        got += piece
    return bytes(got)


def test_a_small_tensor_that_is_kept_is_read_without_what_follows() -> None:
    server = Server()
    file = RemoteFile("place", len(CONTENT), "first", server)
    file.read_into(1000, memoryview(bytearray(16)))
    with file.open() as reader:
        reader.seek(1000)
        assert reader.read(16) == CONTENT[1000:1016]
        assert server.asked == [(1000, 1016)]
        assert reader.read(16) == CONTENT[1016:1032]


@pytest.mark.parametrize("step", [1000, 300_000, 5 * BLOCK_BYTES])
def test_a_range_comes_over_several_connections_each_byte_once(step: int) -> None:
    begin, end = 17, len(CONTENT) - 5
    server = Server()
    server.holds = lambda begin: server.most < 3
    with Ahead(server, "place", begin, end, connections=Connections(4)) as reader:
        assert read(reader, step) == CONTENT[begin:end]
    assert 3 <= server.most <= 4
    assert server.times_asked() == [1]
    assert max(end - begin for begin, end in server.asked) == BLOCK_BYTES


def test_readers_share_the_memory_and_none_goes_without() -> None:
    server = Server(holds=lambda begin: True)
    connections = Connections(100, 4 * BLOCK_BYTES)
    readers = [Ahead(server, "place", 0, len(CONTENT), lambda: True, connections) for _ in range(3)]
    for reader in readers:
        with pytest.raises(InputOutputError, match=r"^place: fetching was stopped$"):
            reader.read_into(memoryview(bytearray(1)))
    wait_until(lambda: len(server.asked) >= 3)
    assert sorted(begin // BLOCK_BYTES for begin, _ in server.asked) == [0, 0, 0]
    server.holds = lambda begin: False
    for reader in readers:
        reader.close()
    # What was given up is there for the next reader.
    server.asked.clear()
    with Ahead(server, "place", 0, len(CONTENT), connections=connections) as reader:
        wait_until(lambda: not server.now)
        reader.read_into(memoryview(bytearray(1)))
        wait_until(lambda: len(server.asked) == 4)


def test_a_reader_that_is_stopped_does_not_wait_for_bytes_on_their_way() -> None:
    server = Server(holds=lambda begin: True)
    stopped = threading.Event()
    threading.Timer(0.2, stopped.set).start()
    started = time.monotonic()
    reader = Ahead(server, "place", 0, 10, stopped.is_set, Connections(1))
    with reader, pytest.raises(InputOutputError, match="fetching was stopped"):
        reader.read_into(memoryview(bytearray(10)))
    assert time.monotonic() - started < STOP_SECONDS
    server.holds = lambda begin: False


def test_one_idle_connection_does_not_serve_several_blocks_one_by_one() -> None:
    server = Server()
    connections = Connections(4)
    with Ahead(server, "place", 0, 10, connections=connections) as reader:
        reader.read_into(memoryview(bytearray(10)))
    server.holds = lambda begin: server.most < 4
    with Ahead(server, "place", 0, len(CONTENT), connections=connections) as reader:
        assert read(reader, len(CONTENT)) == CONTENT


def test_an_error_reaches_the_reader_where_the_bytes_are_missing() -> None:
    class Broken(Server):
        def pieces(self, begin: int, end: int) -> Iterator[bytes]:
            if begin:
                raise InputOutputError("no more", where="there")
            return super().pieces(begin, end)

    with Ahead(Broken(), "place", 0, 2 * BLOCK_BYTES, connections=Connections(2)) as reader:
        first = bytearray(BLOCK_BYTES)
        reader.read_into(memoryview(first))
        assert first == CONTENT[:BLOCK_BYTES]
        with pytest.raises(InputOutputError, match="no more"):
            reader.read_into(memoryview(bytearray(1)))


def test_bytes_that_several_threads_keep_are_asked_for_once() -> None:
    server = Server()
    server.holds = lambda begin: server.most < 3  # threads wait for each other's bytes meanwhile
    remote = RemoteFile("place", len(CONTENT), "identity", server)

    def read_all(number: int) -> bool:
        got = bytearray(len(CONTENT))
        step = 100_000 + 7 * number
        for at in range(0, len(got), step):
            remote.read_into(at, memoryview(got)[at : at + step], ahead=len(got))
        return got == CONTENT

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read_all, range(8)))
    assert server.times_asked() == [1]


def test_all_at_once_returns_answers_in_order_and_waits_for_none_after_an_error() -> None:
    assert all_at_once(lambda number: number * number, range(100), 7) == [number * number for number in range(100)]
    assert all_at_once(str, [], 7) == []
    release = threading.Event()
    asked: list[int] = []

    def ask(number: int) -> None:
        asked.append(number)
        if number == 1:
            raise IndexError("of the second")
        release.wait(STOP_SECONDS)

    begin = time.monotonic()
    with pytest.raises(IndexError, match="of the second"):
        all_at_once(ask, range(100), 2)
    assert time.monotonic() - begin < STOP_SECONDS / 2
    release.set()
    time.sleep(0.05)
    assert len(asked) <= 4
