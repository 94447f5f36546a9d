"""The command that writes synthetic checkpoints: synth."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..errors import UsageError, escape_control
from .options import Json, Overwrite, Quiet


class Preset(str, Enum):
    tiny = "tiny"
    nano = "nano"
    flash = "flash"
    pro = "pro"
    v41_tiny = "v41-tiny"
    v41_flash = "v41-flash"


class Variant(str, Enum):
    base = "base"
    dspark = "dspark"
    vision = "vision"


def synth(
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    preset: Annotated[
        Preset,
        typer.Option(
            help="tiny, v41-tiny: every kind of tensor in 5 to 8 MB; nano: 0.5 billion parameters; others: published."
        ),
    ] = Preset.tiny,
    variant: Annotated[
        Optional[Variant],  # noqa: UP045
        typer.Option(help="FP8 experts with F32 scales, DSpark drafts, or drafts and a vision tower."),
    ] = None,
    layers: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Keep this many leading layers.", show_default=False),
    ] = None,
    ratios: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Layers of these compress ratios instead, such as 0,4,128,4.", show_default=False),
    ] = None,
    experts: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Routed experts per layer.", show_default=False),
    ] = None,
    vocab: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Vocabulary size.", show_default=False),
    ] = None,
    engram_rows: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Rows of each n-gram table of V4.1, at least.", show_default=False),
    ] = None,
    files: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="How many safetensors files; 1 has no index.", show_default=False),
    ] = None,
    mtp: Annotated[bool, typer.Option(help="With or without the draft layers.")] = True,
    set_: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a key of config.json.", show_default=False),
    ] = None,
    power_of_two_scales: Annotated[
        bool,
        typer.Option("--power-of-two-scales/--any-scales", help="Values of F32 scales (only --variant base has them)."),
    ] = True,
    seed: Annotated[int, typer.Option(help="Other bytes of the same kind.")] = 0,
    headers_only: Annotated[
        bool, typer.Option("--headers-only", help="Sparse files: true headers and sizes, no payload.")
    ] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a seeded synthetic checkpoint in the published on-disk layout."""
    from ..synth.write import plan_synth, write_plan
    from .report import human_bytes, print_json, progress_display

    plan = plan_synth(
        preset.value,
        variant=None if variant is None else variant.value,
        layers=layers,
        ratios=None if ratios is None else parse_ratios(ratios),
        experts=experts,
        vocab=vocab,
        files=files,
        mtp=mtp,
        engram_rows=engram_rows,
        overrides=parse_settings(set_ or []),
        power_of_two_scales=power_of_two_scales,
    )
    with progress_display(quiet or as_json or headers_only) as display:
        progress = None if display is None else lambda done: display(done, plan.payload_bytes)
        summary = write_plan(plan, out, seed=seed, headers_only=headers_only, overwrite=overwrite, progress=progress)
    if as_json:
        print_json(
            {
                "folder": str(summary.folder),
                "files": summary.files,
                "tensors": summary.tensors,
                "payload_bytes": summary.payload_bytes,
                "tensors_by_dtype": dict(summary.tensors_by_dtype),
                "headers_only": summary.headers_only,
            }
        )
    elif not quiet:
        kind = ", headers only" if summary.headers_only else ""
        typer.echo(
            f"wrote {escape_control(str(summary.folder))}: {summary.tensors} tensors in {summary.files} file"
            f"{'s' if summary.files > 1 else ''}, {human_bytes(summary.payload_bytes)}{kind}"
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


def parse_settings(settings: list[str]) -> dict[str, Any]:
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


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("synth")(synth)
