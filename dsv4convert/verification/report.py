"""What a verification found: the verdict, every problem, and what was compared how."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from ..errors import escape_control

Key = TypeVar("Key")

# Kinds of problems.
TENSOR = "tensor"  # elements that are not what the source says
MISSING = "missing"
EXTRA = "extra"
LAYOUT = "layout"  # shape or type
KEY = "key"  # metadata or config
PADDING = "padding"  # bytes that belong to nothing and are not zero
FILE = "file"

# Layouts of outputs.
GGUF, SHARDS, FOLDER, MLX, MAXTEXT = "GGUF", "shards", "checkpoint folder", "MLX folder", "MaxText checkpoint"


class Problem(NamedTuple):
    """One thing that is wrong: its kind, where it is, and what it is."""

    kind: str
    where: str
    what: str

    def __str__(self) -> str:
        return escape_control(f"{self.where}: {self.what}")


VERDICTS = ("exact", "rounded", "wrong")


@dataclass
class TensorResult:
    """An output tensor held against its source.

    ``wrong`` elements are not what the conversion must give. ``rounded`` ones differ from the source
    because the output's format rounds. ``largest_error`` is of the wrong ones where there are any, else of
    the rounded ones, with the index of the first of them. ``squared_error`` and ``squared_source`` are sums over the
    elements where ``is_measured``: of a low-bit type, or floats that became FP8 or FP4. ``family``, ``layer`` are the
    tensor's, ``nbytes`` the bytes that the output stores of it, scales among them.
    """

    name: str
    source: str
    output: str
    elements: int = 0
    compared: int = 0
    wrong: int = 0
    rounded: int = 0
    largest_error: float = 0.0
    first_index: tuple[int, ...] | None = None
    family: str = ""
    layer: int | None = None
    nbytes: int = 0
    is_low_bit: bool = False
    is_measured: bool = False
    squared_error: float = 0.0
    squared_source: float = 0.0

    @property
    def rmse(self) -> float:
        """Return the root of the mean squared error of the elements, where it is measured."""
        return math.sqrt(self.squared_error / self.compared) if self.compared else 0.0

    @property
    def relative_rmse(self) -> float:
        """Return the error's part of the source's own root mean square, 0 where both are 0."""
        if self.squared_source == 0:
            return math.inf if self.squared_error else 0.0
        return math.sqrt(self.squared_error / self.squared_source)

    def add(self, other: TensorResult) -> None:
        """Add the result of another piece of the same tensor; pieces come in order."""
        if self.source != other.source and other.source not in self.source.split("+"):
            self.source += "+" + other.source
        if bool(self.wrong) == bool(other.wrong):
            self.largest_error = max(self.largest_error, other.largest_error)
            self.first_index = other.first_index if self.first_index is None else self.first_index
        elif other.wrong:
            self.largest_error, self.first_index = other.largest_error, other.first_index
        self.nbytes += other.nbytes
        self.elements += other.elements
        self.compared += other.compared
        self.wrong += other.wrong
        self.rounded += other.rounded
        self.squared_error += other.squared_error
        self.squared_source += other.squared_source

    @property
    def verdict(self) -> str:
        """Return "wrong", "rounded" (as the format must) or "exact"."""
        return "wrong" if self.wrong else "rounded" if self.rounded else "exact"

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values; an infinite error is a text."""
        names = ("name", "source", "output", "verdict", "elements", "compared", "wrong", "rounded", "largest_error")
        index = None if self.first_index is None else list(self.first_index)
        return {**self.json_of(*names), "first_index": index, **self.json_of("rmse", "relative_rmse")}

    def json_of(self, *names: str) -> dict[str, Any]:
        """Return values of these names as JSON has them: what is not finite is a text, what is not measured is null."""
        values = {name: getattr(self, name) for name in names}
        for name, value in values.items():
            if name in ("rmse", "relative_rmse") and not self.is_measured:
                values[name] = None
            elif isinstance(value, float) and not math.isfinite(value):
                values[name] = str(value)
        return values


class LeftOut(NamedTuple):
    """Source tensors that the output does not hold by design, and why."""

    what: str
    reason: str
    tensors: int


