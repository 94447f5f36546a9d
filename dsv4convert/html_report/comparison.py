"""What the page of compare shows: errors by layer and sub-block, choices that agree, and what that means for tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .charts import COLOURS, grid
from .markup import Markup
from .page import Verdict
from .sections import ERROR_BANDS, ERROR_CLASSES, ERROR_KINDS, WORST_ERROR, Json, band_of, error, plot_by_layer
from .tables import Number, facts, table

INFINITE = float("inf")
LAYER_NAME = re.compile(r"layers\.(\d{1,6})\.(.+)")

# Without "rounded" and "wrong", which are verdicts of verify.
KINDS = tuple(
    (kind, colour)
    for kind, colour in zip(ERROR_KINDS, ERROR_CLASSES, strict=True)
    if kind in ("exact", WORST_ERROR, *(name for _, name in ERROR_BANDS))
)


def compare_verdict(found: Json) -> Verdict:
    """Return what a comparison comes to."""
    if found["within"]:
        return Verdict(f"the same within {found['tolerance']:g}, most different in {found['worst']}", True)
    told = f"the runs differ by more than {found['tolerance']:g}, first in {found['first_beyond']}"
    return Verdict(f"{told}, most in {found['worst']}", False)


def compare_sections(found: Json) -> Iterator[Markup | None]:
    """Yield what a page shows of a comparison."""
    logits = found["logits"]
    yield facts(
        "What was compared",
        [
            ("A", found["a"]),
            ("B", found["b"]),
            ("tolerance", f"relative RMSE of {found['tolerance']:g}, {found['by']}"),
            ("positions", logits["positions"]),
            ("next token agrees", f"{logits['argmax_agreement']:.2%}"),
            ("KL(A||B), mean", _finite(logits["kl_mean"], "{:.3g} nats")),
            ("KL(A||B), largest", _finite(logits["kl_max"], "{:.3g} nats")),
            ("cosine of logits, median", _finite(logits["cosine_median"], "{:.7f}")),
            ("cosine of logits, smallest", _finite(logits["cosine_min"], "{:.7f}")),
        ],
    )
    yield _errors(found)
    yield _worst_by_layer(found)
    yield table(
        "Sub-blocks",
        ("layer", "sub-block", "relative RMSE", "median position", "1 - cosine", "RMSE", "largest", "agreement"),
        [
            (
                *_placed(block["name"]),
                _value(block, "relative_rmse"),
                _value(block, "median_relative_rmse"),
                error(1 - block["cosine"]) if block.get("cosine") is not None else None,
                _value(block, "rmse"),
                _value(block, "largest"),
                Number(block["agreement"], f"{block['agreement']:.4%}") if "agreement" in block else None,
            )
            for block in found["blocks"]
        ],
    )


def _errors(found: Json) -> Markup | None:
    """Return the grid of relative errors: a row for each sub-block, a column for each layer."""
    rows: dict[str, dict[int, tuple[str, str]]] = {}
    for block in found["blocks"]:
        layer, name = _placed(block["name"])
        if layer is None or "agreement" in block:
            continue
        relative = _number(block, "relative_rmse")
        kind = "exact" if relative == 0 else band_of(relative)
        rows.setdefault(name, {})[layer] = (kind, f"relative RMSE {relative:.3g}")
    kinds, classes = zip(*KINDS, strict=True)
    return grid("Error by layer and sub-block", list(rows.items()), kinds, classes, "layer")


def _worst_by_layer(found: Json) -> Markup | None:
    """Return the relative error by layer of the sub-blocks that differ most, as many as there are colours."""
    series: dict[str, list[tuple[float, float]]] = {}
    for block in found["blocks"]:
        layer, name = _placed(block["name"])
        if layer is not None and "agreement" not in block and 0 < (value := _number(block, "relative_rmse")) < INFINITE:
            series.setdefault(name, []).append((float(layer), value))
    most = sorted(series, key=lambda name: -max(value for _, value in series[name]))[:COLOURS]
    if not most:
        return None
    return plot_by_layer("Largest errors by layer", "relative RMSE", {name: series[name] for name in most})


def _number(block: Json, key: str) -> float:
    """Return a number of a sub-block; JSON has null for one that is not finite."""
    value = block[key]
    return INFINITE if value is None else float(value)


def _value(block: Json, key: str) -> Number | None:
    if key not in block:
        return None
    value = _number(block, key)
    return Number(value, "not finite" if value == INFINITE else f"{value:.3g}")


def _placed(name: str) -> tuple[int | None, str]:
    """Return the layer of a sub-block and its name within it; None for one of no layer."""
    found = LAYER_NAME.fullmatch(name)
    return (None, name) if found is None else (int(found[1]), found[2])


def _finite(value: float | None, form: str) -> str:
    return "not finite" if value is None else form.format(value)
