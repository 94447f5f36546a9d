"""When each phase of a converting command begins: interpreter, imports, plan, first and last bytes, and what ends it.

    python benchmarks/phases.py --folder /dev/shm/scale --threads 16 --save benchmarks/results/phases.json
    python benchmarks/phases.py --folder /dev/shm/many --many --before ../earlier

The commands and the source are those of ``scale.py``; with --many, the source is many tensors of few bytes, so that
the figures are the work on each of them. With --before, each round is one of another checkout and one of this. Figures
are seconds since the process began, medians; bytes count as done when their segment ends. A last line says how much of
its time a worker spends in the library.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
STARTED = "DSV4CONVERT_PHASES_STARTED"
# Parts of the output that mark the steady state: what lies between is neither start nor end.
SHARES = (0.05, 0.95)
IN_LIBRARY = "share of the workers' time in the library"


class Moments:
    """The moments at which phases begin; the first of each name, but of workers' ends the last."""

    def __init__(self) -> None:
        self._start = float(os.environ[STARTED])
        self._lock = threading.Lock()
        self.found: dict[str, float] = {}

    def mark(self, name: str, moment: float | None = None, *, last: bool = False) -> None:
        """Note that a phase begins at a moment, by default now."""
        since = (time.monotonic() if moment is None else moment) - self._start
        with self._lock:
            if last or name not in self.found:
                self.found[name] = since

    def around(self, owner: Any, name: str, before: str, after: str | None = None) -> None:
        """Have a function mark when it is called, and when it ends."""
        function: Callable[..., Any] = getattr(owner, name)

        def marked(*given: Any, **named: Any) -> Any:
            self.mark(before)
            try:
                return function(*given, **named)
            finally:
                if after is not None:
                    self.mark(after, last=True)

        setattr(owner, name, marked)


def timed(owner: Any, name: str, spent: list[float]) -> None:
    """Have a function note how long each of its calls takes."""
    function: Callable[..., Any] = getattr(owner, name)

    def noting(*given: Any) -> Any:
        begun = time.monotonic()
        try:
            return function(*given)
        finally:
            spent.append(time.monotonic() - begun)

    setattr(owner, name, noting)


def child(arguments: list[str]) -> None:
    """Run a command in this process; print when its phases began, as JSON, on stderr."""
    moments = Moments()
    moments.mark("interpreter")
    import gc

    from dsv4convert import __main__ as program

    gc.set_threshold(*program.GC_THRESHOLD)
    import dsv4convert.cli  # noqa: F401 - timed

    moments.mark("command line")
    from dsv4convert.engine import compiled_segments, conversion, outputs, run, worker

    moments.mark("engine")
    moments.around(conversion, "execute", "plan is made")
    moments.around(conversion, "run_plan", "files are made")
    moments.around(run, "_work", "first worker", "last worker ends")
    moments.around(conversion, "check_unchanged", "records are kept")
    for kind in (outputs.FolderOutput, outputs.FileOutputs):
        moments.around(kind, "finish", "checks", "names are given")
    moments.around(conversion, "write_manifest", "manifest")
    in_library: list[float] = []
    at_work: list[float] = []
    timed(compiled_segments, "make_segment", in_library)
    timed(run, "_work", at_work)
    done: list[tuple[float, int]] = []
    make = worker.Worker.run

    def made(self: Any, segment: Any, *given: Any) -> Any:
        result = make(self, segment, *given)
        done.append((time.monotonic(), segment.nbytes))
        return result

    worker.Worker.run = made  # type: ignore[method-assign]
    sys.argv = ["dsv4convert", *arguments]
    try:
        program.main()
    finally:
        moments.mark("end of the command")
        total, so_far = sum(size for _, size in done), 0
        for moment, size in sorted(done):
            for share in SHARES:
                if so_far < share * total <= so_far + size:
                    moments.mark(f"{share:.0%} of the bytes", moment)
            so_far += size
        print(json.dumps({**moments.found, IN_LIBRARY: sum(in_library) / sum(at_work)}), file=sys.stderr)


def once(command: list[str], output: Path, checkout: Path) -> dict[str, float]:
    """Run a command of the package in a checkout; return when its phases began."""
    import subprocess

    from side_by_side import remove

    remove(output)
    output.mkdir()
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, __file__, "--child", *command],
        env={**os.environ, STARTED: str(start), "PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    end = time.monotonic() - start
    if result.returncode:
        raise SystemExit(result.stderr)
    remove(output)
    return {**json.loads(result.stderr.splitlines()[-1]), "end of the process": end}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
        return
    # Not in the child, where what they import is timed.
    import argparse
    import compileall
    import statistics

    from scale import COMMANDS, ours
    from side_by_side import circumstances, commit, make_flash_slice, make_many_tensors, save

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/dsv4convert-scale"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--experts", type=int, default=48, help="of a layer of the source: 4.5 GB with 48")
    parser.add_argument("--many", action="store_true", help="a source of 26,725 tensors and 45 MB instead")
    parser.add_argument("--before", type=Path, help="an earlier checkout, for rounds in turn with those of this one")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    source, target = arguments.folder / "flash-slice", arguments.folder / "ours"
    if arguments.many:
        source = arguments.folder / "many-tensors"
        make_many_tensors(source)
    else:
        make_flash_slice(source, arguments.experts)
    checkouts = {"now": HERE} if arguments.before is None else {"before": arguments.before.resolve(), "now": HERE}
    for checkout in checkouts.values():
        compileall.compile_dir(str(checkout / "dsv4convert"), quiet=2)
    results = []
    for what in arguments.commands:
        python_m_package, command = 3, list(ours(source, target, what, arguments.threads).command)
        rounds = [
            [once(command[python_m_package:], target, checkout) for checkout in checkouts.values()]
            for _ in range(arguments.rounds + 1)
        ][1:]
        print(f"\n{what}")
        for when, found in zip(checkouts, zip(*rounds, strict=True), strict=True):
            names = sorted((name for name in found[0] if name != IN_LIBRARY), key=found[0].__getitem__)
            medians = {name: round(statistics.median(one[name] for one in found), 3) for name in (*names, IN_LIBRARY)}
            entry = {"what": what, "threads": arguments.threads, "rounds": arguments.rounds, "seconds": medians}
            results.append({**entry, "commit": commit(checkouts[when])})
            print(f" {when}")
            for name, figure in medians.items():
                print(f"  {figure:7.3f}  {name}", flush=True)
    save({**circumstances(), "results": results}, arguments.save)


if __name__ == "__main__":
    main()
