"""Options that several commands share, and the parsing of their values."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..errors import UsageError

Source = Annotated[
    Path, typer.Argument(help="Checkpoint folder: config.json and safetensors.", show_default=False)
]
Threads = Annotated[
    Optional[int],  # noqa: UP045 - typer evaluates it on Python 3.10
    typer.Option(
        "--threads", min=1, max=256, help="Worker threads; all processors, at most 16, when left out."
    ),
]


class DeviceName(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


Device = Annotated[DeviceName, typer.Option("--device", help="Where values are converted: cuda needs an NVIDIA GPU.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run of the same conversion.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Discard the work of an interrupted run and start over.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan, with the disk and memory it needs, and stop.")
]

# Decimal units, as llama.cpp's converter and file managers count.
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str, option: str) -> int:
    """Return the bytes that a size such as ``45G`` means.

    >>> parse_size("45G", "--split-max-size")
    45000000000

    Raises:
        UsageError: not a positive number with an optional unit.
    """
    found = re.fullmatch(r"([0-9]{1,15})([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if found is None or int(found[1]) == 0:
        raise UsageError(
            f"{option}: not a size", expected="a number with K, M, G or T, such as 45G", got=repr(text)
        )
    return int(found[1]) * UNITS[found[2].upper()]


def parse_layers(text: str) -> tuple[int, int]:
    """Return the first and the last layer of a range such as ``0-3`` or ``5``.

    >>> parse_layers("0-3")
    (0, 3)

    Raises:
        UsageError: not a range.
    """
    found = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", text.strip())
    if found is None:
        raise UsageError("--layers: not a range", expected="such as 0-3", got=repr(text))
    first = int(found[1])
    return first, int(found[2]) if found[2] is not None else first
