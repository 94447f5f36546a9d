"""What the page of a conversion shows: bytes before and after, files with checksums, and the run as a time line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from ..errors import counted
from .charts import COLOURS, Axis, bars, lines
from .figures import human_bytes, human_seconds
from .markup import Markup
from .page import Verdict
from .sections import Json, cells, map_by_type, size
from .tables import Number, facts, notes, table

MEGA = 1e6

# The largest families have bars; all of them stand in a table.
MAX_FAMILIES = 12

# What is told of a tensor some of whose elements are worth a look.
COUNTED = ("file", "tensor", "nan", "overflow", "underflow", "changed")


def conversion_verdict(found: Json) -> Verdict:
    """Return what a conversion came to; it judges nothing."""
    written = f"{counted(found['tensors'])}, {human_bytes(found['written_bytes'])}"
    if found["resumed_bytes"] == found["written_bytes"]:
        return Verdict(f"finished by an earlier run: {written}")
    return Verdict(f"converted: {written} in {human_seconds(found['seconds'])}")


def conversion_sections(found: Json) -> Iterator[Markup | None]:
    """Yield what a page shows of a conversion."""
    yield facts(
        "What was converted",
        [
            ("source", found["source"]),
            ("target", found["target"]),
            ("read", f"{found['read_bytes']:,} bytes"),
            ("written", f"{found['written_bytes']:,} bytes"),
            ("by an earlier run", f"{found['resumed_bytes']:,} bytes" if found["resumed_bytes"] else None),
            ("rate", f"{human_bytes(found['bytes_per_second'])}/s"),
            ("threads", found["threads"]),
            ("codecs", found["backend"]),
            ("peak memory", human_bytes(found["peak_memory_bytes"])),
        ],
    )
    yield notes("Notes", found["notes"])
    yield map_by_type((part["layer"], part["family"], part["dtype"], part["bytes"]) for part in found["after"])
    yield from _before_and_after(found)
    yield table(
        "Files",
        ("file", "size", "bytes", "checksum in the manifest"),
        [(f["path"], size(f["bytes"]), f["bytes"], found["checksums"].get(f["path"])) for f in found["files"]],
    )
    left_out = cells(found["dropped"], "what", "count", "nbytes", "reason")
    yield table("Left out", ("what", "tensors", "size", "reason"), left_out)
    yield _timeline(found["timeline"]["seconds"], found["timeline"]["threads"])
    yield table(
        "Threads",
        ("thread", "written", "mean rate"),
        [
            (number, size(counts[-1]), _rate(counts[-1] / (found["timeline"]["seconds"][-1] or 1)))
            for number, counts in enumerate(found["timeline"]["threads"])
        ],
    )
    yield table("Counted", COUNTED, cells(found["counted"], *COUNTED))


def _before_and_after(found: Json) -> Iterator[Markup | None]:
    """Yield the bytes of each family in source and output, as bars and as a table."""
    sums: dict[str, list[int]] = {}
    for place, parts in enumerate((found["before"], found["after"])):
        for part in parts:
            sums.setdefault(part["family"], [0, 0])[place] += part["bytes"]
    families = sorted(sums.items(), key=lambda item: -max(item[1]))
    left_out = sum(entry["nbytes"] for entry in found["dropped"])
    rows: list[tuple[str, list[float]]] = [("all, before", [found["read_bytes"] + left_out, 0])]
    rows.append(("all, after", [0, found["written_bytes"]]))
    for family, (before, after) in families[:MAX_FAMILIES]:
        rows += [(f"{family}, before", [before, 0]), (f"{family}, after", [0, after])]
    yield bars("Bytes before and after", rows, ("before", "after"), human_bytes)
    yield table(
        "Families before and after",
        ("family", "before", "after", "after of before"),
        [
            (family, size(before), size(after), Number(after / before, f"{after / before:.2f}") if before else None)
            for family, (before, after) in families
        ],
    )


def _timeline(seconds: Sequence[float], threads: Sequence[Sequence[int]]) -> Markup | None:
    """Return the rate of every thread over time; of many threads their mean, the quickest and the slowest."""
    spans = [(a, b) for a, b in pairwise(seconds) if b > a]
    if not spans or not threads:
        return None
    rates: list[list[float]] = []
    for counts in threads:
        steps = zip(pairwise(seconds), pairwise(counts), strict=True)
        rates.append([(after - before) / (b - a) / MEGA for (a, b), (before, after) in steps if b > a])
    series = {f"thread {number}": rate for number, rate in enumerate(rates)}
    if len(threads) > COLOURS:
        at_once = list(zip(*rates, strict=True))
        series = {
            "mean": [sum(values) / len(values) for values in at_once],
            "quickest": [max(values) for values in at_once],
            "slowest": [min(values) for values in at_once],
        }
    most = max(max(rate) for rate in series.values())
    if not most:
        return None
    points = {name: [(b, value) for (_, b), value in zip(spans, rate, strict=True)] for name, rate in series.items()}
    return lines("Rate of threads over time", points, Axis(0, seconds[-1], "seconds"), Axis(0, most, "MB/s written"))


def _rate(value: float) -> Number:
    return Number(value, f"{human_bytes(value)}/s")
