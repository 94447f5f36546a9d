"""Kills all converting commands at random moments and system calls, resumes them, and compares what they made.

    python -m tests.engine.long_run FOLDER --kills 10000 --save RECORD.json

Each conversion takes a random command, with or without an older output to replace, and is killed until a child is let
live: at a random moment, or before a random system call that changes a file. After each death no final name stands for
anything but a whole output, old or new. The next child has ``--resume`` and must succeed, or at times ``--fresh`` or
neither: then it succeeds, or is refused and changes nothing. In the end the files are those of a run that was left
alone, and nothing else is there. Commands without ``--resume`` begin anew each time.
"""

from __future__ import annotations

import argparse
import collections
import random
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv4convert.engine.outputs import JOURNAL_SUFFIX
from dsv4convert.errors import InputMissingError, OutputExistsError, ResumeError

from .commands import (
    COMMANDS,
    OUT,
    PARTS,
    USES_UP,
    WITHOUT_RESUME,
    Child,
    Promise,
    empty_out,
    files_of,
    final_files,
    make_sources,
    run_alone,
    save_record,
    words,
)
from .crash import Killer

# How the next child goes on, and how often; "" is a plain run.
WAYS = {"--resume": 0.85, "--fresh": 0.1, "": 0.05}
LIVES = 0.1  # of the children that follow a death, those that are not to be killed
AFTER_THE_END = 1.05  # moments are chosen up to so many times the length of a run
SAY_SECONDS = 60.0
MOST_CHILDREN = 200  # of a conversion: one in ten is let live

# How a child may be refused by what an earlier one left: a plain run by an output or by unfinished work, and one that
# starts over by an output, which only --overwrite replaces. Neither changes anything.
REFUSALS = {"--resume": (), "--fresh": (OutputExistsError,), "": (OutputExistsError, ResumeError)}
# Where the source is used up, only the run that did it goes on: files of it are cut, then gone.
REFUSED_WITHOUT_SOURCE = (OutputExistsError, ResumeError, InputMissingError)


class CountingKiller(Killer):
    """Lets every call through, and tells how many there were."""

    def __init__(self, report: Path) -> None:
        self.most = 1 << 30
        super().__init__(self.most, None)
        self.report = report

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        done = super().call(name, *args, **options)
        self.report.write_text(str(self.most - self.left))
        return done


class Victim:
    """A command with or without ``--overwrite``: what it promises, its length in seconds and in system calls."""

    def __init__(self, command: str, base: Path, older: Path | None) -> None:
        self.command, self.base, self.older = command, base, older
        self.options = () if older is None else ("--overwrite",)
        out = empty_out(base, older)
        before = final_files(out)
        self.promise = Promise(before, run_alone(command, base, *self.options))
        empty_out(base, older)
        began = time.monotonic()
        Child(self._line(""), slow=True).end()
        self.seconds = time.monotonic() - began
        empty_out(base, older)
        report = base / "calls"
        Child(self._line(""), slow=True, prepare=CountingKiller(report).install).end()
        self.calls = int(report.read_text())

    def _line(self, how: str) -> list[str]:
        return words(self.command, self.base, *self.options, *([how] if how else []))

    def child(self, how: str, killer: Killer | None) -> Child:
        return Child(self._line(how), slow=True, prepare=None if killer is None else killer.install)


