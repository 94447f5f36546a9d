"""The command that describes a checkpoint, a GGUF or a folder of shards: inspect."""

from __future__ import annotations

from pathlib import Path

import click

from .options import json_option
from .parsing import CHECK, PATH, argument, command


@command("inspect", panel=CHECK, example="dsv4convert inspect DeepSeek-V4-Flash.gguf")
@argument("path", type=PATH, description="Checkpoint folder, .gguf file (any file of a split one) or folder of shards.")
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Describe a checkpoint, a GGUF or a folder of shards from its headers alone."""
    from ..api import inspect as inspect_path
    from .report import print_json

    description = inspect_path(path)
    if as_json:
        print_json(description.as_json())
    else:
        for line in description.lines():
            click.echo(line)


COMMANDS = (inspect,)
