"""Commands that convert: hf-to-gguf."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from .options import RunOptions, Source, with_run_options


class DenseType(str, Enum):
    q8_0 = "q8_0"
    bf16 = "bf16"
    f16 = "f16"
    f32 = "f32"


class ExpertType(str, Enum):
    mxfp4 = "mxfp4"
    q8_0 = "q8_0"
    bf16 = "bf16"
    f16 = "f16"
    f32 = "f32"


class DraftMode(str, Enum):
    drop = "drop"
    only = "only"
    split_off = "split"
    keep = "keep"


class TowerMode(str, Enum):
    drop = "drop"
    only = "only"
    split_off = "split"


class DialectName(str, Enum):
    llama_cpp = "llama.cpp"
    deepseek_v4 = "deepseek-v4"


@with_run_options
def hf_to_gguf(
    source: Source,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(
            help="The .gguf to write, or a folder for it; named after the model when left out.",
            show_default=False,
        ),
    ] = None,
    dense: Annotated[
        Optional[DenseType],  # noqa: UP045
        typer.Option(help="Type of the dense linears; q8_0 for FP8 when left out.", show_default=False),
    ] = None,
    experts: Annotated[
        Optional[ExpertType],  # noqa: UP045
        typer.Option(help="Type of the routed experts; mxfp4 for FP4, q8_0 for FP8 when left out.", show_default=False),
    ] = None,
    draft: Annotated[
        Optional[DraftMode],  # noqa: UP045
        typer.Option(
            "--draft",
            "--mtp",
            help="The MTP layer or the DSpark stages: drop them (default), write only them, or split them off into "
            "their own file; keep is for --dialect deepseek-v4.",
            show_default=False,
        ),
    ] = None,
    mmproj: Annotated[
        Optional[TowerMode],  # noqa: UP045
        typer.Option(
            help="The vision tower: drop it (default), write only it, or split it off into its own file.",
            show_default=False,
        ),
    ] = None,
    split_max_size: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Largest file, such as 45G; more are split.", show_default=False),
    ] = None,
    layers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Only these layers, such as 0-3: a slice to try things on.", show_default=False),
    ] = None,
    dialect: Annotated[DialectName, typer.Option(help="Whose tensor and key names to write.")] = DialectName.llama_cpp,
    tokenizer_pre: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="tokenizer.ggml.pre, for a tokenizer that is not recognised.", show_default=False),
    ] = None,
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="general.name; from the model card or the folder when left out.", show_default=False),
    ] = None,
    *,
    run: RunOptions,
) -> None:
    """Convert a checkpoint folder to a GGUF for llama.cpp."""
    from ..api import convert_gguf
    from .report import run_conversion

    run_conversion(
        convert_gguf,
        run,
        source,
        out,
        dense=dense.value if dense else None,
        experts=experts.value if experts else None,
        draft=draft.value if draft else None,
        mmproj=mmproj.value if mmproj else None,
        max_file_size=split_max_size,
        layers=layers,
        dialect=dialect.value,
        tokenizer_pre=tokenizer_pre,
        name=name,
    )


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("hf-to-gguf")(hf_to_gguf)
