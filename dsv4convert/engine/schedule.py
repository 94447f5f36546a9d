"""Who makes what next: each worker keeps to a file of its own as long as there are enough files.

A file system lets one writer at a time into a file, so two workers in one file wait for each other; and a
worker that stays in a file reads its sources in the order in which they lie.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

Task = TypeVar("Task")


class Lane(Generic[Task]):
    """The work of one file that is left, and how many workers have come to it."""

    __slots__ = ("tasks", "workers")

    def __init__(self, tasks: Iterator[Task]) -> None:
        self.tasks = tasks
        self.workers = 0


class Schedule(Generic[Task]):
    """The work of all files; not to be called by two threads at once.

    >>> schedule = Schedule([iter("ab"), iter("xy")])
    >>> mine, first = schedule.next(None)
    >>> yours, second = schedule.next(None)
    >>> first, second, schedule.next(mine)[1], schedule.next(mine)[1]
    ('a', 'x', 'b', 'y')
    """

    def __init__(self, files: Iterable[Iterator[Task]]) -> None:
        self._untouched = deque(files)
        self._lanes: list[Lane[Task]] = []
        self._stopped = False

    def next(self, lane: Lane[Task] | None) -> tuple[Lane[Task], Task] | None:
        """Return the next task and its lane: ``lane`` while it lasts, else a file that no worker is in.

        When every file has somebody in it, the one with the fewest is shared. None: all is given out.
        """
        while not self._stopped:
            if lane is None:
                lane = self._choose()
                if lane is None:
                    return None
            for task in lane.tasks:
                return lane, task
            if lane in self._lanes:
                self._lanes.remove(lane)
            lane = None
        return None

    def stop(self) -> None:
        """Give out nothing more."""
        self._stopped = True

    def _choose(self) -> Lane[Task] | None:
        if self._untouched:
            self._lanes.append(Lane(self._untouched.popleft()))
            lane = self._lanes[-1]
        elif self._lanes:
            lane = min(self._lanes, key=lambda lane: lane.workers)
        else:
            return None
        lane.workers += 1
        return lane
