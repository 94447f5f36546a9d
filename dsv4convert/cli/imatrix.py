"""The command that collects activation statistics for low-bit types: imatrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import typer

from .. import api
from ..api import DEFAULT_CONTEXT_SIZE
from ..errors import counted, escape_control
from ..html_report.figures import human_bytes, human_seconds
from .options import (
    LAYERS_METAVAR,
    cache_option,
    json_option,
    overwrite_option,
    progress_option,
    quiet_option,
    tokenizer_option,
)
from .parsing import CONTENT, PATH, PROMPT, RUN, RUN_MODEL, argument, command, option
from .saying import print_json, report_of_done_work

if TYPE_CHECKING:
    from ..reference.importance import ImatrixSummary


@command(
    "imatrix",
    panel=RUN_MODEL,
    example="dsv4convert imatrix DeepSeek-V4-Flash --text calibration.txt -o imatrix.gguf",
)
@argument("model", type=PATH, description="Checkpoint folder, .gguf file or folder of shards.")
@option("--text", type=PATH, metavar="FILE", required=True, panel=PROMPT, help="Text file to run the model on, UTF-8.")
@option(
    "--out", "-o", type=PATH, metavar="FILE", required=True, panel=CONTENT, help="Importance matrix to write, GGUF."
)
@option(
    "--context-size",
    type=click.IntRange(1),
    metavar="N",
    default=DEFAULT_CONTEXT_SIZE,
    panel=PROMPT,
    help="Number of tokens in a chunk of the text.",
)
@option(
    "--chunks",
    type=click.IntRange(1),
    metavar="N",
    panel=PROMPT,
    help="Maximum number of chunks; by default all whole chunks of the text.",
)
@tokenizer_option
@option(
    "--process-output",
    is_flag=True,
    panel=CONTENT,
    help="Collect statistics for output.weight as well.",
)
@option(
    "--layers",
    metavar=LAYERS_METAVAR,
    panel=CONTENT,
    help="Range of layers to collect statistics for, from layer 0, e.g. 0-3; by default all.",
)
@option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    panel=RUN,
    help="Where to multiply matrices: numpy on the CPU, or torch on a GPU; auto takes a GPU where torch finds one.",
)
@cache_option
@overwrite_option
@progress_option
@quiet_option
@json_option
def imatrix(quiet: bool, as_json: bool, progress: str, **options: Any) -> None:
    """Collect activation statistics on a text: an importance matrix for low-bit types."""
    from .report import progress_display

    with progress_display(quiet or as_json, "collecting", form=progress) as display:
        summary = api.imatrix(progress=display, **options)
    if quiet and not as_json:
        return
    with report_of_done_work():
        if as_json:
            print_json(summary.as_json())
        else:
            _print_summary(summary)


def _print_summary(summary: ImatrixSummary) -> None:
    typer.echo(f"wrote {escape_control(summary.path)}  {human_bytes(summary.bytes)}")
    typer.echo(
        f"{counted(summary.entries, 'entry', 'entries')}: {counted(summary.layers, 'layer')} on "
        f"{counted(summary.chunks, 'chunk')} of {counted(summary.context_size, 'token')}; "
        f"{counted(summary.left_over_tokens, 'token')} left over"
    )
    if summary.experts_without_tokens:
        count = sum(len(experts) for _, experts in summary.experts_without_tokens)
        met = f"{counted(count, 'expert')} in {counted(len(summary.experts_without_tokens), 'layer')} met no token"
        typer.echo(f"note: {met} (see --json); a longer text may reach them")
    typer.echo(
        f"{human_seconds(summary.seconds)} on {summary.device}, peak memory {human_bytes(summary.peak_memory_bytes)}"
    )
