"""Options that several commands share, and the parsing of their values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..api import DEFAULT_MAX_FILE_SIZE, MAX_THREADS
from .pages import report_option
from .parsing import CONTENT, FOLDER, PATH, PROMPT, REPORT, RUN, TYPES, argument, option

if TYPE_CHECKING:
    from ..engine.conversion import Summary

SummaryT = TypeVar("SummaryT", bound="Summary")

SOURCE_HELP = "Checkpoint folder with config.json and safetensors files, or its address, such as OWNER/NAME on the hub."

source_argument = argument("source", type=FOLDER, description=SOURCE_HELP)
out_folder_argument = argument(
    "out", type=FOLDER, description="Folder to write; it appears under its name once it is complete."
)


def draft_option(*modes: str, default: str | None = None, help: str) -> Callable[..., Any]:
    """Return the option that says what becomes of the draft, of the modes keep, drop, only and split those given."""
    return option(
        "--draft",
        aliases=["--mtp"],
        type=click.Choice(modes),
        default=default,
        panel=CONTENT,
        help=help,
    )


folder_draft_option = draft_option(
    "keep",
    "drop",
    "only",
    "split",
    default="keep",
    help="MTP layers or DSpark stages: keep them, drop them, write only them, or split them off into a folder of their "
    "own, OUT-draft.",
)


def max_file_size_option(default: str | None, help: str) -> Callable[..., Any]:
    """Return the option that limits the size of output files."""
    return option(
        "--max-file-size",
        aliases=["--split-max-size"],
        metavar="SIZE",
        default=default,
        panel=CONTENT,
        help=help,
    )


max_tensor_file_size_option = max_file_size_option(
    DEFAULT_MAX_FILE_SIZE, "Maximum file size, e.g. 5GB; a larger tensor is written to a file of its own."
)
threads_option = option(
    "--threads",
    type=click.IntRange(1, MAX_THREADS),
    metavar="N",
    panel=RUN,
    help="Number of worker threads; by default as many as help, at most one per processor.",
)
overwrite_option = option("--overwrite", is_flag=True, panel=RUN, help="Replace an existing output.")


def ggml_lib_option(panel: str) -> Callable[..., Any]:
    """Return the option that names ggml's library, in a panel of the help."""
    return option(
        "--ggml-lib",
        type=PATH,
        panel=panel,
        help="Library of ggml, for low-bit types; by default that of an installed llama-cpp-python.",
    )


index_option = option(
    "--index",
    type=click.Choice(["file", "headers"]),
    default="file",
    panel=CONTENT,
    help="How to find tensors: by the index file, or by the headers of all safetensors files, whatever the index says.",
)
strict_option = option(
    "--strict",
    is_flag=True,
    panel=RUN,
    help="Fail if the source has NaN or infinite values, or tensors or files that are all zero, instead of noting it.",
)


def exact_option(change: str, aliases: Sequence[str] = ()) -> Callable[..., Any]:
    """Return the ``--strict`` of conversions that can be exact, which fails on a ``change`` too."""
    return option(
        "--strict",
        aliases=aliases,
        is_flag=True,
        panel=TYPES,
        help=f"Fail if {change}, or the source has values that are not finite, or tensors that are all zero.",
    )


quiet_option = option("--quiet", "-q", is_flag=True, panel=REPORT, help="Print errors only.")
tokenizer_option = option(
    "--tokenizer",
    type=FOLDER,
    metavar="FOLDER",
    panel=PROMPT,
    help="Folder with a tokenizer.json; by default the model's own tokenizer.",
)
cache_option = option(
    "--cache",
    is_flag=True,
    panel=RUN,
    help="Download a source on the hub into the hub's own cache first, and read it there.",
)
TEXT, JSON = "text", "json"
progress_option = option(
    "--progress",
    type=click.Choice([TEXT, JSON]),
    default=TEXT,
    panel=REPORT,
    help="Progress on stderr: text for people, or a line of JSON twice a second for a program.",
)
json_option = option("--json", "as_json", is_flag=True, panel=REPORT, help="Print the summary as JSON.")


@dataclass(frozen=True)
class RunOptions:
    """How to carry out a conversion: the values of the options that every converting command has."""

    threads: int | None
    overwrite: bool
    resume: bool
    fresh: bool
    dry_run: bool
    no_lock: bool
    cache: bool
    upload: str | None
    delete_uploaded: bool
    workers: str | None
    quiet: bool
    as_json: bool
    progress: str
    report: Path | None


RUN_OPTIONS = (
    threads_option,
    overwrite_option,
    option("--resume", is_flag=True, panel=RUN, help="Continue an interrupted run of the same conversion."),
    option("--fresh", is_flag=True, panel=RUN, help="Discard the work of an interrupted run and start over."),
    option("--dry-run", is_flag=True, panel=RUN, help="Print the plan with the disk and memory it needs, and stop."),
    option(
        "--no-lock",
        is_flag=True,
        panel=RUN,
        help="Take no locks, where the file system has none at all; make sure that no other run writes the output.",
    ),
    cache_option,
    option(
        "--upload",
        metavar="ADDRESS",
        panel=RUN,
        help="Send each finished file to a repository on the hub, OWNER/NAME, or to s3://BUCKET/PREFIX, gs:// or "
        "az://, with a model card; the hub shows all files at once, a store has the index last.",
    ),
    option(
        "--delete-uploaded",
        is_flag=True,
        panel=RUN,
        help="With --upload: remove the local output once all of it has arrived.",
    ),
    option(
        "--workers",
        metavar="ray|ray:N|ray:auto|ray://HOST:PORT",
        panel=RUN,
        help="Have a Ray cluster do the work: one started on this machine (with N workers), the one that this machine "
        "belongs to, or one elsewhere.",
    ),
    report_option,
    progress_option,
    quiet_option,
    json_option,
)


def run_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of ``RunOptions``; it gets their values as ``run``."""
    names = [field.name for field in fields(RunOptions)]

    @wraps(function)
    def wrapper(**values: Any) -> None:
        run = RunOptions(**{name: values.pop(name) for name in names})
        function(**values, run=run)

    decorated: Callable[..., None] = wrapper
    for decorate in reversed(RUN_OPTIONS):
        decorated = decorate(decorated)
    return decorated


def run_conversion(convert: Callable[..., SummaryT], run: RunOptions, **options: Any) -> SummaryT:
    """Call a conversion of the API and print its summary, by ``report.run_conversion``, which no help text needs."""
    from .report import run_conversion

    return run_conversion(convert, run, **options)


LAYERS_METAVAR = "FIRST-LAST"
