"""Commands for model-parallel shards: shard and unshard."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .options import MaxFileSize, OutFolder, RunOptions, Source, with_run_options

if TYPE_CHECKING:
    from ..targets.shard_tensors import ShardCosts

# Kinds of replicated tensors that the text lists by name; the rest is summed up.
LISTED_KINDS = 6


class ExpertDtype(str, Enum):
    fp4 = "fp4"
    fp8 = "fp8"


class MtpMode(str, Enum):
    keep = "keep"
    drop = "drop"


class WoADtype(str, Enum):
    bf16 = "bf16"
    fp8 = "fp8"


@with_run_options
def shard(
    source: Source,
    out: OutFolder,
    mp: Annotated[int, typer.Option("--mp", help="Number of ranks that share the model.", show_default=False)],
    rank: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(help="Write only this rank; may be given several times. All when left out.", show_default=False),
    ] = None,
    expert_dtype: Annotated[
        Optional[ExpertDtype],  # noqa: UP045
        typer.Option(help="fp8 makes e4m3 of FP4 experts; as they are when left out.", show_default=False),
    ] = None,
    mtp: Annotated[MtpMode, typer.Option(help="The draft layers.")] = MtpMode.keep,
    *,
    run: RunOptions,
) -> None:
    """Divide a checkpoint among ranks, as the published inference code loads it."""
    from ..api import shard as shard_folder
    from .report import run_conversion

    summary = run_conversion(
        shard_folder,
        run,
        source,
        out,
        mp=mp,
        rank=rank,
        experts=expert_dtype.value if expert_dtype else None,
        draft=mtp.value,
    )
    if summary.dry_run is not None and not run.as_json:
        _print_costs(summary.costs)


@with_run_options
def unshard(
    source: Annotated[
        Path, typer.Argument(help="Folder with the shards of all ranks and config.json.", show_default=False)
    ],
    out: OutFolder,
    wo_a: Annotated[
        WoADtype, typer.Option(help="wo_a as the shards hold it, or FP8 with scales, an error where that is inexact.")
    ] = WoADtype.bf16,
    max_file_size: MaxFileSize = "5GB",
    *,
    run: RunOptions,
) -> None:
    """Put model-parallel shards together again: a checkpoint folder."""
    from ..api import unshard as unshard_folder
    from .report import run_conversion

    run_conversion(unshard_folder, run, source, out, wo_a=wo_a.value, max_file_size=max_file_size)


def _print_costs(costs: ShardCosts) -> None:
    """Print what each rank takes, what every rank holds whole, and what that costs."""
    from .report import human_bytes

    for rank, size in costs.rank_bytes.items():
        typer.echo(f"rank {rank} of {costs.mp}: {human_bytes(size)} ({size} bytes)")
    kinds = list(costs.replicated.items())
    rest = sum(size for _, size in kinds[LISTED_KINDS:])
    listed = kinds[:LISTED_KINDS] + ([("others", rest)] if rest else [])
    typer.echo(
        f"on every rank whole: {human_bytes(costs.replicated_bytes)} "
        f"({', '.join(f'{kind} {human_bytes(size)}' for kind, size in listed)})"
    )
    typer.echo(
        f"which costs {human_bytes(costs.extra_bytes)} beside the first copy, "
        f"{costs.extra_bytes / costs.source_bytes:.1%} of the checkpoint"
    )


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("shard")(shard)
    app.command("unshard")(unshard)
