"""What the estimate says of published measurements, and of llama.cpp on this machine.

    python benchmarks/estimate_times.py --save benchmarks/results/estimate_times.json
    python benchmarks/estimate_times.py --table
    python benchmarks/estimate_times.py --own --save benchmarks/results/estimate_times_own.json

The published measurements are those of ``fixtures/published_speeds.json``; ``--table`` prints the table that stands in
``docs/estimate.md``, with the errors of an earlier record beside those of now.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from side_by_side import circumstances, save

from dsv4convert.estimation.hardware import load_hardware
from dsv4convert.estimation.operators import Costs, Steps, decode_steps, prefill_steps
from dsv4convert.estimation.subject import Part, Subject, open_subject
from dsv4convert.estimation.timing import Machine, timed
from dsv4convert.estimation.weights import recipe_sizes

ROOT = Path(__file__).resolve().parents[1]
BEFORE = ROOT / "benchmarks" / "results" / "estimate_times_two_roofs.json"


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
        """Return the estimate's error, as a share of the measurement."""
        return self.estimated / self.measured - 1


@cache
def model(name: str, recipe: str | None) -> tuple[Subject, tuple[Part, ...]]:
    """Return a published model and its weights, as they are stored or as a recipe's GGUF has them."""
    subject = open_subject(ROOT / "dsv4convert" / "model" / "configs" / f"{name}.json")
    if recipe is None:
        return subject, tuple(part for part in subject.parts if not part.is_draft)
    assert subject.checkpoint is not None
    (size,) = (size for size in recipe_sizes(subject.checkpoint) if size.recipe == recipe)
    return subject, size.parts


def published() -> Iterator[Compared]:
    """Yield every published measurement with its estimate."""
    for point in json.loads((ROOT / "fixtures" / "published_speeds.json").read_text(encoding="utf-8")):
        yield from _compared(point)


def _compared(point: dict[str, Any]) -> Iterator[Compared]:
    subject, parts = model(point["model"], point["recipe"])
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
        # The whole prompt, or its last tokens alone, as a sweep measures prefill that goes on.
        whole = point.get("whole", False)
        steps = Steps(*(np.array([n]) for n in (context - chunk, chunk, 1, 1, 1)))
        took = seconds(prefill_steps(context, 1, chunk) if whole else steps)
        estimated = (context if whole else chunk) / took
        yield Compared(name, what, "prefill", point["prefill"], estimated, _sets(point, "prefill"), point["source"])
    if point["decode"] is None:
        return
    batch = 1
    step = seconds(decode_steps(context, batch))
    if "serving" in point:
        batch, given, made = point["serving"]
        # While a request makes its tokens, the prompts of all are computed once.
        step = seconds(decode_steps(context, batch)) + batch * seconds(prefill_steps(given, 1, chunk)) / made
    yield Compared(name, what, "decode", point["decode"], batch / step, _sets(point, "decode"), point["source"])


def _sets(point: dict[str, Any], phase: str) -> str | None:
    """Return what a measurement sets: FLOPs are set by prefill, kernels by decoding."""
    sets: str | None = point["sets"]
    return sets if sets is not None and (sets == "flops_share") == (phase == "prefill") else None


def table() -> list[str]:
    """Return the table of all comparisons as Markdown, with the errors of the record ``BEFORE``."""
    before = {tuple(row[:4]): row[4] for row in json.loads(BEFORE.read_text(encoding="utf-8"))["rows"]}
    rows = [
        "| machine | model | phase | measured | estimated | error | before | source |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for row in published():
        figures = f"{row.measured:.4g} | {row.estimated:.3g} | {_percent(row.error)}"
        used = f" (sets `{row.sets}`)" if row.sets else ""
        was = before.get((row.machine, row.what, row.phase, row.measured))
        earlier = "" if was is None else _percent(was / row.measured - 1)
        rows.append(f"| {row.machine} | {row.what} | {row.phase} | {figures}{used} | {earlier} | {row.source} |")
    return rows


def _percent(share: float) -> str:
    return f"{round(100 * share):+d} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the published measurements as a Markdown table")
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    if args.table:
        print("\n".join(table()))
        return
    rows = list(published())
    for row in rows:
        print(f"{_percent(row.error):>7}  {row.phase:7} {row.machine}: {row.what}")
    if args.save is not None:
        save({**circumstances(), "rows": [list(row) for row in rows]}, args.save)


if __name__ == "__main__":
    main()