class LongRun:
    """Conversions that are killed, with counts of all that happened."""

    def __init__(self, folder: Path, seed: int, commands: Sequence[str] = tuple(COMMANDS)) -> None:
        self.rng = random.Random(seed)
        self.base, older = folder / "base", folder / "older"
        for place, number in ((self.base, 0), (older, 1)):
            place.mkdir(parents=True)
            make_sources(place, number)
        self.victims = []
        for number, command in enumerate(commands):
            empty_out(older)
            run_alone(command, older)
            kept = folder / f"older{number}"
            (older / OUT).rename(kept)
            self.victims += [Victim(command, self.base, kept_or_none) for kept_or_none in (None, kept)]
        self.kills: collections.Counter[str] = collections.Counter()
        self.by_command: collections.Counter[str] = collections.Counter()
        self.states: collections.Counter[str] = collections.Counter()
        self.endings: collections.Counter[str] = collections.Counter()
        self.conversions = 0
        self.wrong: list[str] = []

    def convert(self) -> None:
        """Carry out one conversion through its deaths."""
        victim = self.rng.choice(self.victims)
        name = " ".join((victim.command, *victim.options))
        out = empty_out(self.base, victim.older)
        how, may_live, began_anew = "", False, False
        story = []
        while True:
            lives = may_live and self.rng.random() < LIVES
            has_no_journal = not any(path.stat().st_size for path in out.glob(f"*{JOURNAL_SUFFIX}"))
            code, said, killed = self._run(victim, how, lives)
            story.append(f"{how or 'plain'} {killed or code}")
            wrong = victim.promise.broken(final_files(out), done=code == 0)
            refusals = REFUSED_WITHOUT_SOURCE if victim.command == USES_UP and how != "--resume" else REFUSALS[how]
            if how == "--resume" and began_anew and has_no_journal:
                # --fresh was killed between discarding the old journal and beginning a new one: only it can go on.
                refusals = (ResumeError,)
            began_anew = began_anew or how == "--fresh"
            if killed and code < 0:
                self.kills[killed.split(" ")[0]] += 1
                self.by_command[name] += 1
                self.states[victim.promise.state(out)] += 1
            elif code == 0:
                if differing := victim.promise.differing(out):
                    wrong.append(f"not as in a run left alone: {', '.join(differing)}")
            elif code not in [refusal.exit_code for refusal in refusals]:
                wrong.append(f"exit code {code}: {said}")
            self.endings[f"{how or 'plain'}: {'killed' if code < 0 else f'exit code {code}'}"] += 1
            self.wrong += [f"{name}: {'; '.join(story)}: {what}" for what in wrong]
            # Without --resume a child is refused when the one before it had died with all done.
            if code == 0 or wrong or (victim.command in WITHOUT_RESUME and not victim.promise.differing(out)):
                break
            if len(story) > MOST_CHILDREN:
                self.wrong.append(f"{name}: {'; '.join(story[-5:])}: does not come to an end")
                break
            may_live = True
            if victim.command not in WITHOUT_RESUME:
                how = self.rng.choices(list(WAYS), list(WAYS.values()))[0]
        self.conversions += 1

    def _run(self, victim: Victim, how: str, lives: bool) -> tuple[int, str, str]:
        """Run one child; return its exit code, what it said, and how it was to be killed."""
        before = self._kept()
        killed, killer = "", None
        if not lives and self.rng.random() < 0.5:
            killer = Killer(self.rng.randrange(victim.calls), None)
            killed = f"call {killer.left}"
        child = victim.child(how, killer)
        if not lives and killer is None:
            delay = self.rng.uniform(0, AFTER_THE_END * victim.seconds)
            killed = f"moment {delay:.4f}"
            time.sleep(delay)
            child.kill()
        code, said = child.end()
        if code > 0 and self._kept() != before:
            self.wrong.append(f"{victim.command} {how}: exit code {code}, and something has changed")
        return code, said, killed

    def _kept(self) -> dict[str, bytes]:
        """Return the outputs and the source that is used up, without an empty journal, which says nothing."""
        files = files_of(self.base / OUT) | files_of(self.base / PARTS)
        return {name: data for name, data in files.items() if data or not name.endswith(JOURNAL_SUFFIX)}

    def record(self) -> dict[str, Any]:
        return {
            "kills": sum(self.kills.values()),
            "at": dict(sorted(self.kills.items())),
            "conversions": self.conversions,
            "wrong": self.wrong,
            "by_command": dict(sorted(self.by_command.items())),
            "left_by_deaths": dict(sorted(self.states.items())),
            "endings": dict(sorted(self.endings.items())),
        }


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder in memory for all files; it must not exist")
    parser.add_argument("--kills", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=1e9, help="end after so long, however many kills there were")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    began = said = time.monotonic()
    try:
        run = LongRun(arguments.folder, arguments.seed)
        while sum(run.kills.values()) < arguments.kills and time.monotonic() - began < 60 * arguments.minutes:
            found = len(run.wrong)
            run.convert()
            for line in run.wrong[found:]:
                sys.stderr.write(f"{line}\n")
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                sys.stderr.write(f"{sum(run.kills.values())} kills, {len(run.wrong)} wrong, {said - began:.0f} s\n")
    finally:
        shutil.rmtree(arguments.folder)
    save_record(run.record(), arguments.seed, began, arguments.save)


if __name__ == "__main__":
    main()
