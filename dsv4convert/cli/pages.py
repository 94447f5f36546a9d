"""The option --report: a page of a command's findings, besides its output on stdout."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .parsing import PATH, REPORT, option

if TYPE_CHECKING:
    from ..engine.names import Identity

report_option = option(
    "--report",
    type=PATH,
    metavar="FILE.html",
    panel=REPORT,
    help="Write a page to look at, with plots and tables, to this file.",
)
# Of commands that write nothing else.
overwrite_page_option = option(
    "--overwrite", "overwrite_page", is_flag=True, panel=REPORT, help="Replace an existing page of --report."
)


def check_page(
    path: Path | None, *, overwrite: bool, inputs: Iterable[Path], outputs: Iterable[Path] = ()
) -> Identity | None:
    """Return what a page replaces, where one is asked for, having checked that it can; see ``check_report``.

    Raises:
        UsageError, OutputExistsError: it cannot.
    """
    if path is None:
        return None
    from ..html_report.write import check_report

    return check_report(path, overwrite=overwrite, inputs=inputs, outputs=outputs)


def write_page(
    path: Path | None, command: str, subject: object, document: Mapping[str, Any], replaced: Identity | None
) -> None:
    """Write the page of a command's JSON about ``subject``, where one is asked for.

    Raises:
        OutputExistsError, SpaceError, InputOutputError: see ``write_report``.
    """
    if path is None:
        return
    import hashlib

    from ..formats.backend import describe_codecs
    from ..html_report.page import Origin
    from ..html_report.report import report_page
    from ..html_report.write import write_report
    from .saying import json_text

    versions = {
        "dsv4convert": __version__,
        "codecs": describe_codecs(),
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
    }
    made_at = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    digest = hashlib.sha256((json_text(document) + "\n").encode("utf-8", "backslashreplace")).hexdigest()
    origin = Origin(("dsv4convert", *sys.argv[1:]), made_at, versions, digest)
    write_report(report_page(command, str(subject), document, origin), path, replaced)
