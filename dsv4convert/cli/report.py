"""What converting commands print: the plan, the progress and the summary."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from ..containers.sources import shown
from ..engine.monitor import Step, StepListener, Timeline
from ..errors import ReportError, UsageError, counted, escape_control
from ..html_report import CONVERSION
from ..html_report.figures import human_bytes, human_seconds
from .options import JSON, TEXT, RunOptions
from .pages import check_page, write_page
from .saying import print_json, report_of_done_work, say, unimportant
from .tables import Block, Table, print_blocks

if TYPE_CHECKING:
    from ..api import Progress
    from ..engine.conversion import Summary
    from ..engine.dry_run import DryRun
    from ..engine.upload import Upload

SummaryT = TypeVar("SummaryT", bound="Summary")

# Seconds between progress lines where there is no terminal, between those for programs, and between drawings of the
# bar, each of which takes a millisecond: a verification tells of every tensor.
PLAIN_PROGRESS_SECONDS, JSON_PROGRESS_SECONDS, BAR_SECONDS = 10.0, 0.5, 0.05

# What threads mostly do, as the bar says it.
WAITING = {
    "processor": "computing",
    "disk": "waiting for the disk",
    "network": "waiting for the network",
    "other": "waiting",
}

MAX_COUNTED_LINES = 20

# Of a folder with files in more folders than that, one line tells.
MAX_FOLDERS = 16


class _Listener(StepListener):
    """Shows progress and notes, and keeps a time line."""

    def __init__(
        self,
        show: Callable[[Step, int], None] | None,
        timeline: Timeline | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self._show = show
        self._timeline = timeline
        self._note = note

    def __call__(self, done: int, total: int) -> None:
        """Show how many bytes of so many are done."""
        self.step(Step(done), total)

    def step(self, step: Step, total: int) -> None:
        """Show how far a conversion of ``total`` bytes is."""
        if self._timeline is not None and step.threads:
            self._timeline.add(step.threads)
        if self._show is not None:
            self._show(step, total)

    def note(self, line: str) -> None:
        """Show a line for people."""
        if self._note is not None:
            self._note(escape_control(line))


@contextmanager
def progress_display(
    quiet: bool, what: str = "converting", *, form: str = TEXT, timeline: Timeline | None = None
) -> Iterator[Progress | None]:
    """Yield a function of bytes done and bytes in all: a bar on a terminal, plain lines elsewhere, on stderr.

    The bar shows the file in work and what is waited for too, where that is told. In the form JSON there are lines that
    a program can read instead, with ``quiet`` as well. A ``timeline`` is filled. What cannot be shown never ends the
    work: it is dropped, and without ``quiet`` noted once when the work is done.
    """
    lost: list[str] = []
    if sys.stderr is not None and form == JSON:
        yield _Listener(unimportant(_json_lines(), lost), timeline)
    elif quiet or sys.stderr is None:
        yield None if timeline is None else _Listener(None, timeline)
    elif sys.stderr.isatty():
        with _bar(what) as (update, above):
            yield _Listener(unimportant(update, lost), timeline, above)
    else:
        lines = unimportant(_plain_lines(), lost)
        yield _Listener(lambda step, total: lines(step.done, total), timeline, say)
    with suppress(ReportError):  # the summary that follows says so too
        for note in () if quiet else lost:
            typer.echo(f"note: {note}")


@contextmanager
def _bar(what: str) -> Iterator[tuple[Callable[[Step, int], None], Callable[[str], None]]]:
    from rich.console import Console
    from rich.markup import escape
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
    drawn = 0.0
    with suppress(OSError, ValueError):
        bar.start()

    def update(step: Step, total: int) -> None:
        nonlocal drawn
        if step.done < total and time.monotonic() - drawn < BAR_SECONDS:
            return
        drawn = time.monotonic()
        told = what if step.file is None else f"{what} {step.file}"
        if step.waiting is not None:
            told += f", {WAITING[step.waiting.most]}"
        bar.update(task, description=escape(escape_control(told)), completed=step.done, total=total, refresh=True)

    def above(line: str) -> None:
        with suppress(OSError, ValueError):
            bar.console.print(escape(line))

    try:
        yield update, above
    finally:
        with suppress(OSError, ValueError):
            bar.stop()


class _Rate:
    """Bytes a second from the first call on: what a resumed run finds done is not counted."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def of(self, done: int) -> tuple[float, float]:
        """Return the seconds since the first call, and the rate of a run of which ``done`` bytes are done."""
        now = time.monotonic()
        if self._first is None:
            self._first = now, done
        seconds = now - self._first[0]
        return seconds, (done - self._first[1]) / seconds if seconds else 0.0


def _plain_lines() -> Callable[[int, int], None]:
    rate_of = _Rate()
    last = 0.0

    def update(done: int, total: int) -> None:
        nonlocal last
        seconds, rate = rate_of.of(done)
        if seconds - last < PLAIN_PROGRESS_SECONDS or not rate:
            return
        last = seconds
        typer.echo(
            f"{done / total:4.0%}  {human_bytes(done)} of {human_bytes(total)}  {human_bytes(rate)}/s  "
            f"{human_seconds((total - done) / rate)} left",
            err=True,
        )

    return update


