"""Fetching ranges of remote files: asked for again where a request breaks, over several connections, in bounded memory.

One connection to a store often carries a small part of what the link carries. So a range is cut into blocks, which
the threads of ``Connections`` fetch ahead of their reader, each over a connection of its own.
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import TypeVar

from ..errors import InputOutputError

# Connections over which blocks are fetched at once, the bytes of a block, and those that blocks take together.
CONNECTIONS = 32
BLOCK_BYTES = 2 * 2**20
AHEAD_BYTES = 80 * 2**20
# A block that nobody wants any more is given up after so many bytes at the latest.
GIVE_UP_BYTES = 2**18

# How often, and after which waits, a request is made again that brought no byte.
MAX_ATTEMPTS = 10
# What to do about a file that changed meanwhile: commands that only read have no unfinished work.
RUN_AGAIN = "run again, a conversion with --fresh"
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
SLICE_SECONDS = 0.1

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class TransientError(Exception):
    """A request that failed and may succeed when it is made again, after ``wait`` seconds if the server said so."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Transport(ABC):
    """How bytes of one remote file are fetched."""

    @abstractmethod
    def fetch(self, begin: int, end: int) -> AbstractContextManager[Iterator[bytes]]:
        """Request bytes begin..end (exclusive); the iterator yields them as they arrive.

        Raises:
            TransientError: the request failed, or the bytes stopped coming, and it may be made again.
            Dsv4Error: it will not succeed.
        """


def wait_after(
    error: TransientError,
    failures: int,
    address: str,
    stopped: Callable[[], bool] | None = None,
    most: int = MAX_ATTEMPTS,
    doing: str = "fetched",
) -> int:
    """Wait before a request is made again; return how many have failed in a row, of which ``most`` are too many.

    ``doing`` is what is to be done with the address.

    Raises:
        InputOutputError: too many have, or the run was stopped.
    """
    import random

    failures += 1
    if failures >= most:
        raise InputOutputError(
            f"cannot be {doing} ({error})",
            where=address,
            got=f"{failures} failures in a row",
            hint="check the connection and try again",
        )
    wait = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (failures - 1)) * random.uniform(0.5, 1)
    if error.wait is not None:
        wait = max(wait, min(error.wait, 10 * LONGEST_WAIT_SECONDS))
    end = time.monotonic() + wait
    while (left := end - time.monotonic()) > 0:
        if stopped is not None and stopped():
            raise _stopped(address)
        time.sleep(min(left, SLICE_SECONDS))
    return failures


def retried(ask: Callable[[], Answer], address: str, most: int = MAX_ATTEMPTS, *, doing: str = "fetched") -> Answer:
    """Return what ``ask()`` returns, asking again after errors that pass, ``most`` times in all.

    ``doing`` is what an error says that could not be done.

    Raises:
        Dsv4Error: what ``ask`` raises, or it failed too often.
    """
    failures = 0
    while True:
        try:
            return ask()
        except TransientError as error:
            failures = wait_after(error, failures, address, most=most, doing=doing)


def all_at_once(ask: Callable[[Item], Answer], items: Sequence[Item], threads: int) -> list[Answer]:
    """Return what ``ask`` returns of each item, asked for by ``threads`` threads.

    They are daemons, and neither the first error nor Ctrl-C waits for what the others have under way: a server that
    does not answer is asked for minutes.

    Raises:
        Exception: what ``ask`` raises first.
    """
    from queue import SimpleQueue

    left = iter(enumerate(items))
    lock = threading.Lock()
    is_over = threading.Event()
    found: SimpleQueue[tuple[int, Answer] | Exception] = SimpleQueue()

    def work() -> None:
        while True:
            with lock:
                one = next(left, None)
            if one is None or is_over.is_set():
                return
            number, item = one
            try:
                found.put((number, ask(item)))
            except Exception as error:  # noqa: BLE001 - handed to the reader, which raises it
                found.put(error)

    for _ in range(min(threads, len(items))):
        threading.Thread(target=work, name="reader", daemon=True).start()
    answers: dict[int, Answer] = {}
    try:
        while len(answers) < len(items):
            one = found.get()
            if isinstance(one, Exception):
                raise one
            answers[one[0]] = one[1]
    finally:
        is_over.set()
    return [answers[number] for number in range(len(items))]


