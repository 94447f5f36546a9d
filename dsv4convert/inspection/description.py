"""The description of a model, as inspect shows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from ..errors import escape_control
from ..model.tensors import Draft

MAX_LISTED = 20

CUSTOM = "custom"


@dataclass
class Count:
    """Tensors and bytes of one kind."""

    tensors: int = 0
    bytes: int = 0

    def add(self, nbytes: int) -> None:
        """Count one more tensor."""
        self.tensors += 1
        self.bytes += nbytes


class Layer(NamedTuple):
    """A layer: its number, attention kind (sliding, CSA, HCA) and routing kind (hash, learned)."""

    number: int
    attention: str
    routing: str


class EngramTable(NamedTuple):
    """An n-gram table: the layer that has it, its rows, and the elements of a row."""

    layer: int
    rows: int
    columns: int


class EncodingUse(NamedTuple):
    """How many weights of a family are stored in one way; ``block`` is what shares a scale."""

    family: str
    encoding: str
    scale: str | None
    block: tuple[int, int] | None
    weights: int


@dataclass
class Description:
    """What there is at ``path``; ``unexpected`` lists all that does not belong or is missing."""

    path: str
    kind: str
    variant: str = CUSTOM
    traits: list[str] = field(default_factory=list)
    files: int = 0
    tensors: int = 0
    bytes: int = 0
    elements: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    roles: dict[str, list[int]] = field(default_factory=dict)
    engram: list[EngramTable] = field(default_factory=list)
    draft: str = Draft.NONE.value
    draft_layers: int = 0
    families: dict[str, Count] = field(default_factory=dict)
    dtypes: dict[str, Count] = field(default_factory=dict)
    encodings: list[EncodingUse] = field(default_factory=list)
    ranks: int | None = None
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def count(self, family: str, dtype: str, nbytes: int) -> None:
        """Count a tensor under its family and its dtype."""
        self.families.setdefault(family, Count()).add(nbytes)
        self.dtypes.setdefault(dtype, Count()).add(nbytes)
        self.tensors += 1
        self.bytes += nbytes

    def as_json(self) -> dict[str, Any]:
        """Return the description as plain JSON values (schemas/inspect.schema.json)."""
        values = asdict(self)
        values["layers"] = [layer._asdict() for layer in self.layers]
        values["engram"] = [table._asdict() for table in self.engram]
        values["encodings"] = [use._asdict() for use in self.encodings]
        return values

    def lines(self) -> Iterator[str]:
        """Yield the description as lines of text, control characters escaped."""
        return map(escape_control, self._lines())

    def _lines(self) -> Iterator[str]:
        traits = f" ({', '.join(self.traits)})" if self.traits else ""
        yield f"{self.path}: {self.kind}, {self.variant}{traits}"
        ranks = "" if self.ranks is None else f", {self.ranks} ranks"
        yield (
            f"{self.files} file{'s' if self.files != 1 else ''}{ranks}, {self.tensors:,} tensors, "
            f"{self.bytes:,} bytes, {self.elements:,} elements"
        )
        if self.config:
            yield "config: " + ", ".join(f"{key} {value}" for key, value in self.config.items())
        yield from (f"layers {span}" for span in _layer_spans(self.layers))
        for role, layers in self.roles.items():
            yield f"{role}: layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
        for table in self.engram:
            yield f"engram table: layer {table.layer}, {table.rows:,} rows of {table.columns}"
        if self.draft != Draft.NONE.value:
            yield f"draft: {self.draft}, {self.draft_layers} layer{'s' if self.draft_layers != 1 else ''}"
        for title, counts in (("family", self.families), ("dtype", self.dtypes)):
            for name, count in sorted(counts.items(), key=lambda item: -item[1].bytes):
                tensors = "1 tensor" if count.tensors == 1 else f"{count.tensors:,} tensors"
                yield f"{title} {name}: {tensors}, {count.bytes:,} bytes"
        for use in sorted(self.encodings, key=lambda use: use.family):
            scale = "" if use.scale is None else f", {use.scale} scales"
            block = "" if use.block is None else f", blocks {use.block[0]}x{use.block[1]}"
            weights = "1 weight" if use.weights == 1 else f"{use.weights:,} weights"
            yield f"encoding of {use.family}: {use.encoding}{scale}{block} ({weights})"
        for note in self.notes:
            yield f"note: {note}"
        for problem in self.unexpected[:MAX_LISTED]:
            yield f"unexpected: {problem}"
        if len(self.unexpected) > MAX_LISTED:
            yield f"unexpected: {len(self.unexpected) - MAX_LISTED} more (see --json)"
        if not self.unexpected:
            yield "nothing unexpected"


def _layer_spans(layers: Iterable[Layer]) -> Iterator[str]:
    """Yield runs of like layers: ``2-41: CSA and HCA alternating, learned routing`` takes one line."""
    runs: list[tuple[list[int], str, str]] = []
    for layer in layers:
        for numbers, attention, routing in runs:
            if (attention, routing) == (layer.attention, layer.routing):
                numbers.append(layer.number)
                break
        else:
            runs.append(([layer.number], layer.attention, layer.routing))
    for numbers, attention, routing in runs:
        yield f"{_ranges(numbers)}: {attention} attention, {routing} routing ({len(numbers)})"


def _ranges(numbers: list[int]) -> str:
    """Return numbers as ranges, with the step where it is not one.

    >>> _ranges([0, 1, 2, 4, 6, 8, 11])
    '0-2,4-8/2,11'
    """
    spans: list[str] = []
    start = 0
    while start < len(numbers):
        end = start + 1
        step = numbers[end] - numbers[start] if end < len(numbers) else 1
        while end < len(numbers) and numbers[end] - numbers[end - 1] == step:
            end += 1
        if end - start < 3 and step != 1:
            end = start + 1
        first, last = numbers[start], numbers[end - 1]
        spans.append(str(first) if first == last else f"{first}-{last}" + (f"/{step}" if step != 1 else ""))
        start = end
    return ",".join(spans)
