"""Commands for model-parallel shards: shard and unshard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
import typer

from .. import api
from ..html_report.figures import human_bytes
from .options import (
    RunOptions,
    folder_draft_option,
    index_option,
    max_tensor_file_size_option,
    out_folder_argument,
    run_conversion,
    run_options,
    source_argument,
    strict_option,
)
from .parsing import CONTENT, CONVERT, FOLDER, TYPES, argument, command, option
from .tables import Block, Table, print_blocks

if TYPE_CHECKING:
    from ..targets.shard_tensors import ShardCosts

# Kinds of replicated tensors that the text lists by name; the rest is summed up.
LISTED_KINDS = 6


@command("shard", panel=CONVERT, example="dsv4convert shard DeepSeek-V4-Flash DeepSeek-V4-Flash-mp8 --mp 8")
@source_argument
@out_folder_argument
@option("--mp", type=int, metavar="N", required=True, panel=CONTENT, help="Number of ranks to divide among.")
@option(
    "--rank",
    type=int,
    metavar="N",
    multiple=True,
    panel=CONTENT,
    help="Rank to write, by default all; can be repeated.",
)
@folder_draft_option
@option(
    "--experts",
    aliases=["--expert-dtype"],
    type=click.Choice(["fp4", "fp8"]),
    panel=TYPES,
    help="Type of the routed experts, by default the source's; fp8 converts FP4 experts.",
)
@index_option
@strict_option
@run_options
def shard(rank: tuple[int, ...], *, run: RunOptions, **options: Any) -> None:
    """Divide a checkpoint among ranks, in the layout that the published inference code loads."""
    summary = run_conversion(api.shard, run, rank=rank or None, **options)
    if summary.dry_run is not None and not run.as_json:
        typer.echo()
        print_blocks(_describe(summary.costs))


@command("unshard", panel=CONVERT, example="dsv4convert unshard DeepSeek-V4-Flash-mp8 DeepSeek-V4-Flash")
@argument("source", type=FOLDER, description="Folder with config.json and the shards of all ranks.")
@out_folder_argument
@folder_draft_option
@max_tensor_file_size_option
@option(
    "--wo-a",
    type=click.Choice(["bf16", "fp8"]),
    default="bf16",
    panel=TYPES,
    help="Type of wo_a: bf16, as the shards hold it, or fp8 with scales, an error where that is inexact.",
)
@strict_option
@run_options
def unshard(**options: Any) -> None:
    """Join model-parallel shards into a checkpoint folder."""
    run_conversion(api.unshard, **options)


def _describe(costs: ShardCosts) -> Iterator[Block]:
    """Yield what each rank takes, what every rank holds whole, and what that costs."""
    yield Table(
        ("rank", "size", "bytes"),
        [(f"{rank} of {costs.mp}", human_bytes(size), f"{size:,}") for rank, size in costs.rank_bytes.items()],
        frozenset({1, 2}),
    )
    kinds = list(costs.replicated.items())
    rest = sum(size for _, size in kinds[LISTED_KINDS:])
    listed = kinds[:LISTED_KINDS] + ([("others", rest)] if rest else [])
    yield Table(
        ("whole on every rank", "size"),
        [*((kind, human_bytes(size)) for kind, size in listed), ("sum", human_bytes(costs.replicated_bytes))],
        frozenset({1}),
    )
    yield (
        f"Their copies on the other ranks cost {human_bytes(costs.extra_bytes)}, "
        f"{costs.extra_bytes / costs.source_bytes:.1%} of the checkpoint."
    )