def _stopped(address: str) -> InputOutputError:
    return InputOutputError("fetching was stopped", where=address)


class Stream:
    """Bytes begin..end (exclusive) of a remote file, once and in order; a request that breaks is made again.

    Use it as a context manager. ``stopped`` says whether to give up while waiting.
    """

    def __init__(
        self, transport: Transport, address: str, begin: int, end: int, stopped: Callable[[], bool] | None = None
    ) -> None:
        self._transport = transport
        self._address = address
        self._end = end
        self._stopped = stopped
        self._request = ExitStack()
        self._pieces: Iterator[bytes] | None = None
        self._piece = memoryview(b"")
        self._arrived = begin
        self._failures = 0

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the request."""
        self._pieces = None
        self._request.close()

    def read_into(self, view: memoryview) -> None:
        """Fill ``view`` with the next bytes.

        Raises:
            InputOutputError: the server failed ``MAX_ATTEMPTS`` times in a row, or the run was stopped.
            Dsv4Error: see ``Transport.fetch``.
        """
        done = 0
        while done < view.nbytes:
            if not self._piece.nbytes:
                self._piece = self._next_piece()
            count = min(self._piece.nbytes, view.nbytes - done)
            view[done : done + count] = self._piece[:count]
            self._piece = self._piece[count:]
            done += count

    def _next_piece(self) -> memoryview:
        while True:
            try:
                if self._pieces is None:
                    self._pieces = self._request.enter_context(self._transport.fetch(self._arrived, self._end))
                piece = memoryview(next(self._pieces, b""))
                if not piece.nbytes:
                    raise TransientError("the connection was closed early")
                if piece.nbytes > self._end - self._arrived:
                    raise InputOutputError("the server sent more bytes than asked for", where=self._address)
                self._arrived += piece.nbytes
                self._failures = 0
                if self._arrived == self._end:
                    self._end_request()
                return piece
            except TransientError as error:
                self.close()
                self._failures = wait_after(error, self._failures, self._address, self._stopped)

    def _end_request(self) -> None:
        """Take the end of the last answer too, or its connection would be closed, and the next request open another."""
        with suppress(TransientError):  # what was asked for is here
            if self._pieces is not None and next(self._pieces, b""):
                raise InputOutputError("the server sent more bytes than asked for", where=self._address)
        self.close()


class _Block:
    """A part of a file that one request asks for; what changes is changed under the lock of the connections."""

    def __init__(self, transport: Transport, address: str, begin: int, buffer: memoryview) -> None:
        self.transport = transport
        self.address = address
        self.begin = begin
        self.buffer = buffer
        self.done = threading.Event()
        self.is_given_up = False
        self.error: Exception | None = None


class Connections:
    """Threads that fetch blocks, each over a connection of its own, and the memory that all blocks share.

    The threads begin with the work, and are daemons: a program that ends does not wait for bytes on their way.
    """

    def __init__(self, count: int = CONNECTIONS, memory: int = AHEAD_BYTES) -> None:
        self._count = count
        self._memory = memory
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget all threads and blocks: a process that was forked has none of the threads."""
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._queue: deque[_Block] = deque()
        self._threads = 0
        self._idle = 0
        self._held = 0  # bytes of all blocks
        self._wanting = 0  # readers that have not asked for all their bytes yet
        self._free: list[memoryview] = []  # of a whole block each

    def join(self) -> None:
        """Count a reader among those that share the memory, until it has asked for all its bytes."""
        with self._lock:
            self._wanting += 1

    def leave(self) -> None:
        """Count a reader no longer."""
        with self._lock:
            self._wanting -= 1

    def ask(self, transport: Transport, address: str, begin: int, size: int, held: int) -> _Block | None:
        """Ask for a block on behalf of a reader that holds ``held`` bytes; None where its share of the memory is full.

        A reader that holds nothing always gets a block.
        """
        with self._lock:
            share = self._memory // max(1, self._wanting)
            if held and (held + size > share or self._held + size > self._memory):
                return None
            self._held += size
            is_kept = size == BLOCK_BYTES and self._free
            block = _Block(transport, address, begin, self._free.pop() if is_kept else memoryview(bytearray(size)))
            self._queue.append(block)
            # An idle thread counts as one until it has taken a block, and takes one only.
            if len(self._queue) > self._idle and self._threads < self._count:
                self._threads += 1
                threading.Thread(target=self._fetch_blocks, name="connection", daemon=True).start()
            self._work.notify()
            return block

    def wait_for(self, block: _Block, stopped: Callable[[], bool] | None) -> None:
        """Wait until a block is there.

        Raises:
            InputOutputError: the run was stopped.
            Dsv4Error: the block cannot be had.
        """
        while not block.done.wait(SLICE_SECONDS):
            if stopped is not None and stopped():
                raise _stopped(block.address)
        if block.error is not None:
            raise block.error

    def give_back(self, block: _Block) -> None:
        """Give back the memory of a block, whether or not it is there; a thread that still fetches it gives up."""
        with self._lock:
            block.is_given_up = True
            if block in self._queue:
                self._queue.remove(block)
                block.done.set()
            if block.done.is_set():
                self._release(block)

    def _release(self, block: _Block) -> None:
        self._held -= block.buffer.nbytes
        if block.buffer.nbytes == BLOCK_BYTES:
            self._free.append(block.buffer)

    def _fetch_blocks(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
                while not self._queue:
                    self._work.wait()
                self._idle -= 1
                block = self._queue.popleft()
            try:
                self._fetch(block)
            except Exception as error:  # noqa: BLE001 - handed to the reader, which raises it
                block.error = error
            with self._lock:
                block.done.set()
                if block.is_given_up:
                    self._release(block)

    def _fetch(self, block: _Block) -> None:
        end = block.begin + block.buffer.nbytes
        with Stream(block.transport, block.address, block.begin, end, lambda: block.is_given_up) as stream:
            for at in range(0, block.buffer.nbytes, GIVE_UP_BYTES):
                if block.is_given_up:
                    return
                stream.read_into(block.buffer[at : at + GIVE_UP_BYTES])


_connections = Connections()
os.register_at_fork(after_in_child=_connections.begin_anew)


class Ahead:
    """Bytes begin..end (exclusive) of a remote file, once and in order, fetched ahead in blocks.

    Use it as a context manager. ``stopped`` says whether to give up while waiting.
    """

    def __init__(
        self,
        transport: Transport,
        address: str,
        begin: int,
        end: int,
        stopped: Callable[[], bool] | None = None,
        connections: Connections = _connections,
    ) -> None:
        self.position = begin
        self.end = end
        self._transport = transport
        self._address = address
        self._stopped = stopped
        self._connections = connections
        self._blocks: deque[_Block] = deque()
        self._asked = begin
        self._is_wanting = begin < end
        if self._is_wanting:
            connections.join()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up what has not been read."""
        self._ask_no_more()
        while self._blocks:
            self._connections.give_back(self._blocks.popleft())

    def read_into(self, view: memoryview) -> None:
        """Fill ``view`` with the next bytes.

        Raises:
            InputOutputError: the server failed ``MAX_ATTEMPTS`` times in a row, or the run was stopped.
            Dsv4Error: see ``Transport.fetch``.
        """
        done = 0
        while done < view.nbytes:
            self.ask()
            block = self._blocks[0]
            self._connections.wait_for(block, self._stopped)
            begin = self.position - block.begin
            count = min(block.buffer.nbytes - begin, view.nbytes - done)
            view[done : done + count] = block.buffer[begin : begin + count]
            self.position += count
            done += count
            if begin + count == block.buffer.nbytes:
                self._connections.give_back(self._blocks.popleft())

    def ask(self) -> None:
        """Ask for as many blocks as there is memory for."""
        while self._asked < self.end:
            size = min(BLOCK_BYTES, self.end - self._asked)
            held = sum(block.buffer.nbytes for block in self._blocks)
            block = self._connections.ask(self._transport, self._address, self._asked, size, held)
            if block is None:
                return
            self._blocks.append(block)
            self._asked += size
        self._ask_no_more()

    def _ask_no_more(self) -> None:
        if self._is_wanting:
            self._is_wanting = False
            self._connections.leave()
