"""Histories of a run, its deaths, its restarts, and a stranger at work between any two of its system calls."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from dsv4convert.engine.conversion import execute
from dsv4convert.errors import Dsv4Error

from .histories import KILL, KINDS, Deed, World

# More in a long run: DSV4_HISTORIES=10000.
HISTORIES = int(os.environ.get("DSV4_HISTORIES", "500"))
STEPS = 4
MEMORY = Path("/dev/shm")

deeds = st.dictionaries(
    st.integers(0, 160), st.builds(Deed, st.sampled_from((*KINDS, KILL)), st.integers(0, 20)), max_size=4
)


class History(RuleBasedStateMachine):
    """Runs with any options, and a stranger during them and between them; ``World.check`` holds after each."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp(prefix="histories", dir=MEMORY if MEMORY.is_dir() else None))

    @initialize(shape=st.sampled_from(["file", "split", "folder"]), has_old=st.booleans())
    def begin(self, shape: str, has_old: bool) -> None:
        self.world = World(self.base / "world", shape)
        if has_old:
            old = self.world.planned("old")
            execute(old, threads=1)
            self.world.old = self.world.expected(old)

    @rule(
        deeds=deeds,
        stop_after=st.none() | st.integers(0, 4),
        how=st.sampled_from(["", "resume", "resume", "fresh"]),
        overwrite=st.booleans(),
    )
    def run(self, deeds: dict[int, Deed], stop_after: int | None, how: str, overwrite: bool) -> None:
        self.carry_out(deeds, stop_after, resume=how == "resume", fresh=how == "fresh", overwrite=overwrite)

    def carry_out(self, deeds: dict[int, Deed], stop_after: int | None, **options: bool) -> str:
        """Run among ``deeds``; return how the run ended."""
        return self.world.run(deeds, stop_after, **options)

    @rule(deed=st.builds(Deed, st.sampled_from(KINDS), st.integers(0, 20)))
    def between_runs(self, deed: Deed) -> None:
        self.world.act(deed)

    def teardown(self) -> None:
        """Whatever happened, a user who does as the errors say gets the output."""
        try:
            if hasattr(self, "world"):
                self._follow_the_errors()
        finally:
            shutil.rmtree(self.base)

    def _follow_the_errors(self) -> None:
        said = []
        for _ in range(12):
            try:
                execute(self.world.plan, threads=1, fresh=True, overwrite=True)
            except Dsv4Error as error:
                said.append(str(error))
                shutil.move(str(error.where), self.base / f"out of the way {len(said)}")
            else:
                for path, data in self.world.good.items():
                    assert path.read_bytes() == data
                return
        raise AssertionError(f"the errors lead nowhere: {said}")


def settings_for(histories: int, steps: int = STEPS, *, derandomize: bool = False) -> settings:
    """Return Hypothesis's settings for so many histories, of up to so many runs and deeds between them."""
    return settings(
        max_examples=histories,
        stateful_step_count=steps,
        deadline=None,
        derandomize=derandomize,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


TestHistories = History.TestCase
TestHistories.settings = settings_for(HISTORIES, derandomize="DSV4_HISTORIES" not in os.environ)
