"""Workers keep to files of their own while there are enough, and share what is left."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dsv4convert.engine.schedule import Lane, Schedule

Task = tuple[int, int]


def files(*lengths: int) -> Schedule[Task]:
    return Schedule(iter([(file, number) for number in range(length)]) for file, length in enumerate(lengths))


def test_a_worker_stays_in_its_file_and_then_takes_an_untouched_one() -> None:
    schedule = files(2, 1, 2)
    mine, first = schedule.next(None) or (None, None)
    yours, second = schedule.next(None) or (None, None)
    assert (first, second) == ((0, 0), (1, 0))
    mine, third = schedule.next(mine) or (None, None)
    yours, fourth = schedule.next(yours) or (None, None)
    assert (third, fourth) == ((0, 1), (2, 0))


def test_workers_share_the_only_file() -> None:
    schedule = files(3)
    lanes = [schedule.next(None), schedule.next(None), schedule.next(None)]
    assert [found and found[1] for found in lanes] == [(0, 0), (0, 1), (0, 2)]
    assert schedule.next(None) is None


def test_a_stopped_schedule_gives_nothing_out() -> None:
    schedule = files(3, 3)
    found = schedule.next(None)
    assert found is not None
    schedule.stop()
    assert schedule.next(found[0]) is None
    assert schedule.next(None) is None


@given(
    lengths=st.lists(st.integers(0, 6), max_size=6),
    workers=st.integers(1, 5),
    turns=st.lists(st.integers(0, 4), max_size=60),
)
def test_every_task_is_given_out_once_whatever_the_turns(lengths: list[int], workers: int, turns: list[int]) -> None:
    schedule = files(*lengths)
    lanes: list[Lane[Task] | None] = [None] * workers
    given_out: list[Task] = []
    for turn in (*turns, *range(workers), *[0] * sum(lengths)):
        worker = turn % workers
        if found := schedule.next(lanes[worker]):
            lanes[worker], task = found
            given_out.append(task)
    assert schedule.next(lanes[0]) is None
    assert sorted(given_out) == [(file, number) for file, length in enumerate(lengths) for number in range(length)]


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6), workers=st.integers(1, 5))
def test_nobody_shares_a_file_while_one_is_free(lengths: list[int], workers: int) -> None:
    schedule = files(*lengths)
    lanes: list[Lane[Task] | None] = [None] * workers
    left = list(lengths)
    while any(left):
        busy: set[int] = set()
        for worker in range(workers):
            found = schedule.next(lanes[worker])
            if found is None:
                continue
            lanes[worker], (file, _) = found
            if file in busy:
                untouched = [n for n, length in enumerate(lengths) if left[n] == length]
                assert untouched == []
            busy.add(file)
            left[file] -= 1