@dataclass
class Report:
    """The result of a verification."""

    source: str
    output: str
    layout: str
    sample: float | None
    seed: int
    foreign: bool
    problems: list[Problem] = field(default_factory=list)
    results: dict[str, TensorResult] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ignored_keys: list[str] = field(default_factory=list)
    keys: int = 0
    bytes_read: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Return whether nothing is wrong."""
        return not self.problems

    def problem(self, kind: str, where: object, what: str) -> None:
        """Add a problem."""
        self.problems.append(Problem(kind, str(where), what))

    def missing(self, name: str, of_source: str) -> None:
        """Add that a tensor is not in the output, which holds what the source's ``of_source`` is."""
        held = "" if of_source == name else f"; the source has {of_source}"
        self.problem(MISSING, f"tensor {name}", f"not in the output{held}")

    def verdicts(self) -> Counter[str]:
        """Return how many tensors are exact, rounded and wrong."""
        return Counter(result.verdict for result in self.results.values())

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values (schemas/verify.schema.json)."""
        verdicts = self.verdicts()
        return {
            "verdict": "ok" if self.ok else "differs",
            **{name: getattr(self, name) for name in ("source", "output", "layout", "sample", "seed", "foreign")},
            "tensors": {"compared": len(self.results), **{kind: verdicts[kind] for kind in VERDICTS}},
            "elements": sum(result.elements for result in self.results.values()),
            "elements_compared": sum(result.compared for result in self.results.values()),
            "keys": self.keys,
            "ignored_keys": self.ignored_keys,
            "bytes_read": self.bytes_read,
            "seconds": self.seconds,
            "problems": [problem._asdict() for problem in self.problems],
            "inexact": [r.as_json() for r in self.results.values() if r.verdict != "exact"],
            "parts": [
                {
                    **total.json_of("layer", "family", "source", "output"),
                    "tensors": dict(tensors),
                    "bytes": total.nbytes,
                    **total.json_of("elements", "compared", "rounded", "wrong", "largest_error", "relative_rmse"),
                }
                for total, tensors in self.parts()
            ],
            "low_bit": [
                total.json_of("family", "output", "elements", "compared", "rmse", "relative_rmse", "largest_error")
                for total in self.low_bit()
            ],
            "left_out": [entry._asdict() for entry in self.left_out],
            "notes": self.notes,
        }

    def parts(self) -> list[tuple[TensorResult, dict[str, int]]]:
        """Return the sums of the tensors of each layer, family and pair of types, and how many have each verdict."""
        results = self.results.values()
        counts: dict[Any, dict[str, int]] = {}
        for result in results:
            verdicts = counts.setdefault(_part(result), dict.fromkeys(VERDICTS, 0))
            verdicts[result.verdict] += 1
        return [(total, counts[key]) for key, total in _sums(results, _part).items()]

    def requantised(self) -> dict[tuple[str, str], TensorResult]:
        """Return the errors of floats that became FP8 or FP4: the sum of the tensors of each (source, output type)."""
        return _sums((r for r in self.results.values() if r.is_measured and not r.is_low_bit), _types)

    def low_bit(self) -> list[TensorResult]:
        """Return the sums of the low-bit tensors of each family and output type."""
        low_bit = (result for result in self.results.values() if result.is_low_bit)
        return list(_sums(low_bit, lambda result: (result.family, result.output)).values())

    def rounding(self) -> dict[tuple[str, str], TensorResult]:
        """Return what was rounded: the sum of the tensors of each (source type, output type)."""
        return _sums((result for result in self.results.values() if result.verdict == "rounded"), _types)


def _types(result: TensorResult) -> tuple[str, str]:
    return result.source, result.output


def _part(result: TensorResult) -> tuple[int | None, str, str, str]:
    return result.layer, result.family, result.source, result.output


def _sums(results: Iterable[TensorResult], key_of: Callable[[TensorResult], Key]) -> dict[Key, TensorResult]:
    """Return the sums of results by key."""
    sums: dict[Key, TensorResult] = {}
    for result in results:
        if (key := key_of(result)) not in sums:
            names = ("source", "output", "family", "layer", "is_low_bit", "is_measured")
            sums[key] = TensorResult("", **{name: getattr(result, name) for name in names})
        sums[key].add(result)
    return sums
