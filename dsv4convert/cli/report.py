"""What converting commands print: the plan, the progress and the summary."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from ..errors import ReportError, UsageError, escape_control
from ..html_report.figures import human_bytes as human_bytes
from ..html_report.figures import human_seconds as human_seconds
from .options import RunOptions
from .saying import report_of_done_work, unimportant
from .tables import Block, Table, print_blocks

if TYPE_CHECKING:
    from ..api import Progress
    from ..engine.conversion import Summary
    from ..engine.dry_run import DryRun
    from ..engine.upload import Upload

SummaryT = TypeVar("SummaryT", bound="Summary")

# Seconds between progress lines where there is no terminal.
PLAIN_PROGRESS_SECONDS = 10.0

MAX_COUNTED_LINES = 20

# Of a folder with files in more folders than that, one line tells.
MAX_FOLDERS = 16


def json_text(document: Any) -> str:
    """Return a JSON document as commands print it."""
    return json.dumps(document, indent=2, ensure_ascii=False)


def print_json(document: Any) -> None:
    """Print a JSON document on stdout."""
    typer.echo(json_text(document))


@contextmanager
def progress_display(quiet: bool, what: str = "converting") -> Iterator[Progress | None]:
    """Yield a function of bytes done and bytes in all: a bar on a terminal, plain lines elsewhere, on stderr.

    What cannot be shown never ends the work: it is dropped, and noted once when the work is done.
    """
    if quiet or sys.stderr is None:
        yield None
        return
    lost: list[str] = []
    if sys.stderr.isatty():
        with _bar(what) as update:
            yield unimportant(update, lost)
    else:
        yield unimportant(_plain_lines(), lost)
    with suppress(ReportError):  # the summary that follows says so too
        for note in lost:
            typer.echo(f"note: {note}")


@contextmanager
def _bar(what: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    # Drawn by the calls alone, and by no thread of its own, whose errors nobody would hear of.
    bar = Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)
    task = bar.add_task(what, total=None)
    with suppress(OSError, ValueError):
        bar.start()
    try:
        yield lambda done, total: bar.update(task, completed=done, total=total, refresh=True)
    finally:
        with suppress(OSError, ValueError):
            bar.stop()


def _plain_lines() -> Progress:
    started = time.monotonic()
    last = started

    def update(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PLAIN_PROGRESS_SECONDS or not done:
            return
        last = now
        rate = done / (now - started)
        typer.echo(
            f"{done / total:4.0%}  {human_bytes(done)} of {human_bytes(total)}  {human_bytes(rate)}/s  "
            f"{human_seconds((total - done) / rate)} left",
            err=True,
        )

    return update


def print_summary(summary: Summary) -> None:
    """Print what a conversion wrote, what it left out and why, and what it took."""
    from ..formats.backend import NUMPY, describe_codecs

    if summary.resumed_bytes == summary.written_bytes:
        typer.echo("finished by an earlier run; nothing was left to do")
    for path, size, _, count in folded([(path, size, 0) for path, size in summary.files]):
        files = f"  {count:,} files" if count > 1 else ""
        typer.echo(f"wrote {escape_control(path)}  {human_bytes(size)}{files}")
    typer.echo(f"{summary.tensors} tensors")
    for entry in summary.dropped:
        typer.echo(f"left out {entry.what}: {entry.count} tensors, {human_bytes(entry.nbytes)} ({entry.reason})")
    for note in summary.notes:
        typer.echo(f"note: {escape_control(note)}")
    # What is out of range or no number comes before what was rounded.
    for counted in sorted(summary.counted, key=lambda counted: not (counted["nan"] or counted["overflow"]))[
        :MAX_COUNTED_LINES
    ]:
        kinds = ", ".join(
            f"{counted[key]} {key}" for key in ("nan", "overflow", "underflow", "changed") if counted[key]
        )
        typer.echo(f"counted in {escape_control(counted['tensor'])}: {kinds}")
    if len(summary.counted) > MAX_COUNTED_LINES:
        typer.echo(f"counted in {len(summary.counted) - MAX_COUNTED_LINES} more tensors (see --json)")
    if summary.backend == NUMPY:
        typer.echo(f"note: {describe_codecs()}")
    typer.echo(
        f"{human_seconds(summary.seconds)}, {human_bytes(summary.bytes_per_second)}/s, "
        f"peak memory {human_bytes(summary.peak_memory_bytes)}"
    )


def folded(files: Iterable[tuple[str, int, int]]) -> list[tuple[str, int, int, int]]:
    """Return files (path, bytes, tensors) with those in a folder of many folders as one entry; last, how many they are.

    >>> folded([("out/a", 1, 0), *((f"out/items/leaf{n}/0", 10, 1) for n in range(40))])
    [('out/a', 1, 0, 1), ('out/items/', 400, 40, 40)]
    """
    files = list(files)
    within: dict[str, set[str]] = {}
    for path, _, _ in files:
        parts = path.split("/")
        for end in range(1, len(parts) - 1):
            within.setdefault("/".join(parts[:end]), set()).add(parts[end])
    entries: dict[str, tuple[int, int, int]] = {}
    for path, size, tensors in files:
        parts = path.split("/")
        folders = ("/".join(parts[:end]) for end in range(1, len(parts) - 1))
        name = next((f"{folder}/" for folder in folders if len(within[folder]) > MAX_FOLDERS), path)
        before = entries.get(name, (0, 0, 0))
        entries[name] = (before[0] + size, before[1] + tensors, before[2] + 1)
    return [(name, *entry) for name, entry in entries.items()]


def describe_plan(plan: DryRun) -> Iterator[Block]:
    """Yield a dry run as tables: files, what is left out, and the disk and memory that the run needs."""
    yield Table(
        ("file to write", "size", "tensors"),
        [
            (f"{path} ({count:,} files)" if count > 1 else path, human_bytes(size), f"{tensors:,}")
            for path, size, tensors, count in folded([(file.path, file.bytes, file.tensors) for file in plan.files])
        ],
        frozenset({1, 2}),
    )
    yield Table(
        ("to leave out", "size", "tensors", "reason"),
        [(entry.what, human_bytes(entry.nbytes), f"{entry.count:,}", entry.reason) for entry in plan.dropped],
        frozenset({1, 2}),
    )
    for note in plan.notes:
        yield f"note: {note}"
    needs = (
        ("disk", plan.disk_needed, plan.disk_free),
        ("memory", plan.memory_needed, plan.memory_available),
    )
    yield Table(
        ("resource", "needed", "available", "verdict"),
        [
            (name, human_bytes(needed), human_bytes(there), "enough" if needed <= there else "NOT ENOUGH")
            for name, needed, there in needs
        ],
        frozenset({1, 2}),
    )


def _upload(run: RunOptions) -> Upload | None:
    """Return where to send the output, and the command for the model card."""
    if run.upload is None:
        if run.delete_uploaded:
            raise UsageError("--delete-uploaded is for --upload", hint="add --upload OWNER/NAME")
        return None
    from ..engine.upload import Upload

    return Upload(run.upload, run.delete_uploaded, shlex.join(["dsv4convert", *sys.argv[1:]]))


def run_conversion(
    convert: Callable[..., SummaryT], run: RunOptions, source: Path, out: Path | None, **options: Any
) -> SummaryT:
    """Call a conversion of the API with progress, and print its summary, or what a dry run found.

    ``options`` are a command's own: they have the names of the API's keywords.
    """
    with progress_display(run.quiet or run.as_json or run.dry_run) as progress:
        summary = convert(
            source,
            out,
            threads=run.threads,
            overwrite=run.overwrite,
            resume=run.resume,
            fresh=run.fresh,
            dry_run=run.dry_run,
            progress=progress,
            lock=not run.no_lock,
            cache=run.cache,
            upload=_upload(run),
            workers=run.workers,
            **options,
        )
    if run.quiet and not run.as_json and summary.dry_run is None:
        return summary
    with report_of_done_work():
        if run.as_json:
            print_json(summary.as_json())
        elif summary.dry_run is not None:
            print_blocks(describe_plan(summary.dry_run))
        else:
            print_summary(summary)
    return summary
