"""What a run has finished: a digest for every segment, and the counts of the tensors where anything was counted.

A hundred thousand tensors are ordinary, and an object for each of their segments would be the largest
thing in memory. So the ledger keeps bytes, and makes a tensor's report when it is asked for.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple, overload

import xxhash

from ..formats.base import Tally
from ..plan import OutputFile, OutputTensor, Plan

DIGEST_BYTES = 16  # xxh3-128
READ_BYTES = 2**22


class TensorReport(NamedTuple):
    """What became of one output tensor.

    ``digest`` is the hex xxh3-128 of its segments' digests, or of its bytes when it has one segment.
    """

    file: str
    name: str
    digest: str
    tally: Tally


class Ledger(Sequence[TensorReport]):
    """The finished segments of a plan; as a sequence, the reports of all its tensors in the plan's order."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._first_tensor = [0]  # of each file
        self._first_segment = array("Q", [0])  # of each tensor
        for file in plan.files:
            for tensor in file.tensors:
                self._first_segment.append(self._first_segment[-1] + len(tensor.segments))
            self._first_tensor.append(len(self._first_segment) - 1)
        self._digests = bytearray(DIGEST_BYTES * self._first_segment[-1])
        self._finished = bytearray(self._first_segment[-1])
        self._tallies: dict[int, Tally] = {}
        self._zeros: dict[tuple[int, int, int], int] = {}

    def add(self, file: int, tensor: int, segment: int, digest: bytes, tally: Tally, zeros: int = 0) -> None:
        """Note a finished segment, once; bits of ``zeros`` are operands of which every byte is zero."""
        number = self._first_tensor[file] + tensor
        place = self._first_segment[number] + segment
        self._digests[place * DIGEST_BYTES : (place + 1) * DIGEST_BYTES] = digest
        self._finished[place] = 1
        if any(tally.counts()):
            self._tallies.setdefault(number, Tally()).add(tally)
        if zeros:
            self._zeros[file, tensor, segment] = zeros

    def holds(self, file: int, tensor: int, segment: int) -> bool:
        """Return whether a segment is finished."""
        return bool(self._finished[self._first_segment[self._first_tensor[file] + tensor] + segment])

    @property
    def has_any(self) -> bool:
        """Return whether any segment is finished."""
        return 1 in self._finished

    @property
    def is_complete(self) -> bool:
        """Return whether every segment is finished."""
        return all(self._finished)

    def total(self) -> Tally:
        """Return the counts of all tensors together."""
        total = Tally()
        for tally in self._tallies.values():
            total.add(tally)
        return total

    def flagged(self) -> list[TensorReport]:
        """Return the reports of the tensors in which anything was counted, in the plan's order."""
        return [self[number] for number in sorted(self._tallies)]

    def zeros(self) -> Iterator[tuple[Path, int, int]]:
        """Yield (file, offset, bytes) of what was read of the source and is all zero."""
        for (file, tensor, number), bits in self._zeros.items():
            segment = self._plan.files[file].tensors[tensor].segments[number]
            for place, operand in enumerate(segment.operands):
                if bits >> place & 1:
                    yield operand.file, operand.offset, segment.bytes_read(operand)

    def __len__(self) -> int:
        return len(self._first_segment) - 1

    @overload
    def __getitem__(self, index: int) -> TensorReport: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[TensorReport]: ...
    def __getitem__(self, index: int | slice) -> TensorReport | Sequence[TensorReport]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        file_number = bisect_right(self._first_tensor, number) - 1
        file = self._plan.files[file_number]
        return self._report(file, file.tensors[number - self._first_tensor[file_number]], number)

    def __iter__(self) -> Iterator[TensorReport]:
        number = count()  # of a tensor in the plan, which need not be looked for here
        return (self._report(file, tensor, next(number)) for file in self._plan.files for tensor in file.tensors)

    def _report(self, file: OutputFile, tensor: OutputTensor, number: int) -> TensorReport:
        begin, end = self._first_segment[number : number + 2]
        digests = self._digests[begin * DIGEST_BYTES : end * DIGEST_BYTES]
        return TensorReport(file.name, tensor.name, combine_digests(digests), self._tallies.get(number, Tally()))


def digest_of_range(descriptor: int, offset: int, nbytes: int) -> bytes:
    """Return the xxh3-128 of bytes of an open file, of fewer where it ends before.

    Raises:
        OSError: it cannot be read.
    """
    digest = xxhash.xxh3_128()
    while nbytes and (chunk := os.pread(descriptor, min(nbytes, READ_BYTES), offset)):
        digest.update(chunk)
        nbytes -= len(chunk)
        offset += len(chunk)
    return bytes(digest.digest())


def combine_digests(digests: bytes | bytearray) -> str:
    """Return a tensor's checksum from its segments', one behind the other: the only one, or the xxh3-128 of all."""
    return digests.hex() if len(digests) == DIGEST_BYTES else str(xxhash.xxh3_128_hexdigest(digests))
