"""The page of a command: what it reports, and what inspect says of the models that it is about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from . import CONVERSION
from .comparison import compare_sections, compare_verdict
from .conversion import conversion_sections, conversion_verdict
from .estimation import estimate_sections, estimate_verdict
from .markup import Markup
from .page import Origin, Verdict, page
from .sections import (
    Json,
    inspect_sections,
    inspect_verdict,
    manifest_sections,
    manifest_verdict,
    verify_sections,
    verify_verdict,
)


class Kind(NamedTuple):
    """How the JSON of a command is shown."""

    verdict: Callable[[Json], Verdict]
    sections: Callable[[Json], Iterator[Markup | None]]


KINDS: Mapping[str, Kind] = {
    "inspect": Kind(inspect_verdict, inspect_sections),
    "verify": Kind(verify_verdict, verify_sections),
    "verify --manifest": Kind(manifest_verdict, manifest_sections),
    "compare": Kind(compare_verdict, compare_sections),
    CONVERSION: Kind(conversion_verdict, conversion_sections),
    "estimate": Kind(estimate_verdict, estimate_sections),
}


def report_page(command: str, subject: str, document: Mapping[str, Any], origin: Origin) -> str:
    """Return the page of what ``command`` printed as JSON about ``subject``.

    Everything that it shows is in ``document`` and ``origin``; nothing is read.
    """
    kind = KINDS[command]
    return page(f"dsv4convert {command}: {subject}", kind.verdict(document), kind.sections(document), origin)
