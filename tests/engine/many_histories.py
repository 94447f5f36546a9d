"""Makes as many histories as asked for (see ``test_histories``), and records how their runs ended.

python -m tests.engine.many_histories --histories 10000 --seed 0 --save RECORD.json
"""

from __future__ import annotations

import argparse
import collections
import time
from pathlib import Path
from typing import ClassVar

import hypothesis
from hypothesis.stateful import run_state_machine_as_test

from .commands import save_record
from .histories import Deed
from .test_histories import History, settings_for

STEPS = 8


class Counted(History):
    """A history whose runs are counted by how they ended: done, killed, or an exit code."""

    endings: ClassVar[collections.Counter[str]] = collections.Counter()
    histories = 0

    def __init__(self) -> None:
        super().__init__()
        Counted.histories += 1

    def carry_out(self, deeds: dict[int, Deed], stop_after: int | None, **options: bool) -> str:
        """Run, and count the run."""
        ended = super().carry_out(deeds, stop_after, **options)
        self.endings[ended.partition(" ")[0]] += 1
        return ended


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--histories", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    began = time.monotonic()
    wrong: list[str] = []
    try:
        run_state_machine_as_test(
            hypothesis.seed(arguments.seed)(Counted), settings=settings_for(arguments.histories, STEPS)
        )
    except AssertionError as error:
        wrong.append(str(error))
    found = {
        "histories": Counted.histories,
        "runs": sum(Counted.endings.values()),
        "endings": dict(sorted(Counted.endings.items())),
        "wrong": wrong,
    }
    save_record(found, arguments.seed, began, arguments.save)


if __name__ == "__main__":
    main()
