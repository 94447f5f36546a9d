"""The command that says what a model needs before anything is done with it: estimate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import api
from ..errors import counted
from ..html_report.figures import human_bytes, short_seconds
from .options import index_option, json_option
from .pages import check_page, report_option, write_page
from .parsing import CHECK, FORM, LOAD, MACHINE, PATH, REPORT, argument, command, option
from .tables import Block, Table, print_result

if TYPE_CHECKING:
    from ..estimation.estimate import Estimate, Times
    from ..estimation.operators import Phase
    from ..estimation.weights import Ranks

# Kinds of tensors that the table of replicated ones lists.
MAX_LISTED = 8

KV_CHOICES = ("published", "bf16", "f16", "q8_0", "f32")


@command("estimate", panel=CHECK, example="dsv4convert estimate config.json --context 128k --memory 128GiB")
@argument(
    "model",
    type=PATH,
    description="Checkpoint folder, .gguf file or folder of shards, local or by address, or a config.json alone.",
)
@option("--mp", type=click.IntRange(min=1), metavar="N", panel=FORM, help="Number of ranks that share the model.")
@option(
    "--o-proj-tp",
    type=click.IntRange(min=1),
    metavar="N",
    panel=FORM,
    help="Number of ranks that share attention's output projections, at most o_groups; by default all of them.",
)
@option("--experts", type=click.Choice(["fp4", "fp8"]), panel=FORM, help="Type of routed experts on the ranks of --mp.")
@option("--gguf", is_flag=True, panel=FORM, help="Estimate the checkpoint's GGUF, in the default types.")
@option("--recipe", metavar="NAME|FILE", panel=FORM, help="Estimate the checkpoint's GGUF, with a recipe of types.")
@option(
    "--draft",
    type=click.Choice(["keep", "drop"]),
    default="keep",
    panel=FORM,
    help="MTP layers or DSpark stages: count them or leave them out.",
)
@index_option
@option(
    "--context",
    metavar="TOKENS",
    panel=LOAD,
    help="Tokens of each sequence, e.g. 128k (k and M are powers of 1024); by default 128k or what the model allows.",
)
@option("--batch", type=click.IntRange(min=1), metavar="N", default=1, panel=LOAD, help="Sequences.")
@option(
    "--kv",
    type=click.Choice(KV_CHOICES),
    panel=LOAD,
    help="How caches are held: as published or in its BF16 buffers, llama.cpp's f16 or q8_0, or f32 as forward does; "
    "by default published, and f16 for a GGUF.",
)
@option(
    "--chunk",
    metavar="TOKENS",
    panel=LOAD,
    help="Tokens computed at once in prefill; by default 4096, and 512 for llama.cpp's caches.",
)
@option(
    "--routing",
    type=PATH,
    panel=LOAD,
    help="How often each expert was chosen: a JSON file of counts by layer, or an importance matrix in GGUF form.",
)
@option("--operators", "show_operators", is_flag=True, panel=REPORT, help="Print what every operator costs.")
@option(
    "--hardware",
    metavar="NAME|FILE",
    panel=MACHINE,
    help="Machine to run on, e.g. dgx-spark, h200 or a TOML file: gives times, and finds out which form fits.",
)
@option("--memory", metavar="SIZE", panel=MACHINE, help="Memory of one device, e.g. 128GiB or 80GB.")
@option("--plot", type=PATH, panel=REPORT, help="Draw memory by context, and time by batch, to this file (extra plot).")
@report_option
@option(
    "--overwrite",
    is_flag=True,
    panel=REPORT,
    help="Replace an existing picture of --plot, or an existing page of --report.",
)
@json_option
def estimate(
    model: Path, show_operators: bool, report: Path | None, overwrite: bool, as_json: bool, **options: Any
) -> None:
    """Say what a model weighs, what its caches take, and whether it fits, without reading a weight."""
    read = (options[name] for name in ("routing", "recipe", "hardware"))
    inputs = [model, *(Path(file) for file in read if file is not None)]
    replaced = check_page(report, overwrite=overwrite, inputs=inputs)
    found = api.estimate(model, overwrite=overwrite, **options)
    document = found.as_json()
    try:
        print_result(document, describe(found, show_operators), as_json=as_json)
    finally:
        write_page(report, "estimate", model, document, replaced)


def describe(found: Estimate, show_operators: bool = False) -> Iterator[Block]:
    """Yield an estimate as lines and tables."""
    from ..estimation.estimate import sums_by

    config = found.subject.config
    yield f"{found.path}: {found.kind} of DeepSeek-{config.version.value}, {counted(config.num_hidden_layers, 'layer')}"
    total = sum(part.nbytes for part in found.weights)
    elements = sum(part.elements for part in found.weights)
    yield f"weights, {found.form}: {total:,} bytes, {elements:,} elements"
    for by in ("family", "type"):
        rows = [
            (row[by], f"{row['tensors']:,}", human_bytes(row["bytes"]), f"{row['bytes'] / total:.1%}")
            for row in sums_by(found.weights, by)
        ]
        yield Table((by, "tensors", "size", "share"), rows, frozenset({1, 2, 3}))
    if found.ranks is not None:
        yield from _describe_ranks(found.ranks)
    if found.gguf is not None:
        for name, nbytes in found.gguf.files.items():
            yield f"file {name}: {nbytes:,} bytes"
    yield Table(
        ("GGUF by recipe", "size", "types"),
        [
            (
                size.recipe or "default",
                human_bytes(size.nbytes),
                ", ".join(f"{kind} {human_bytes(nbytes)}" for kind, nbytes in list(size.types.items())[:3]),
            )
            for size in found.recipes
        ],
        frozenset({1}),
    )
    caches = found.caches
    sequences = f"{counted(caches.batch, 'sequence')} of {counted(caches.context, 'token')}"
    yield f"caches, {caches.kv}: {sequences}, {caches.nbytes:,} bytes"
    yield Table(
        ("cache of one sequence", "size"),
        [(kind, human_bytes(nbytes)) for kind, nbytes in caches.kinds().items()],
        frozenset({1}),
    )
    by_sublayer: Counter[str] = Counter()
    for array in found.activations:
        by_sublayer[array.sublayer] += array.nbytes
    yield Table(
        (f"activations of {counted(found.chunk, 'token')}", "size"),
        [(sublayer, human_bytes(nbytes)) for sublayer, nbytes in by_sublayer.items()],
        frozenset({1}),
    )
    for phase in (found.prefill, found.decode, found.draft):
        if phase is not None:
            yield from _describe_phase(phase, show_operators)
    if found.times is not None:
        yield from _describe_times(found.times, show_operators)
    yield from _describe_options(found)
    yield from _describe_need(found)
    for note in found.notes:
        yield f"note: {note}"


def _describe_ranks(ranks: Ranks) -> Iterator[Block]:
    shared = f", output projections among {ranks.o_proj_tp}" if ranks.o_proj_tp != ranks.mp else ""
    yield f"{counted(ranks.mp, 'rank')}{shared}"
    yield Table(
        ("rank", "bytes", "size"),
        [(str(rank), f"{nbytes:,}", human_bytes(nbytes)) for rank, nbytes in enumerate(ranks.rank_bytes)],
        frozenset({0, 1, 2}),
    )
    yield Table(
        ("whole on every rank", "size"),
        [(kind, human_bytes(nbytes)) for kind, nbytes in list(ranks.replicated.items())[:MAX_LISTED]],
        frozenset({1}),
    )
    yield f"on every rank: {sum(ranks.replicated.values()):,} bytes"


def _describe_phase(phase: Phase, show_operators: bool) -> Iterator[Block]:
    """Yield what a phase costs, and with ``show_operators`` each of its operators, all layers together."""
    runs, tokens = counted(phase.runs, "run"), counted(phase.tokens, "token")
    yield (
        f"{phase.name}: {tokens} in {runs}, {phase.flops / phase.tokens:.3g} FLOPs a token, "
        f"{phase.experts_touched:.1f} experts a layer touched by a run"
    )
    if not show_operators:
        return
    yield Table(
        ("operator", "FLOPs", "elementwise", "weights", "read", "written", "FLOPs/byte"),
        [
            (
                f"{operator.sublayer}: {operator.name}",
                f"{operator.flops:.3g}",
                f"{operator.elementwise:.3g}",
                human_bytes(operator.weight_bytes),
                human_bytes(operator.read_bytes),
                human_bytes(operator.written_bytes),
                f"{operator.intensity:.3g}",
            )
            for operator in phase.summary()
        ],
        frozenset(range(1, 7)),
    )


def _describe_times(times: Times, show_operators: bool) -> Iterator[Block]:
    """Yield how fast the phases are, and what takes the time."""
    devices = f"{times.devices} devices of " if times.devices > 1 else ""
    yield f"on {devices}{times.hardware.name}: {times.hardware.description}"
    phases = [("prefill", times.prefill), ("decode", times.decode), ("draft", times.draft)]
    yield Table(
        ("phase", "tokens/s", "time", "compute", "memory", "decoding", "kernels", "communication"),
        [
            (
                name,
                f"{phase.tokens_per_second:.4g}",
                short_seconds(phase.seconds),
                *(
                    f"{part / phase.seconds:.0%}"
                    for part in (phase.compute, phase.memory, phase.decoding, phase.kernels, phase.communication)
                ),
            )
            for name, phase in phases
            if phase is not None
        ],
        frozenset(range(1, 8)),
    )
    if show_operators:
        yield Table(
            ("operator in decode", "time"),
            [(f"{sublayer}: {name}", short_seconds(took)) for (sublayer, name), took in times.decode.operators.items()],
            frozenset({1}),
        )


def _describe_options(found: Estimate) -> Iterator[Block]:
    """Yield which forms fit the machine, and the one that the estimate is about."""
    rows = []
    for form in found.options:
        need = form.need
        left = f"{human_bytes(abs(need.free or 0))} {'left' if need.fits else 'missing'}"
        longest = f"{need.longest_context:,}" if need.longest_context else "none"
        rows.append((form.name, human_bytes(need.total), left, longest))
    yield Table(("form", "each device", "against its memory", "longest context"), rows, frozenset({1, 2, 3}))
    if found.options:
        yield f"this estimate: {found.chosen.name}" if found.chosen is not None else "none of these forms fits"


def _describe_need(found: Estimate) -> Iterator[Block]:
    need = found.need
    rows = [
        ("weights", human_bytes(need.weights)),
        ("caches", human_bytes(need.caches)),
        ("activations", human_bytes(need.activations)),
        ("total", human_bytes(need.total)),
    ]
    if need.memory is not None and need.free is not None:
        rows += [
            ("memory", human_bytes(need.memory)),
            ("left" if need.fits else "missing", human_bytes(abs(need.free))),
        ]
    yield Table(("each device", "size"), rows, frozenset({1}))
    if need.memory is not None:
        yield "it fits" if need.fits else "it does NOT fit"
        longest = need.longest_context
        yield f"longest context that fits: {counted(longest, 'token')}" if longest else "no context fits"
