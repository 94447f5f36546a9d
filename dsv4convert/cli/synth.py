"""The command that writes synthetic checkpoints: synth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import typer

from .. import api
from ..errors import UsageError, counted, escape_control
from ..html_report.figures import human_bytes
from .options import LAYERS_METAVAR, json_option, overwrite_option, quiet_option
from .parsing import CONTENT, FOLDER, SIZE, TRY, argument, command, option
from .saying import print_json


@command("synth", panel=TRY, example="dsv4convert synth tiny --variant dspark --seed 7")
@argument("out", type=FOLDER, description="Folder to write.")
@option(
    "--preset",
    type=click.Choice(["tiny", "nano", "flash", "pro", "v41-tiny", "v41-flash"]),
    default="tiny",
    panel=SIZE,
    help="Model and sizes: tiny and v41-tiny have every kind of tensor in 5 to 8 MB, nano has half a billion "
    "parameters, flash, pro and v41-flash have the published sizes.",
)
@option("--layers", metavar=LAYERS_METAVAR, panel=SIZE, help="Range of layers to keep, from layer 0, e.g. 0-3.")
@option(
    "--ratios",
    metavar="LIST",
    panel=SIZE,
    help="Compress ratios of the layers, e.g. 0,4,128,4, in place of those of the preset.",
)
@option(
    "--routed-experts",
    "experts",
    aliases=["--experts"],
    type=click.IntRange(1),
    metavar="N",
    panel=SIZE,
    help="Number of routed experts per layer.",
)
@option("--vocab", type=click.IntRange(1), metavar="N", panel=SIZE, help="Vocabulary size.")
@option(
    "--engram-rows",
    type=click.IntRange(1),
    metavar="N",
    panel=SIZE,
    help="Minimum number of rows of each n-gram table of V4.1.",
)
@option(
    "--variant",
    type=click.Choice(["base", "dspark", "vision"]),
    panel=CONTENT,
    help="base: FP8 experts with F32 scales; dspark: DSpark drafts; vision: DSpark drafts and a vision tower.",
)
@option(
    "--draft",
    type=click.Choice(["keep", "drop"]),
    default="keep",
    panel=CONTENT,
    help="MTP layers or DSpark stages: write them or leave them out.",
)
@option("--mtp/--no-mtp", "with_draft", default=None, hidden=True, help="Old name of --draft.")
@option("--files", type=int, metavar="N", panel=CONTENT, help="Number of safetensors files; a single one has no index.")
@option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    panel=CONTENT,
    help="Key of config.json to replace; can be repeated.",
)
@option(
    "--power-of-two-scales/--any-scales",
    default=True,
    panel=CONTENT,
    help="Values of the F32 scales of --variant base: powers of two (default) or any.",
)
@option("--seed", type=int, metavar="N", default=0, panel=CONTENT, help="Random seed.")
@option(
    "--headers-only",
    is_flag=True,
    panel=CONTENT,
    help="Write sparse files: true headers, sizes and routing tables, no other payload.",
)
@overwrite_option
@quiet_option
@json_option
def synth(
    out: Path,
    layers: str | None,
    ratios: str | None,
    draft: str,
    with_draft: bool | None,
    settings: tuple[str, ...],
    seed: int,
    headers_only: bool,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    **cuts: Any,
) -> None:
    """Write a seeded synthetic checkpoint in the published on-disk layout."""
    from ..synth.write import plan_synth, write_plan
    from .report import progress_display

    if with_draft is not None:
        draft = "keep" if with_draft else "drop"
    plan = plan_synth(
        layers=api.leading_layers(layers),
        ratios=None if ratios is None else parse_ratios(ratios),
        mtp=draft == "keep",
        overrides=parse_settings(settings),
        **cuts,
    )
    with progress_display(quiet or as_json or headers_only) as display:
        progress = None if display is None else lambda done: display(done, plan.payload_bytes)
        summary = write_plan(plan, out, seed=seed, headers_only=headers_only, overwrite=overwrite, progress=progress)
    if as_json:
        print_json({**asdict(summary), "folder": str(summary.folder)})
    elif not quiet:
        kind = ", headers only" if summary.headers_only else ""
        typer.echo(
            f"wrote {escape_control(str(summary.folder))}: {counted(summary.tensors)} in "
            f"{counted(summary.files, 'file')}, {human_bytes(summary.payload_bytes)}{kind}"
        )


def parse_ratios(text: str) -> list[int]:
    """Return the numbers of a list such as ``0,4,128,4``.

    >>> parse_ratios("0,4,128,4")
    [0, 4, 128, 4]

    Raises:
        UsageError: something else than numbers and commas.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) <= 3 for part in parts):
        raise UsageError("--ratios: not a list", expected="0, 4 or 128 per layer, such as 0,4,128,4", got=repr(text))
    return [int(part) for part in parts]


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Return the config keys that KEY=VALUE settings give; a value is JSON, or else a string.

    >>> parse_settings(["hidden_size=192", "expert_dtype=fp8"])
    {'hidden_size': 192, 'expert_dtype': 'fp8'}

    Raises:
        UsageError: a setting without ``=``.
    """
    result: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not key or not equals:
            raise UsageError("--set: not a setting", expected="KEY=VALUE", got=repr(setting))
        try:
            result[key] = json.loads(value)
        except (ValueError, RecursionError):
            result[key] = value
    return result
