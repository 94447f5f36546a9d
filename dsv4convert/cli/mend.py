"""The command that puts a checkpoint folder right: mend."""

from __future__ import annotations

from typing import Any

import click

from .. import api
from .options import out_folder_argument, run_conversion, run_options, source_argument, strict_option
from .parsing import CONTENT, CONVERT, FOLDER, command, option


@command("mend", panel=CONVERT, example="dsv4convert mend DeepSeek-V4-Flash DeepSeek-V4-Flash-mended --reindex")
@source_argument
@out_folder_argument
@option(
    "--reindex",
    is_flag=True,
    panel=CONTENT,
    help="Take all safetensors files by their headers, whatever the index says, and write the index anew.",
)
@option("--drop-draft", is_flag=True, panel=CONTENT, help="Leave out MTP layers or DSpark stages, in config.json too.")
@option(
    "--graft-draft",
    type=FOLDER,
    metavar="FROM",
    panel=CONTENT,
    help="Take the draft from another folder, a whole model or a draft alone; with --drop-draft in place of SOURCE's.",
)
@option(
    "--prune-config",
    is_flag=True,
    panel=CONTENT,
    help="Leave out keys of config.json about a vision tower or quantised weights that are not there.",
)
@option(
    "--rename",
    type=click.Choice(["official", "transformers"]),
    panel=CONTENT,
    help="Naming scheme to give the tensors: the published names, or those of transformers with stacked experts.",
)
@strict_option
@run_options
def mend(**options: Any) -> None:
    """Write a checkpoint folder with its index, draft, config or names put right, sharing the files that stay."""
    run_conversion(api.mend, **options)
