"""The command that checks a finished conversion: verify."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import typer
from click.core import ParameterSource

from .. import api
from ..errors import UsageError, VerifyError, counted
from ..html_report.figures import human_bytes
from .options import (
    ggml_lib_option,
    index_option,
    json_option,
    progress_option,
    quiet_option,
    strict_option,
    threads_option,
)
from .pages import check_page, overwrite_page_option, report_option, write_page
from .parsing import CHECK, COMPARISON, FOLDER, PATH, argument, command, option
from .saying import report_before_verdict
from .tables import Block, Table, print_result

if TYPE_CHECKING:
    from ..engine.manifest import ManifestReport
    from ..verification import Report
    from ..verification.report import TensorResult

MAX_LISTED = 20


@command("verify", panel=CHECK, example="dsv4convert verify DeepSeek-V4-Flash DeepSeek-V4-Flash.gguf")
@argument(
    "source",
    type=PATH,
    description="Checkpoint folder that was converted, or its address; with --manifest, the output.",
)
@argument(
    "out",
    type=PATH,
    required=False,
    description="Output of the conversion: a .gguf file, a folder of shards or a checkpoint folder.",
)
@option(
    "--sample",
    metavar="PART",
    panel=COMPARISON,
    help="Part of every tensor to compare, e.g. 2%; by default all of it.",
)
@option("--seed", type=int, metavar="N", default=0, panel=COMPARISON, help="Random seed of --sample.")
@option(
    "--foreign",
    is_flag=True,
    panel=COMPARISON,
    help="Accept the rounding of another program, within half a step of the number format.",
)
@option(
    "--ignore-key",
    metavar="KEY",
    multiple=True,
    panel=COMPARISON,
    help="Metadata key to leave out of the comparison; can be repeated.",
)
@option(
    "--imatrix",
    type=PATH,
    panel=COMPARISON,
    help="Importance matrix with which a low-bit GGUF was made; without it, only the error of its tensors is checked.",
)
@ggml_lib_option(COMPARISON)
@option(
    "--graft-draft",
    type=FOLDER,
    metavar="FROM",
    panel=COMPARISON,
    help="Folder whose draft the output holds instead of the source's, as mend --graft-draft FROM makes it.",
)
@option(
    "--manifest",
    is_flag=True,
    panel=COMPARISON,
    help="Check only the checksums in OUT.manifest.json; needs no source.",
)
@index_option
@strict_option
@threads_option
@report_option
@overwrite_page_option
@progress_option
@quiet_option
@json_option
def verify(
    source: Path,
    out: Path | None,
    manifest: bool,
    report: Path | None,
    overwrite_page: bool,
    progress: str,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare a finished conversion with its source, element by element."""
    if manifest:
        context = click.get_current_context()
        given = {name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
        if out is not None or given - {"threads"}:
            raise UsageError("--manifest takes only the output", hint="run dsv4convert verify --manifest OUT")
        out = source
    if out is None:
        raise UsageError(
            "output is missing", hint="run dsv4convert verify SOURCE OUT, or dsv4convert verify --manifest OUT"
        )
    from .report import progress_display

    inputs = [path for path in (source, out, *options.values()) if isinstance(path, Path)]
    replaced = check_page(report, overwrite=overwrite_page, inputs=inputs, outputs=[out])
    with progress_display(quiet or as_json, "verifying", form=progress) as display:
        if manifest:
            found = _found_by_manifest(api.verify_manifest(out, progress=display), out)
        else:
            found = _found_by_source(api.verify(source, out, progress=display, **options), out)
    with report_before_verdict(found.error is None):
        try:
            if as_json or not quiet:
                print_result(found.document, found.blocks, as_json=as_json)
        finally:
            write_page(report, "verify --manifest" if manifest else "verify", out, found.document, replaced)
    if found.error is not None:
        raise found.error
    if not as_json and not quiet:
        typer.echo("verified")


class _Found(NamedTuple):
    """What a verification found: its JSON, what to print instead, and the error to end with."""

    document: dict[str, Any]
    blocks: Iterable[Block]
    error: VerifyError | None


def _found_by_manifest(found: ManifestReport, out: Path) -> _Found:
    document = {
        "verdict": "ok" if found.ok else "differs",
        "output": str(out),
        "files": found.files,
        "tensors": found.tensors,
        "bytes": found.nbytes,
        "mismatches": list(map(asdict, found.mismatches)),
    }
    held = f"{counted(found.files, 'file')}, {counted(found.tensors)}, {human_bytes(found.nbytes)} against the manifest"
    error = None
    if not found.ok:
        error = VerifyError(f"the output differs from the manifest: {found.mismatches[0]}", where=out)
    return _Found(document, [held, *map(str, found.mismatches[:MAX_LISTED])], error)


def _found_by_source(found: Report, out: Path) -> _Found:
    error = None
    if not found.ok:
        first = found.problems[0]
        more = f" (and {counted(len(found.problems) - 1, 'more problem')})" if found.problems[1:] else ""
        what = first.what if first.where == str(out) else str(first)
        error = VerifyError(f"the output differs from the source: {what}{more}", where=out)
    return _Found(found.as_json(), describe(found), error)


def describe(report: Report) -> Iterator[Block]:
    """Yield a report as lines and tables."""
    verdicts = report.verdicts()
    yield (
        f"{report.layout}: {counted(len(report.results))} compared, {verdicts['exact']:,} exact, "
        f"{verdicts['rounded']:,} rounded as the format does, {verdicts['wrong']:,} wrong"
    )
    if report.sample is not None:
        elements = sum(result.elements for result in report.results.values())
        compared = sum(result.compared for result in report.results.values())
        yield f"sample of {report.sample * 100:.3g}%: {compared:,} of {elements:,} elements, seed {report.seed}"
    ignored = f", ignored: {', '.join(report.ignored_keys)}" if report.ignored_keys else ""
    yield f"{counted(report.keys, 'key')} compared{ignored}"
    yield Table(
        ("rounded", "to", "elements", "of", "largest error"),
        [
            (source, output, f"{total.rounded:,}", f"{total.compared:,}", f"{total.largest_error:.3g}")
            for (source, output), total in report.rounding().items()
        ],
        frozenset({2, 3, 4}),
    )
    yield Table(
        ("quantised", "to", "elements", "RMSE", "relative", "largest error"),
        [
            (source, output, f"{total.compared:,}", *_errors(total))
            for (source, output), total in report.requantised().items()
        ],
        frozenset({2, 3, 4, 5}),
    )
    yield Table(
        ("family", "type", "elements", "RMSE", "relative", "largest error"),
        [(total.family, total.output, f"{total.compared:,}", *_errors(total)) for total in report.low_bit()],
        frozenset({2, 3, 4, 5}),
    )
    yield Table(
        ("left out", "tensors", "reason"),
        [(entry.what, f"{entry.tensors:,}", entry.reason) for entry in report.left_out],
        frozenset({1}),
    )
    for note in report.notes:
        yield f"note: {note}"
    for problem in report.problems[:MAX_LISTED]:
        yield f"{problem.kind}: {problem}"
    if len(report.problems) > MAX_LISTED:
        yield f"{counted(len(report.problems) - MAX_LISTED, 'more problem')} (see --json)"
    rate = report.bytes_read / report.seconds / 1e6 if report.seconds else 0.0
    yield f"{report.seconds:.1f} s, {rate:,.0f} MB/s read"


def _errors(total: TensorResult) -> tuple[str, str, str]:
    """Return the last cells of a row: RMSE, relative RMSE and the largest error."""
    return f"{total.rmse:.3g}", f"{total.relative_rmse:.3g}", f"{total.largest_error:.3g}"
