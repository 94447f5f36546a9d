"""Options that several commands share, and the parsing of their values."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Optional, get_type_hints

import typer

Source = Annotated[Path, typer.Argument(help="Checkpoint folder: config.json and safetensors.", show_default=False)]
OutFolder = Annotated[Path, typer.Argument(help="Folder to write; it appears whole.", show_default=False)]
MaxFileSize = Annotated[str, typer.Option("--max-file-size", help="Largest file; a larger tensor gets its own.")]
Threads = Annotated[
    Optional[int],  # noqa: UP045 - typer evaluates it on Python 3.10
    typer.Option("--threads", min=1, max=256, help="Worker threads; all processors, at most 16, when left out."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]


class DeviceName(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


@dataclass(frozen=True)
class RunOptions:
    """How to carry out a plan: the options that every converting command has."""

    threads: Threads = None
    overwrite: Overwrite = False
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run of the same conversion.")] = (
        False
    )
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard the work of an interrupted run and start over.")] = (
        False
    )
    device: Annotated[
        DeviceName, typer.Option("--device", help="Where values are converted: cuda needs an NVIDIA GPU.")
    ] = DeviceName.cpu
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, with the disk and memory it needs, and stop.")
    ] = False
    quiet: Quiet = False
    as_json: Json = False


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, whose last parameter is ``run: RunOptions``, the options of RunOptions as its own.

    Typer knows no groups of options: it reads a signature. So the wrapper has one in which the fields
    of RunOptions stand in the place of ``run``.
    """
    hints = get_type_hints(RunOptions, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter(field.name, keyword, default=field.default, annotation=hints[field.name])
        for field in fields(RunOptions)
    ]
    own_hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=own_hints[name])
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "run"
    ]

    def wrapper(*args: Any, **values: Any) -> None:
        run = RunOptions(**{parameter.name: values.pop(parameter.name) for parameter in added})
        command(*args, **values, run=run)

    signature = inspect.Signature([*own, *added])
    wrapper.__name__ = command.__name__
    wrapper.__doc__ = command.__doc__
    wrapper.__signature__ = signature  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in signature.parameters.values()}
    return wrapper
