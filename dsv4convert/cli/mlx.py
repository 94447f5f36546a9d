"""The mlx command: a checkpoint folder for MLX."""

from __future__ import annotations

from typing import Any

import click

from .. import api
from .options import (
    index_option,
    max_tensor_file_size_option,
    out_folder_argument,
    run_conversion,
    run_options,
    source_argument,
    strict_option,
)
from .parsing import CONVERT, TYPES, command, option


@command("mlx", panel=CONVERT, example="dsv4convert mlx DeepSeek-V4-Flash DeepSeek-V4-Flash-MLX")
@source_argument
@out_folder_argument
@option(
    "--dense",
    type=click.Choice(["mxfp8", "affine8", "bf16"]),
    default="mxfp8",
    panel=TYPES,
    help="Form of FP8 weights: mxfp8, which holds the same codes; affine8, rounded as MLX's own quantiser does; or "
    "bf16. FP4 weights become mxfp4.",
)
@max_tensor_file_size_option
@index_option
@strict_option
@run_options
def mlx(**options: Any) -> None:
    """Write a checkpoint folder for MLX on Apple computers, as mlx-vlm loads it."""
    run_conversion(api.convert_mlx, **options)
