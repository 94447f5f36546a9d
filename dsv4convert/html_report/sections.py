"""What a page shows of each command's JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import counted
from .charts import COLOURS, Axis, lines, log_axis
from .figures import human_bytes, human_seconds
from .markup import Markup, element
from .page import Verdict
from .tables import Cell, Number, facts, notes, table
from .treemap import Leaf, treemap

CATEGORY_CLASSES = tuple(f"c{number}" for number in range(8))
OTHER_TYPES = "other types"

# How an output's tensors are held against their source, from good to bad, with their colours. Types that lose more
# are those of ggml's low-bit ones, by their relative RMSE.
ERROR_BANDS = ((0.01, "relative RMSE below 1 %"), (0.05, "1 to 5 %"), (0.2, "5 to 20 %"))
WORST_ERROR = "20 % and more"
ERROR_KINDS = ("exact", "rounded", *(name for _, name in ERROR_BANDS), WORST_ERROR, "wrong")
ERROR_CLASSES = ("good0", "warn0", "warn0", "warn1", "warn2", "warn3", "bad0")

Json = Mapping[str, Any]


# ---- what several commands have -----------------------------------------------------------------------


def size(nbytes: float) -> Number:
    """Return the cell of so many bytes."""
    return Number(nbytes, human_bytes(nbytes))


def error(value: float | str | None) -> Cell:
    """Return the cell of an error, which JSON has as a text where it is not finite."""
    if value is None:
        return None
    return Number(float(value), f"{float(value):.3g}")


# How values of these keys are shown; all others as they are.
SHOWN: Mapping[str, Callable[[Any], Cell]] = {
    "bytes": size,
    "nbytes": size,
    "rmse": error,
    "relative_rmse": error,
    "largest_error": error,
    "block": lambda block: None if block is None else "x".join(map(str, block)),
}


def cells(entries: Iterable[Json], *keys: str) -> list[list[Cell]]:
    """Return a table's row for each entry: its values of these keys."""
    return [[SHOWN[key](entry[key]) if key in SHOWN else entry[key] for key in keys] for entry in entries]


def group_of(layer: int | None, family: str) -> str:
    """Return the group of the map that a part of the model belongs to."""
    return family if layer is None else f"layer {layer}"


def map_by_type(parts: Iterable[tuple[int | None, str, str, int]]) -> Markup | None:
    """Return the map of (layer, family, type, bytes), coloured by type: the largest types have a colour each."""
    found = list(parts)
    by_type: Counter[str] = Counter()
    for _, _, kind, nbytes in found:
        by_type[kind] += nbytes
    named = [kind for kind, _ in by_type.most_common(len(CATEGORY_CLASSES) - 1)]
    kinds = [*named, OTHER_TYPES]
    leaves = [
        Leaf(group_of(layer, family), family, nbytes, kind if kind in named else OTHER_TYPES)
        for layer, family, kind, nbytes in found
    ]
    return treemap(leaves, kinds, "Map by type", CATEGORY_CLASSES)


def map_by_error(parts: Iterable[Json]) -> Markup | None:
    """Return the map of a verification's parts, coloured by what the conversion did to them."""
    leaves = []
    for part in parts:
        kind, note = _error_kind(part), f"{part['source']} to {part['output']}"
        leaves.append(Leaf(group_of(part["layer"], part["family"]), part["family"], part["bytes"], kind, note))
    return treemap(leaves, ERROR_KINDS, "Map by error", ERROR_CLASSES)


def band_of(relative_rmse: float) -> str:
    """Return the kind of a relative RMSE that is not 0; of one that is no number too."""
    return next((name for most, name in ERROR_BANDS if relative_rmse < most), WORST_ERROR)


def _place(part: Json) -> tuple[int, str]:
    """Return where a part stands in a list: by layer, the trunk's layers last, and by family."""
    return -1 if part["layer"] is None else part["layer"], part["family"]


def _error_kind(part: Json) -> str:
    if part["wrong"]:
        return "wrong"
    if part["relative_rmse"] is not None:
        return band_of(float(part["relative_rmse"]))
    return "rounded" if part["rounded"] else "exact"


def counts(title: str, name: str, found: Json) -> Markup | None:
    """Return a table of tensors and bytes by name, the most bytes first."""
    total = sum(count["bytes"] for count in found.values()) or 1
    rows = [
        (key, count["tensors"], size(count["bytes"]), Number(count["bytes"] / total, f"{count['bytes'] / total:.1%}"))
        for key, count in sorted(found.items(), key=lambda item: -item[1]["bytes"])
    ]
    return table(title, (name, "tensors", "size", "share"), rows)


