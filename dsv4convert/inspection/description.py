"""The description of a model, as inspect shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from ..model.tensors import Draft
from .scales import ScaleCounts

CUSTOM = "custom"

# Of a file or folder that holds a draft and no model.
DRAFT_ALONE = "a draft alone: the layers are those of the model that it belongs to"


@dataclass
class Count:
    """Tensors and bytes of one kind."""

    tensors: int = 0
    bytes: int = 0

    def add(self, nbytes: int) -> None:
        """Count one more tensor."""
        self.tensors += 1
        self.bytes += nbytes


class Part(NamedTuple):
    """The tensors of one family and dtype in a layer; ``layer`` None for those outside the trunk's layers."""

    layer: int | None
    family: str
    dtype: str
    tensors: int
    bytes: int


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
    scales: list[ScaleCounts] = field(default_factory=list)
    ranks: int | None = None
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _parts: dict[tuple[int | None, str, str], Count] = field(default_factory=dict, repr=False)

    def count(self, family: str, dtype: str, nbytes: int, layer: int | None) -> None:
        """Count a tensor under its family, its dtype and its layer, None outside the trunk's layers."""
        self.families.setdefault(family, Count()).add(nbytes)
        self.dtypes.setdefault(dtype, Count()).add(nbytes)
        self._parts.setdefault((layer, family, dtype), Count()).add(nbytes)
        self.tensors += 1
        self.bytes += nbytes

    @property
    def parts(self) -> list[Part]:
        """Return what each layer holds, by family and dtype."""
        return [Part(*key, count.tensors, count.bytes) for key, count in self._parts.items()]

    def as_json(self) -> dict[str, Any]:
        """Return the description as plain JSON values (schemas/inspect.schema.json)."""
        values = asdict(self)
        del values["_parts"]
        for name in ("parts", "layers", "engram", "encodings"):
            values[name] = [entry._asdict() for entry in getattr(self, name)]
        values["scales"] = [counts.as_json() for counts in self.scales]
        return values


def ranges(numbers: Sequence[int]) -> str:
    """Return numbers as ranges, with the step where it is not one.

    >>> ranges([0, 1, 2, 4, 6, 8, 11])
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
