"""Commands that write checkpoint folders: dequantize, repack and requantize."""

from __future__ import annotations

from typing import Any

import click

from .. import api
from .options import (
    exact_option,
    folder_draft_option,
    index_option,
    max_tensor_file_size_option,
    out_folder_argument,
    run_conversion,
    run_options,
    source_argument,
)
from .parsing import CONTENT, CONVERT, TYPES, command, option


@command("dequantize", panel=CONVERT, example="dsv4convert dequantize DeepSeek-V4-Flash DeepSeek-V4-Flash-BF16")
@source_argument
@out_folder_argument
@option(
    "--dtype",
    type=click.Choice(["bf16", "f16", "f32"]),
    default="bf16",
    panel=TYPES,
    help="Type of all weights; F32 and integer tensors stay as they are.",
)
@exact_option("a value leaves the range of the type or is rounded")
@option(
    "--names",
    type=click.Choice(["official", "transformers"]),
    default="official",
    panel=CONTENT,
    help="Naming scheme of the tensors: the published names, or those of transformers with stacked experts.",
)
@folder_draft_option
@max_tensor_file_size_option
@index_option
@run_options
def dequantize(**options: Any) -> None:
    """Write a checkpoint folder without scales, in BF16, F16 or F32."""
    run_conversion(api.dequantize, **options)


@command("repack", panel=CONVERT, example="dsv4convert repack DeepSeek-V4-Flash DeepSeek-V4-Flash-FP8 --experts fp8")
@source_argument
@out_folder_argument
@option(
    "--experts", type=click.Choice(["fp8", "nvfp4"]), required=True, panel=TYPES, help="Type of the routed experts."
)
@option(
    "--draft-experts",
    is_flag=True,
    panel=TYPES,
    help="With --experts nvfp4: the draft's experts too, which stay FP4 otherwise.",
)
@option(
    "--input-scale",
    metavar="NUMBER|FILE|FOLDER",
    panel=TYPES,
    help="With --experts nvfp4: scale of the experts' activations, as a number, as two (of w1 and w3, of w2, e.g. "
    "8.4375,150.0), as a JSON file, or from an NVFP4 folder. Default: 1.0.",
)
@exact_option("the conversion changes an element", aliases=["--require-lossless"])
@folder_draft_option
@max_tensor_file_size_option
@index_option
@run_options
def repack(**options: Any) -> None:
    """Write a checkpoint folder with FP8 experts, for processors without FP4, or with NVFP4 experts."""
    run_conversion(api.repack, **options)


@command("requantize", panel=CONVERT, example="dsv4convert requantize my-fine-tune-BF16 my-fine-tune")
@source_argument
@out_folder_argument
@exact_option("a value is rounded")
@folder_draft_option
@max_tensor_file_size_option
@index_option
@run_options
def requantize(**options: Any) -> None:
    """Write a BF16, F16 or F32 folder in the official layout, with FP8 weights and FP4 experts."""
    run_conversion(api.requantize, **options)
