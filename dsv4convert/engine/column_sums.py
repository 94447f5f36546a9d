"""Sums over all rows of a matrix, taken by the workers together before they quantise its rows.

A worker that wants the sums of a matrix takes parts of it (runs of rows) until none is left, so that all workers that
wait for the same sums share the reading. Parts are added in their order, whoever took them: the result does not depend
on the number of workers.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

# How often a worker that waits for others looks whether it is to stop.
POLL_SECONDS = 0.05

Sums: TypeAlias = NDArray[np.float64]


class ColumnSums:
    """The sum of ``parts`` vectors, each taken once."""

    def __init__(self, parts: int) -> None:
        self._parts = parts
        self._given = 0  # parts that a worker has begun
        self._added = 0
        self._early: dict[int, Sums] = {}  # parts that wait for one before them
        self._total: Sums | float = 0.0
        self._changed = threading.Condition()

    def get(self, take: Callable[[int], Sums], stopped: Callable[[], bool]) -> NDArray[np.float32]:
        """Return the sum as float32, having taken the parts that no other worker took; of a stopped run, any values.

        ``take`` returns the part with a number, from 0. What it raises must stop the other workers.
        """
        while not stopped():
            with self._changed:
                part = self._given
                if part == self._parts:
                    break
                self._given += 1
            self._add(part, take(part))
        with self._changed:
            while self._added < self._parts and not stopped():
                self._changed.wait(POLL_SECONDS)
            return np.asarray(self._total, np.float32).reshape(-1)

    def _add(self, part: int, values: Sums) -> None:
        with self._changed:
            self._early[part] = values
            while (following := self._early.pop(self._added, None)) is not None:
                self._total = self._total + following
                self._added += 1
            self._changed.notify_all()


class SharedSums:
    """The sums of the matrices that workers are in; those of a matrix go when the last worker has turned to another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: weakref.WeakValueDictionary[Hashable, ColumnSums] = weakref.WeakValueDictionary()

    def of(self, matrix: Hashable, parts: int) -> ColumnSums:
        """Return the sums of a matrix, which the caller keeps as long as it may make more of its rows."""
        with self._lock:
            found = self._known.get(matrix)
            if found is None:
                found = self._known[matrix] = ColumnSums(parts)
            return found
