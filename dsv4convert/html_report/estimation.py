"""What the page of estimate shows: weights as a map, what a device needs of its memory, and what takes the time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from ..errors import counted
from .charts import bars
from .figures import human_bytes, short_seconds
from .markup import Markup
from .page import Verdict
from .sections import Json, counts, map_by_type, size
from .tables import Cell, Number, facts, notes, table

NEEDS = ("weights", "caches", "activations")


def estimate_verdict(found: Json) -> Verdict:
    """Return what an estimate comes to; it judges only against a memory."""
    device = found["device"]
    of_memory = "" if device["memory"] is None else f" of its {human_bytes(device['memory'])}"
    context = f"a context of {counted(found['caches']['context'], 'token')}"
    told = f"{found['form']}: each device needs {human_bytes(device['total'])}{of_memory} for {context}"
    if device["memory"] is None:
        return Verdict(told)
    longest = f"; the longest that fits has {device['longest_context']:,}" if device["longest_context"] else ""
    if device["fits"]:
        return Verdict(f"it fits; {told}{longest}", True)
    return Verdict(f"it does not fit; {told}, and {human_bytes(-device['free'])} are missing{longest}", False)


def estimate_sections(found: Json) -> Iterator[Markup | None]:
    """Yield what a page shows of an estimate."""
    weights, caches, device, times = found["weights"], found["caches"], found["device"], found["times"]
    yield facts(
        "What was estimated",
        [
            *((key, found[key]) for key in ("path", "kind", "form", "version")),
            *((key.replace("_", " "), value) for key, value in found["config"].items()),
            ("draft layers", found["draft_layers"] or None),
            ("weights", f"{weights['bytes']:,} bytes"),
            ("sequences", caches["batch"]),
            ("context", f"{counted(caches['context'], 'token')}, caches {caches['kv']}"),
            ("machine", None if times is None else f"{times['devices']} of {times['hardware']['name']}"),
            ("chosen form", found["chosen"]),
        ],
    )
    yield notes("Notes", found["notes"])
    forms = [("this form", device), *((option["name"], option["device"]) for option in found["options"])]
    yield bars(
        "Each device" + ("" if device["memory"] is None else f", against its {human_bytes(device['memory'])}"),
        [(name, [needed[part] for part in NEEDS]) for name, needed in forms],
        NEEDS,
        human_bytes,
        device["memory"],
    )
    yield table(
        "Forms on this machine",
        ("form", "each device", "left or missing", "longest context"),
        [
            (o["name"], size(o["device"]["total"]), _left(o["device"]["free"]), o["device"]["longest_context"] or None)
            for o in found["options"]
        ],
    )
    by_part: Counter[tuple[int | None, str, str]] = Counter()
    for part in weights["parts"]:
        layer = None if part["is_draft"] else part["layer"]
        by_part[layer, part["family"], part["type"]] += part["bytes"]
    yield map_by_type((*part, nbytes) for part, nbytes in by_part.items())
    yield counts("Families", "family", {count["family"]: count for count in weights["families"]})
    yield counts("Types", "type", {count["type"]: count for count in weights["types"]})
    if found["ranks"] is not None:
        yield table(
            "Ranks",
            ("rank", "size", "bytes"),
            [(rank, size(nbytes), nbytes) for rank, nbytes in enumerate(found["ranks"]["rank_bytes"])],
        )
        yield _sizes("Whole on every rank", "what", found["ranks"]["replicated"])
    recipes = [(recipe["recipe"] or "default", [recipe["bytes"]]) for recipe in found["recipes"]]
    yield bars("GGUF by recipe", recipes, ("bytes",), human_bytes)
    yield _sizes("Caches of one sequence", "kind", caches["kinds"])
    by_sublayer: Counter[str] = Counter()
    for array in found["activations"]["parts"]:
        by_sublayer[array["sublayer"]] += array["bytes"]
    yield _sizes(f"Activations of {counted(found['activations']['tokens'], 'token')}", "sublayer", by_sublayer)
    if times is not None:
        yield _times(times)
    for phase in ("prefill", "decode", "draft"):
        if found[phase] is not None:
            yield _operators(phase, found[phase], None if times is None else times[phase])


def _sizes(title: str, name: str, found: Mapping[str, int]) -> Markup | None:
    return table(title, (name, "size", "bytes"), [(key, size(value), value) for key, value in found.items()])


def _left(free: int | None) -> Cell:
    if free is None:
        return None
    return Number(free, f"{human_bytes(abs(free))} {'left' if free >= 0 else 'missing'}")


TIME_PARTS = ("compute", "memory", "decoding", "kernel", "communication")


def _times(times: Json) -> Markup | None:
    """Return what each phase takes and what of: computing, memory, decoding weights, kernels, communicating."""
    found = [(name, times[name]) for name in ("prefill", "decode", "draft") if times[name] is not None]
    return table(
        "Times",
        ("phase", "tokens/s", "time", "computing", "memory", "decoding", "kernels", "communication"),
        [
            (
                name,
                Number(phase["tokens_per_second"], f"{phase['tokens_per_second']:.4g}"),
                _seconds(phase["seconds"]),
                *(_seconds(phase[f"{part}_seconds"]) for part in TIME_PARTS),
            )
            for name, phase in found
        ],
    )


def _operators(name: str, phase: Json, timed: Json | None) -> Markup | None:
    """Return what each operator of a phase costs, all layers together."""
    keys = ("flops", "elementwise", "weight_bytes", "read_bytes", "written_bytes")
    sums: dict[tuple[str, str], Counter[str]] = {}
    for operator in phase["operators"]:
        found = sums.setdefault((operator["sublayer"], operator["name"]), Counter())
        for key in keys:
            found[key] += operator[key]
    took = {} if timed is None else {(o["sublayer"], o["name"]): o["seconds"] for o in timed["operators"]}
    runs = f"{counted(phase['tokens'], 'token')} in {counted(phase['runs'], 'run')}"
    return table(
        f"Operators of {name}, {runs}",
        ("sublayer", "operator", "FLOPs", "elementwise", "weights", "read", "written", "FLOPs/byte", "time"),
        [
            (
                *operator,
                _count(found["flops"]),
                _count(found["elementwise"]),
                *(size(found[key]) for key in keys[2:]),
                _count(found["flops"] / (sum(found[key] for key in keys[2:]) or 1)),
                _seconds(took[operator]) if operator in took else None,
            )
            for operator, found in sums.items()
        ],
    )


def _count(value: float) -> Number:
    return Number(value, f"{value:.3g}")


def _seconds(seconds: float) -> Number:
    return Number(seconds, short_seconds(seconds))
