"""The command that reads the whole of a checkpoint and says whether it can be sound: check."""

from __future__ import annotations

from pathlib import Path

import typer

from .. import api
from ..errors import counted, escape_control
from ..html_report.figures import human_bytes, human_seconds
from .options import index_option, json_option, progress_option, quiet_option, strict_option, threads_option
from .parsing import CHECK, FOLDER, argument, command
from .saying import print_json


@command("check", panel=CHECK, example="dsv4convert check DeepSeek-V4-Flash")
@argument("model", type=FOLDER, description="Checkpoint folder with config.json and safetensors files, or its address.")
@index_option
@strict_option
@threads_option
@progress_option
@quiet_option
@json_option
def check(
    model: Path, index: str, strict: bool, threads: int | None, progress: str, quiet: bool, as_json: bool
) -> None:
    """Read a whole checkpoint once and report what cannot be right: tables, NaN, tensors and experts of zeros."""
    from .report import progress_display

    with progress_display(quiet or as_json, "checking", form=progress) as display:
        report = api.check(model, index=index, strict=strict, threads=threads, progress=display)
    if as_json:
        print_json(report.as_json())
        return
    if quiet:
        return
    typer.echo(f"{counted(report.files, 'file')}, {counted(report.tensors)}, {human_bytes(report.bytes_read)} read")
    for note in report.notes:
        typer.echo(escape_control(f"note: {note}"))
    for finding in report.findings:
        typer.echo(escape_control(f"suspicious: {finding}"))
    rate = report.bytes_read / report.seconds if report.seconds else 0.0
    typer.echo(f"{human_seconds(report.seconds)}, {human_bytes(rate)}/s")
    typer.echo("nothing suspicious" if report.ok else counted(len(report.findings), "finding"))
