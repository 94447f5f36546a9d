"""Weights that an output leaves out by design, and what is reported of them."""

from __future__ import annotations

from collections.abc import Iterable

from ..checkpoint.weights import Weight
from .report import LeftOut, Report

PREFIX = "model."

# What an output can leave out as a whole.
THE_DRAFT, THE_MODEL = "the draft layers", "the model without its draft"


def leave_out(weights: Iterable[Weight], reason: str, report: Report) -> None:
    """Note weights that the output has no place for."""
    groups: dict[str, int] = {}
    for weight in weights:
        groups[weight.row.name] = groups.get(weight.row.name, 0) + 1 + (weight.scale is not None)
    report.left_out += [LeftOut(what, reason, count) for what, count in groups.items()]


def without_absent_parts(weights: list[Weight], names: Iterable[str], report: Report) -> list[Weight]:
    """Return the weights without those of draft layers if the output has none of them, or without all others.

    ``names``: of the tensors in all files of the output. Both are what ``--draft`` can leave out.
    """
    of_draft = {name.removeprefix(PREFIX).startswith("mtp.") for name in names}
    if len(of_draft) != 1:
        return weights
    (only_draft,) = of_draft
    absent = [weight for weight in weights if weight.is_draft != only_draft]
    if absent:
        tensors = sum(1 + (weight.scale is not None) for weight in absent)
        what = LeftOut(THE_MODEL, "the output holds the draft alone", tensors)
        report.left_out.append(what if only_draft else LeftOut(THE_DRAFT, "the output holds none", tensors))
    return [weight for weight in weights if weight.is_draft == only_draft]


def is_left_out(what: str, report: Report) -> bool:
    """Return whether the report says that the output leaves ``what`` out as a whole."""
    return any(entry.what == what for entry in report.left_out)