def _json_lines() -> Callable[[Step, int], None]:
    """Return what writes a line of JSON (schemas/progress.schema.json) now and then, and one when all is done."""
    rate_of = _Rate()
    last = -JSON_PROGRESS_SECONDS
    is_over = False

    def update(step: Step, total: int) -> None:
        nonlocal last, is_over
        seconds, rate = rate_of.of(step.done)
        is_last = step.done >= total and step.file is None  # what the last call of every command says
        if is_over or (seconds - last < JSON_PROGRESS_SECONDS and not is_last):
            return
        last, is_over = seconds, is_last
        line = {
            "event": "finished" if is_last else "progress",
            "done": step.done,
            "total": total,
            "seconds": round(seconds, 3),
            "bytes_per_second": round(rate, 1),
            "seconds_left": round((total - step.done) / rate, 1) if rate else None,
            "file": step.file,
            "waiting": None if step.waiting is None else {k: round(v, 3) for k, v in step.waiting._asdict().items()},
        }
        sys.stderr.write(json.dumps(line) + "\n")
        sys.stderr.flush()

    return update


def print_summary(summary: Summary, gone: str = "") -> None:
    """Print what a conversion wrote, what it left out and why, and what it took.

    ``gone`` says what becomes of files that do not stay.
    """
    from ..formats.backend import NUMPY, describe_codecs

    if summary.resumed_bytes == summary.written_bytes:
        typer.echo("finished by an earlier run; nothing was left to do")
    gone = "uploaded, removed here" if summary.deleted else gone
    done, end = ("made", f"  {gone}") if gone else ("wrote", "")
    for path, size, _, count in folded([(path, size, 0) for path, size in summary.files]):
        files = f"  {counted(count, 'file')}" if count > 1 else ""
        typer.echo(f"{done} {escape_control(path)}  {human_bytes(size)}{files}{end}")
    typer.echo(counted(summary.tensors))
    for entry in summary.dropped:
        typer.echo(f"left out {entry.what}: {counted(entry.count)}, {human_bytes(entry.nbytes)} ({entry.reason})")
    for note in summary.notes:
        typer.echo(f"note: {escape_control(note)}")
    # What is out of range or no number comes before what was rounded.
    for tensor in sorted(summary.counted, key=lambda tensor: not (tensor["nan"] or tensor["overflow"]))[
        :MAX_COUNTED_LINES
    ]:
        kinds = ", ".join(f"{tensor[key]} {key}" for key in ("nan", "overflow", "underflow", "changed") if tensor[key])
        typer.echo(f"counted in {escape_control(tensor['tensor'])}: {kinds}")
    if len(summary.counted) > MAX_COUNTED_LINES:
        typer.echo(f"counted in {counted(len(summary.counted) - MAX_COUNTED_LINES, 'more tensor')} (see --json)")
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
    if plan.worker_disk_needed:
        room = human_bytes(plan.worker_disk_needed)
        yield f"note: each worker needs {room} of its machine's disk, in TMPDIR or /tmp, for the file that it makes"
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
            raise UsageError("--delete-uploaded is for --upload", hint="add --upload ADDRESS")
        return None
    from ..engine.upload import Upload

    return Upload(run.upload, run.delete_uploaded, shlex.join(["dsv4convert", *map(without_folders, sys.argv[1:])]))


def without_folders(argument: str) -> str:
    """Return an argument as a card may show it: of a path on this machine the last name alone."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    folder, slash, _ = value.rstrip("/").rpartition("/")
    if slash and "://" not in value and os.path.isdir(folder or "/"):
        value = os.path.basename(value.rstrip("/"))
    return f"{option}{equals}{value}"


def run_conversion(
    convert: Callable[..., SummaryT],
    run: RunOptions,
    source: Path,
    out: Path | None,
    *,
    writes_folder: bool = True,
    **options: Any,
) -> SummaryT:
    """Call a conversion of the API with progress, and print its summary, or what a dry run found.

    ``options`` are a command's own: they have the names of the API's keywords. ``writes_folder``: ``out`` is a folder
    that appears whole, and OUT-draft another; a page may lie in neither.
    """
    if run.report is not None and run.dry_run:
        raise UsageError("--report and --dry-run exclude each other", hint="a page is about a run; --json has the plan")
    inputs = [source, *(value for value in options.values() if isinstance(value, Path))]
    inputs += [Path(options[name]) for name in ("recipe", "input_scale") if options.get(name) is not None]
    outputs = [out, out.with_name(f"{out.name}-draft")] if writes_folder and out is not None and out.name else []
    replaced = check_page(run.report, overwrite=run.overwrite, inputs=inputs, outputs=outputs)
    timeline = None if run.report is None else Timeline()
    is_quiet = run.quiet or run.as_json or run.dry_run
    with progress_display(is_quiet, form=TEXT if run.dry_run else run.progress, timeline=timeline) as progress:
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
    document = summary.as_json()
    if timeline is not None:
        from .conversion_page import more_for_a_page

        document |= more_for_a_page(summary, source, timeline)
    try:
        if not run.quiet or run.as_json or summary.dry_run is not None:
            with report_of_done_work():
                if run.as_json:
                    print_json(document)
                elif summary.dry_run is not None:
                    print_blocks(describe_plan(summary.dry_run))
                else:
                    print_summary(summary)
    finally:
        write_page(run.report, CONVERSION, shown(source), document, replaced)
    return summary
