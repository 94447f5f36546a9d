"""The command that describes a checkpoint, a GGUF or a folder of shards: inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Target = Annotated[
    Path,
    typer.Argument(
        help="A checkpoint folder, a .gguf (any file of a split one) or a folder of shards.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the description as JSON.")]


def inspect(path: Target, as_json: AsJson = False) -> None:
    """Describe a checkpoint, a GGUF or a folder of shards, from headers alone."""
    from ..api import inspect as inspect_path
    from .report import print_json

    description = inspect_path(path)
    if as_json:
        print_json(description.as_json())
    else:
        for line in description.lines():
            typer.echo(line)


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("inspect")(inspect)
