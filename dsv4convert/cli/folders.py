"""Commands that write checkpoint folders: dequantize and repack."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from .options import MaxFileSize, OutFolder, RunOptions, Source, with_run_options


class DtypeName(str, Enum):
    bf16 = "bf16"
    f16 = "f16"
    f32 = "f32"


class NameStyle(str, Enum):
    official = "official"
    transformers = "transformers"


class RepackedExperts(str, Enum):
    fp8 = "fp8"


@with_run_options
def dequantize(
    source: Source,
    out: OutFolder,
    dtype: Annotated[
        DtypeName, typer.Option(help="Type of the weights; F32 and integer tensors stay as they are.")
    ] = DtypeName.bf16,
    names: Annotated[
        NameStyle, typer.Option(help="The published names, or transformers' with the experts stacked.")
    ] = NameStyle.official,
    max_file_size: MaxFileSize = "5GB",
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail where a value leaves the type's range or is rounded.")
    ] = False,
    *,
    run: RunOptions,
) -> None:
    """Write a checkpoint folder without scales, in BF16, F16 or F32."""
    from ..api import dequantize as dequantize_folder
    from .report import run_conversion

    run_conversion(
        dequantize_folder,
        run,
        source,
        out,
        dtype=dtype.value,
        names=names.value,
        max_file_size=max_file_size,
        strict=strict,
    )


@with_run_options
def repack(
    source: Source,
    out: OutFolder,
    experts: Annotated[RepackedExperts, typer.Option(help="What becomes of the FP4 experts.", show_default=False)],
    max_file_size: MaxFileSize = "5GB",
    require_lossless: Annotated[
        bool, typer.Option("--require-lossless", help="Fail where any element changes.")
    ] = False,
    *,
    run: RunOptions,
) -> None:
    """Write a checkpoint folder with FP8 experts, for processors without FP4."""
    from ..api import repack as repack_folder
    from .report import run_conversion

    run_conversion(
        repack_folder,
        run,
        source,
        out,
        experts=experts.value,
        max_file_size=max_file_size,
        strict=require_lossless,
    )


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("dequantize")(dequantize)
    app.command("repack")(repack)
