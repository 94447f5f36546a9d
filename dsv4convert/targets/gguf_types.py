"""Which element type each tensor of a GGUF gets: the dialect's defaults, options, recipes, and what is protected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from ..checkpoint.weights import Encoding, Weight
from ..errors import UsageError, counted, some
from ..formats.ggml_types import BY_NAME, GgmlType, fitting_type
from ..model.tensors import Store
from .recipes import Rule
from .segments import BF16, F16, F32, I32, matrix_shape

MAX_LISTED = 5

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
# Rows that score experts: errors here change which experts a token meets.
ROUTERS = ("ffn_gate_inp.weight",)


@dataclass(frozen=True)
class TypeOptions:
    """The choices about element types; None takes the default.

    ``rules`` are rows of a recipe and ``--tensor-type`` options, the last match winning; those from ``named`` on are
    the user's own, which must each name a tensor. ``pure`` gives ``dense`` to every tensor that may be quantised,
    embedding, output, compressors and indexer included.
    """

    dense: str | None = None
    experts: str | None = None
    output: str | None = None
    embedding: str | None = None
    pure: bool = False
    rules: tuple[Rule, ...] = ()
    named: int = 0


class Fallback(NamedTuple):
    """The type that a tensor gets because the blocks of the wanted one do not fill its rows."""

    wanted: GgmlType
    kind: GgmlType
    columns: int

    def __str__(self) -> str:
        """Return why, and both types."""
        wanted = self.wanted
        return f"rows of {self.columns} are no multiple of {wanted.elements}: {self.kind.name} for {wanted.name}"


@dataclass
class TypeChoice:
    """The element types of one model's tensors, and what is worth telling about them.

    ``dense`` and ``experts`` are the dialect's types by the source's encoding, ``by_name`` those of tensors whose
    name decides, ``n_layers`` counts the blocks that a recipe's shares are of.
    """

    options: TypeOptions
    dense: Mapping[Encoding, GgmlType]
    experts: Mapping[Encoding, GgmlType]
    n_layers: int
    by_name: Callable[[str], str | None] = lambda name: None
    fallbacks: dict[str, Fallback] = field(default_factory=dict)
    overridden: list[str] = field(default_factory=list)
    _used: set[int] = field(default_factory=set)

    def of(self, weight: Weight, name: str, layer: int | None) -> GgmlType:
        """Return the type of the tensor ``name``, which ``weight`` of block ``layer`` makes (or is a part of)."""
        _, columns = matrix_shape(weight.shape)
        default = self._unnamed(weight, name)
        rule = self._rule(name, layer)
        if rule is None or weight.row.store is Store.TABLE or len(weight.shape) == 1:
            # ggml computes with vectors in F32 and looks up integers: as in llama.cpp, a row that names them is void.
            wanted = default
        else:
            wanted = BY_NAME[rule.type]
            if wanted is not default and is_protected(weight, name) and name not in self.overridden:
                self.overridden.append(name)
        kind = fitting_type(wanted, columns)
        if kind is not wanted:
            self.fallbacks[name] = Fallback(wanted, kind, columns)
        return kind

    def _unnamed(self, weight: Weight, name: str) -> GgmlType:
        """Return the type of a tensor that no row names."""
        options, store = self.options, weight.row.store
        if store is Store.EXPERT:
            return BY_NAME[options.experts] if options.experts else self.experts[weight.encoding]
        if store is Store.TABLE:
            return I32
        own = self.by_name(name)
        asked = {EMBEDDING: options.embedding, OUTPUT: options.output}.get(name)
        if own is not None and not asked:
            return BY_NAME[own]
        # Norms, sinks, biases and everything of the hyper-connections keep full precision.
        if store is Store.F32 or len(weight.shape) == 1:
            return F32
        if asked:
            return BY_NAME[asked]
        dense = BY_NAME[options.dense] if options.dense else None
        if store is Store.DENSE:
            return dense or self.dense[weight.encoding]
        # Embedding, output, router, compressors and the vision tower are stored in BF16.
        if dense in (F16, F32) or (dense is not None and options.pure and not is_protected(weight, name)):
            return dense
        return {Encoding.F32: F32, Encoding.F16: F16}.get(weight.encoding, BF16)

    def _rule(self, name: str, layer: int | None) -> Rule | None:
        found = None
        for number, rule in enumerate(self.options.rules):
            if rule.holds(name, layer, self.n_layers):
                self._used.add(number)
                found = rule
        return found

    def notes(self) -> list[str]:
        """Return what the user should know: types that did not fit, and protected tensors that a row named."""
        notes = [f"{name}: {fallback}" for name, fallback in islice(self.fallbacks.items(), MAX_LISTED)]
        if len(self.fallbacks) > MAX_LISTED:
            notes.append(f"{counted(len(self.fallbacks) - MAX_LISTED, 'more tensor')} with such rows")
        if self.overridden:
            names = some(self.overridden, MAX_LISTED)
            notes.append(f"less precision, as asked, for {counted(len(self.overridden), 'protected tensor')}: {names}")
        return notes

    def used(self) -> set[int]:
        """Return the numbers of the rows that named a tensor."""
        return self._used


def is_protected(weight: Weight, name: str) -> bool:
    """Return whether a tensor keeps its precision unless a row names it."""
    return weight.row.store in (Store.F32, Store.TABLE) or len(weight.shape) == 1 or name.endswith(ROUTERS)


def check_rules_used(options: TypeOptions, choices: Iterable[TypeChoice]) -> list[str]:
    """Check that each ``--tensor-type`` of the user's named a tensor of some file; return notes on rows that did not.

    These are the recipe's. A recipe is for models of several sizes: a row of layers that this one lacks is no mistake.

    Raises:
        UsageError: one did not.
    """
    used: set[int] = set()
    for choice in choices:
        used |= choice.used()
    notes = []
    for number, rule in enumerate(options.rules):
        if number in used:
            continue
        if number >= options.named:
            raise UsageError(
                f"--tensor-type {rule.pattern.pattern}={rule.type}: no tensor has such a name",
                hint="inspect shows the names of a GGUF's tensors",
            )
        where = "" if rule.layers is None else f" in layers {rule.layers}"
        notes.append(f"row {number + 1} of the recipe names no tensor: {rule.pattern.pattern}{where}")
    return notes
