"""The maxtext command: an Orbax checkpoint for MaxText."""

from __future__ import annotations

from typing import Any

import click

from .. import api
from .options import exact_option, index_option, out_folder_argument, run_conversion, run_options, source_argument
from .parsing import CONTENT, CONVERT, RUN, TYPES, command, option


@command("maxtext", panel=CONVERT, example="dsv4convert maxtext DeepSeek-V4-Flash DeepSeek-V4-Flash-MaxText --scan")
@source_argument
@out_folder_argument
@option(
    "--dtype",
    type=click.Choice(["bf16", "f32"]),
    default="bf16",
    panel=TYPES,
    help="Type of all weights but those that are published in F32, which stay F32.",
)
@exact_option("a value is rounded")
@option(
    "--scan",
    is_flag=True,
    panel=CONTENT,
    help="Stack the layers for scan_layers=true, MaxText's default; without it, for scan_layers=false.",
)
@index_option
@option(
    "--check",
    is_flag=True,
    panel=RUN,
    help="Read the finished checkpoint back with Orbax and compare every leaf with its file.",
)
@run_options
def maxtext(**options: Any) -> None:
    """Write an Orbax checkpoint for MaxText, without scales, with its parameters file."""
    run_conversion(api.convert_maxtext, **options)