# ---- inspect ------------------------------------------------------------------------------------------


def inspect_verdict(found: Json) -> Verdict:
    """Return what a description comes to."""
    unexpected = len(found["unexpected"])
    traits = f" ({', '.join(found['traits'])})" if found["traits"] else ""
    told = f"{found['kind']}, {found['variant']}{traits}: "
    return Verdict(told + (f"{unexpected:,} unexpected" if unexpected else "nothing unexpected"), not unexpected)


def exponents_of_scales(scales: Sequence[Json]) -> Iterator[Markup | None]:
    """Yield how the scales of each family are spread over powers of two, as a plot of the largest ones and a table."""
    sampled = sorted((entry for entry in scales if entry["exponents"]), key=lambda entry: -entry["sampled"])
    shares = {
        f"{entry['family']}, {entry['type']}": [
            (int(exponent), count / entry["sampled"]) for exponent, count in entry["exponents"].items()
        ]
        for entry in sampled
    }
    series = {name: sorted(points) for name, points in list(shares.items())[:COLOURS]}
    if series:
        values = [exponent for points in series.values() for exponent, _ in points]
        x = Axis(min(values) - 1, max(values) + 1, "exponent of the scale: 2^e up to 2^(e+1)")
        most = max(share for points in series.values() for _, share in points)
        yield lines("Exponents of scales", series, x, Axis(0, most, "share of the scales that were sampled"))
    yield table(
        "Exponents of scales, by family",
        ("family", "type", "tensors", "sampled", "exponent", "scales", "share"),
        [
            (
                entry["family"],
                entry["type"],
                entry["tensors"],
                entry["sampled"],
                int(exponent),
                count,
                Number(count / entry["sampled"], f"{count / entry['sampled']:.4f}"),
            )
            for entry in sampled
            for exponent, count in sorted(entry["exponents"].items(), key=lambda item: int(item[0]))
        ],
    )


def inspect_sections(found: Json) -> Iterator[Markup | None]:
    """Yield what a page shows of a description."""
    yield facts(
        "What there is",
        [
            *((key, found[key]) for key in ("path", "files", "ranks", "tensors", "bytes", "elements")),
            (
                "draft",
                f"{found['draft']}, {counted(found['draft_layers'], 'layer')}" if found["draft_layers"] else None,
            ),
            *((key.replace("_", " "), str(value)) for key, value in found["config"].items()),
        ],
    )
    yield notes("Unexpected", found["unexpected"])
    yield notes("Notes", found["notes"])
    yield map_by_type((part["layer"], part["family"], part["dtype"], part["bytes"]) for part in found["parts"])
    yield counts("Families", "family", found["families"])
    yield counts("Types", "dtype", found["dtypes"])
    yield table(
        "How weights are stored",
        ("family", "encoding", "scale", "block", "weights"),
        cells(found["encodings"], "family", "encoding", "scale", "block", "weights"),
    )
    yield from exponents_of_scales(found["scales"])
    parts = sorted(found["parts"], key=_place)
    by_layer: Counter[int] = Counter()
    for part in found["parts"]:
        if part["layer"] is not None:
            by_layer[part["layer"]] += part["bytes"]
    roles: dict[int, list[str]] = {}
    for role, layers in found["roles"].items():
        for layer in layers:
            roles.setdefault(layer, []).append(role)
    for entry in found["engram"]:
        roles.setdefault(entry["layer"], []).append(f"n-gram table of {entry['rows']:,} x {entry['columns']:,}")
    yield table(
        "Layers",
        ("layer", "attention", "routing", "roles", "size"),
        [
            (
                layer["number"],
                layer["attention"],
                layer["routing"],
                ", ".join(roles.get(layer["number"], [])),
                size(by_layer[layer["number"]]),
            )
            for layer in found["layers"]
        ],
    )
    yield table(
        "Parts",
        ("layer", "family", "dtype", "tensors", "size"),
        cells(parts, "layer", "family", "dtype", "tensors", "bytes"),
    )


# ---- verify -------------------------------------------------------------------------------------------


def verify_verdict(found: Json) -> Verdict:
    """Return what a verification comes to."""
    tensors = found["tensors"]
    told = (
        f"{counted(tensors['compared'])} compared: {tensors['exact']:,} exact, {tensors['rounded']:,} rounded as the "
        f"format does, {tensors['wrong']:,} wrong"
    )
    if found["verdict"] == "ok":
        return Verdict(f"verified; {told}", True)
    return Verdict(f"the output differs from the source; {told}", False)


