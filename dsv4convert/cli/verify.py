"""The command that proves a finished conversion: verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..errors import UsageError, VerifyError, escape_control
from .options import Quiet, Threads

MAX_LISTED = 20

Source = Annotated[
    Path,
    typer.Argument(help="The checkpoint folder that was converted; with --manifest, the output.", show_default=False),
]
Output = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Argument(help="What became of it: a .gguf, a folder of shards or a checkpoint folder.", show_default=False),
]


def verify(
    source: Source,
    out: Output = None,
    sample: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Look at a part only, such as 2%; every tensor is touched.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Which part --sample takes.")] = 0,
    foreign: Annotated[
        bool,
        typer.Option("--foreign", help="Another tool made it: any rounding within the format's half step will do."),
    ] = False,
    ignore_key: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="A key of the metadata not to compare; can be repeated.", show_default=False),
    ] = None,
    manifest: Annotated[
        bool, typer.Option("--manifest", help="Re-check the checksums of OUT.manifest.json alone; needs no source.")
    ] = False,
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compare a finished conversion with its source, element by element."""
    if manifest:
        if out is not None or sample is not None or foreign:
            raise UsageError("--manifest takes the output alone", hint="dsv4convert verify --manifest OUT")
        _verify_manifest(source, quiet, as_json)
        return
    if out is None:
        raise UsageError("no output to verify", hint="dsv4convert verify SRC OUT, or verify --manifest OUT")
    from ..api import verify as verify_output
    from .report import print_json, progress_display

    with progress_display(quiet or as_json, "verifying") as progress:
        report = verify_output(
            source,
            out,
            sample=sample,
            seed=seed,
            foreign=foreign,
            ignore_key=ignore_key or (),
            threads=threads,
            progress=progress,
        )
    if as_json:
        print_json(report.as_json())
    elif not quiet:
        for line in report.lines():
            typer.echo(line)
    if not report.ok:
        first = report.problems[0]
        more = f" (and {len(report.problems) - 1} more problems)" if report.problems[1:] else ""
        what = first.what if first.where == str(out) else str(first)
        raise VerifyError(f"the output is not what its source says: {what}{more}", where=out)
    if not as_json and not quiet:
        typer.echo("verified")


def _verify_manifest(output: Path, quiet: bool, as_json: bool) -> None:
    """Re-check the checksums of an output and print the outcome."""
    from ..api import verify_manifest
    from .report import human_bytes, print_json, progress_display

    with progress_display(quiet or as_json, "verifying") as progress:
        found = verify_manifest(output, progress=progress)
    if as_json:
        print_json(
            {
                "verdict": "ok" if found.ok else "differs",
                "output": str(output),
                "files": found.files,
                "tensors": found.tensors,
                "bytes": found.nbytes,
                "mismatches": [{"file": m.file, "tensor": m.tensor, "what": m.what} for m in found.mismatches],
            }
        )
    elif not quiet:
        typer.echo(f"{found.files} files, {found.tensors:,} tensors, {human_bytes(found.nbytes)} against the manifest")
        for mismatch in found.mismatches[:MAX_LISTED]:
            where = mismatch.file if mismatch.tensor is None else f"{mismatch.file}: tensor {mismatch.tensor}"
            typer.echo(escape_control(f"{where}: {mismatch.what}"))
    if not found.ok:
        first = found.mismatches[0]
        where = first.file if first.tensor is None else f"{first.file}: tensor {first.tensor}"
        raise VerifyError(f"not what its manifest says: {where}: {first.what}", where=output)
    if not as_json and not quiet:
        typer.echo("verified")


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("verify")(verify)
