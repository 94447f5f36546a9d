"""The command that describes a checkpoint, a GGUF or a folder of shards: inspect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import api
from ..errors import counted
from ..html_report.figures import human_bytes
from .options import index_option, json_option
from .pages import check_page, overwrite_page_option, report_option, write_page
from .parsing import CHECK, PATH, argument, command
from .tables import Block, Table, print_result

if TYPE_CHECKING:
    from ..inspection.description import Count, Description, EncodingUse, Layer

MAX_LISTED = 20


@command("inspect", panel=CHECK, example="dsv4convert inspect DeepSeek-V4-Flash.gguf")
@argument(
    "path",
    type=PATH,
    description="Checkpoint folder, .gguf file (any of a split one) or folder of shards, local or by address.",
)
@index_option
@report_option
@overwrite_page_option
@json_option
def inspect(path: Path, index: str, report: Path | None, overwrite_page: bool, as_json: bool) -> None:
    """Describe a checkpoint, a GGUF or a folder of shards from its headers alone."""
    replaced = check_page(report, overwrite=overwrite_page, inputs=[path])
    description = api.inspect(path, index=index)
    document = description.as_json()
    try:
        print_result(document, describe(description), as_json=as_json)
    finally:
        write_page(report, "inspect", path, document, replaced)


def describe(found: Description) -> Iterator[Block]:
    """Yield a description as lines and tables."""
    traits = f" ({', '.join(found.traits)})" if found.traits else ""
    yield f"{found.path}: {found.kind}, {found.variant}{traits}"
    ranks = "" if found.ranks is None else f", {counted(found.ranks, 'rank')}"
    yield (
        f"{counted(found.files, 'file')}{ranks}, {counted(found.tensors, 'tensor')}, {found.bytes:,} bytes, "
        f"{found.elements:,} elements"
    )
    yield Table(("config", "value"), [(key, str(value)) for key, value in found.config.items()], frozenset({1}))
    yield Table(("layers", "attention", "routing", "count"), _layer_rows(found.layers), frozenset({3}))
    for role, layers in found.roles.items():
        yield f"{role}: layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
    for table in found.engram:
        yield f"engram table: layer {table.layer}, {table.rows:,} rows of {table.columns}"
    if found.draft_layers:
        yield f"draft: {found.draft}, {counted(found.draft_layers, 'layer')}"
    yield Table(
        ("family", "tensors", "size", "weights stored as"), _family_rows(found.families, found.encodings), COUNTS
    )
    yield Table(("dtype", "tensors", "size"), [_count_row(*item) for item in _largest_first(found.dtypes)], COUNTS)
    for note in found.notes:
        yield f"note: {note}"
    for problem in found.unexpected[:MAX_LISTED]:
        yield f"unexpected: {problem}"
    if len(found.unexpected) > MAX_LISTED:
        yield f"unexpected: {len(found.unexpected) - MAX_LISTED:,} more (see --json)"
    if not found.unexpected:
        yield "nothing unexpected"


# Columns of tensors and sizes.
COUNTS = frozenset({1, 2})


def _largest_first(counts: Mapping[str, Count]) -> list[tuple[str, Count]]:
    return sorted(counts.items(), key=lambda item: -item[1].bytes)


def _count_row(name: str, count: Count) -> tuple[str, str, str]:
    return name, f"{count.tensors:,}", human_bytes(count.bytes)


def _family_rows(families: Mapping[str, Count], encodings: Sequence[EncodingUse]) -> list[tuple[str, str, str, str]]:
    """Return a row for each family and, below it, one for each further way in which its weights are stored."""
    rows = []
    for family, count in _largest_first(families):
        uses = sorted((use for use in encodings if use.family == family), key=lambda use: -use.weights)
        stored = [_stored_as(use) for use in uses] or [""]
        rows.append((*_count_row(family, count), stored[0]))
        rows += [("", "", "", other) for other in stored[1:]]
    return rows


def _stored_as(use: EncodingUse) -> str:
    block = "" if use.block is None else f" per {use.block[0]}x{use.block[1]}"
    scale = "" if use.scale is None else f", {use.scale} scale{block}"
    return f"{use.weights:,} {use.encoding}{scale}"


def _layer_rows(layers: Sequence[Layer]) -> list[tuple[str, str, str, str]]:
    """Return a row for each group of layers that are alike."""
    from ..inspection.description import ranges

    groups: dict[tuple[str, str], list[int]] = {}
    for layer in layers:
        groups.setdefault((layer.attention, layer.routing), []).append(layer.number)
    return [(ranges(numbers), *kind, str(len(numbers))) for kind, numbers in groups.items()]