def verify_sections(found: Json) -> Iterator[Markup | None]:
    """Yield what a page shows of a verification."""
    sample = found["sample"]
    rate = found["bytes_read"] / found["seconds"] if found["seconds"] else 0.0
    yield facts(
        "What was compared",
        [
            *((key, found[key]) for key in ("source", "output", "layout", "elements")),
            ("elements compared", found["elements_compared"]),
            ("sample", None if sample is None else f"{sample:.3g}, seed {found['seed']}"),
            ("another program's rounding", "accepted" if found["foreign"] else None),
            ("keys compared", found["keys"]),
            ("keys ignored", ", ".join(found["ignored_keys"])),
            ("read", f"{human_bytes(found['bytes_read'])} in {human_seconds(found['seconds'])}"),
            ("rate", f"{human_bytes(rate)}/s"),
        ],
    )
    yield table("Problems", ("kind", "where", "what"), cells(found["problems"], "kind", "where", "what"))
    yield notes("Notes", found["notes"])
    yield map_by_error(found["parts"])
    yield _error_by_layer(found["parts"])
    yield table(
        "Low-bit types",
        ("family", "type", "elements compared", "RMSE", "relative RMSE", "largest error"),
        cells(found["low_bit"], "family", "output", "compared", "rmse", "relative_rmse", "largest_error"),
    )
    verdicts = ("exact", "rounded", "wrong")  # of a part's tensors
    parts = [{**part, **part["tensors"]} for part in sorted(found["parts"], key=_place)]
    yield table(
        "Parts",
        ("layer", "family", "source", "output", *verdicts, "size", "relative RMSE", "largest error"),
        cells(parts, "layer", "family", "source", "output", *verdicts, "bytes", "relative_rmse", "largest_error"),
    )
    verdict = ("source", "output", "verdict", "compared", "rounded", "wrong")
    yield table(
        "Tensors that are not exact",
        ("tensor", *verdict, "largest error", "relative RMSE"),
        cells(found["inexact"], "name", *verdict, "largest_error", "relative_rmse"),
    )
    yield table("Left out", ("what", "tensors", "reason"), cells(found["left_out"], "what", "tensors", "reason"))


def _error_by_layer(parts: Iterable[Json]) -> Markup | None:
    """Return the error of each family by layer: relative RMSE where it is known, and else the largest error."""
    drawn: dict[str, dict[str, list[tuple[float, float]]]] = {"relative_rmse": {}, "largest_error": {}}
    for part in parts:
        measure = "largest_error" if part["relative_rmse"] is None else "relative_rmse"
        value = float(part[measure])
        if part["layer"] is not None and 0 < value < float("inf"):
            series = drawn[measure].setdefault(f"{part['family']}, {part['output']}", [])
            series.append((float(part["layer"]), value))
    plots = [
        plot_by_layer(f"{label} by layer", label, drawn[measure])
        for measure, label in (("relative_rmse", "Relative RMSE"), ("largest_error", "Largest error"))
        if drawn[measure]
    ]
    return element("div", *plots) if plots else None


def plot_by_layer(title: str, label: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> Markup:
    """Return errors by layer, above 0, on an axis of powers of ten."""
    layers = [point[0] for points in series.values() for point in points]
    values = [point[1] for points in series.values() for point in points]
    placed = {name: sorted(points) for name, points in series.items()}
    return lines(title, placed, Axis(min(layers), max(layers), "layer", is_whole=True), log_axis(values, label))


# ---- verify --manifest --------------------------------------------------------------------------------


def manifest_verdict(found: Json) -> Verdict:
    """Return what a check of checksums comes to."""
    there = f"{counted(found['files'], 'file')}, {counted(found['tensors'])}, {human_bytes(found['bytes'])}"
    told = f"{there} against the manifest"
    if found["verdict"] == "ok":
        return Verdict(f"verified; {told}", True)
    return Verdict(
        f"the output differs from the manifest in {counted(len(found['mismatches']), 'place')}; {told}", False
    )


def manifest_sections(found: Json) -> Iterator[Markup | None]:
    """Yield what a page shows of a check of checksums."""
    yield facts("What was checked", [("output", found["output"]), ("bytes", found["bytes"])])
    yield table("Differences", ("file", "tensor", "what"), cells(found["mismatches"], "file", "tensor", "what"))
