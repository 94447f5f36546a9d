"""Published measurements, and what the estimate says of each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv4convert.estimation.hardware import load_hardware
from dsv4convert.estimation.operators import Costs, Steps, decode_steps, prefill_steps
from dsv4convert.estimation.subject import Part, Subject, open_subject
from dsv4convert.estimation.timing import Machine, timed
from dsv4convert.estimation.weights import recipe_sizes

ROOT = Path(__file__).resolve().parents[2]


class Compared(NamedTuple):
    """A measurement of tokens a second and its estimate; ``sets``: what of the machine's data it was used for."""

    machine: str
    what: str
    phase: str
    measured: float
    estimated: float
    sets: str | None
    source: str

    @property
    def error(self) -> float:
        return self.estimated / self.measured - 1


@cache
def _model(name: str, recipe: str | None) -> tuple[Subject, tuple[Part, ...]]:
    subject = open_subject(ROOT / "dsv4convert" / "model" / "configs" / f"{name}.json")
    if recipe is None:
        return subject, tuple(part for part in subject.parts if not part.is_draft)
    assert subject.checkpoint is not None
    (size,) = (size for size in recipe_sizes(subject.checkpoint) if size.recipe == recipe)
    return subject, size.parts


def compared() -> Iterator[Compared]:
    """Yield every published measurement with its estimate."""
    for point in json.loads((ROOT / "fixtures" / "published_speeds.json").read_text(encoding="utf-8")):
        yield from _compared(point)


def _compared(point: dict[str, Any]) -> Iterator[Compared]:
    subject, parts = _model(point["model"], point["recipe"])
    config, kv = subject.config, "f16" if point["recipe"] else "published"
    hardware = replace(load_hardware(point["machine"]), **point["overrides"])
    machine = Machine(hardware, point["mp"], min(point["mp"], config.o_groups), point["recipe"] is not None)
    context, chunk = point["context"], point["chunk"]
    ranks = f"{point['mp']} x " if point["mp"] > 1 else ""
    what = f"{point['model']} {point['recipe'] or 'as published'}, {context:,} tokens"
    name = f"{ranks}{point['machine']}" + (f" ({point['note']})" if "note" in point else "")

    def seconds(steps: Steps) -> float:
        return timed(Costs(config, parts, steps, kv).phase("any"), config, machine).seconds

    if point["prefill"] is not None:
        # The last tokens of the context, as a sweep measures prefill that goes on.
        steps = Steps(*(np.array([n]) for n in (context - chunk, chunk, 1, 1, 1)))
        yield Compared(name, what, "prefill", point["prefill"], chunk / seconds(steps), point["sets"], point["source"])
    if point["decode"] is None:
        return
    batch = 1
    step = seconds(decode_steps(context, batch))
    if "serving" in point:
        batch, given, made = point["serving"]
        # While a request makes its tokens, the prompts of all are computed once.
        step = seconds(decode_steps(context, batch)) + batch * seconds(prefill_steps(given, 1, chunk)) / made
    decode_sets = point["sets"] if point["prefill"] is None else None
    yield Compared(name, what, "decode", point["decode"], batch / step, decode_sets, point["source"])


def table() -> list[str]:
    """Return the table of all comparisons as Markdown."""
    rows = ["| machine | model | phase | measured | estimated | error | source |", "|---|---|---|---:|---:|---:|---|"]
    for row in compared():
        figures = f"{row.measured:.4g} | {row.estimated:.3g} | {round(100 * row.error):+d} %"
        used = f" (sets `{row.sets}`)" if row.sets else ""
        rows.append(f"| {row.machine} | {row.what} | {row.phase} | {figures}{used} | {row.source} |")
    return rows


if __name__ == "__main__":
    print("\n".join(table()))  # noqa: T201
