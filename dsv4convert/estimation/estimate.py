"""The whole estimate: what is asked, what is answered, and how the answer reads as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.folder import BY_INDEX
from ..containers.sources import shown
from ..engine.names import Identity
from ..errors import UsageError, check_choice
from ..inspection.naming import SHOWN_KEYS
from ..model.cache_bytes import DEFAULT_CONTEXT, KV_TYPES
from ..targets.gguf_tensors import GgufOptions
from .fit import Option, choice, options, without_draft
from .hardware import Hardware, load_hardware
from .memory import Activation, Caches, Load, Need, activations, caches, default_ubatch, need, peak_bytes
from .operators import UNIFORM, Costs, Phase, Routing, decode_steps, prefill_steps
from .routing import read_routing
from .subject import GGUF, Part, Subject, open_subject
from .timing import Machine, Timed, timed
from .weights import GgufSize, Ranks, divided, gguf_size, needs_checkpoint, ranks_of_shards, recipe_sizes

DRAFT_MODES = ("keep", "drop")
MAX_BATCH = 1_000_000
MAX_CHUNK = 2**24
PLOTTED_BATCHES = tuple(2**power for power in range(9))

AS_STORED, AS_GGUF, AS_SHARDS = "as stored", "GGUF", "shards"


@dataclass(frozen=True)
class Question:
    """What to estimate; None takes the default.

    ``mp`` ranks share the model, ``o_proj_tp`` of them the output projections. ``gguf`` and ``recipe`` ask for the
    GGUF of a checkpoint, ``experts`` for experts of another type on the ranks. ``context`` tokens a sequence of
    ``batch``, held as ``kv`` says; ``chunk`` are the tokens computed at once in prefill. ``memory`` is that of one
    device in bytes, ``routing`` a file of how often each expert was chosen. ``hardware`` is a machine's name or
    file: without a form that is asked for, the one that fits it is chosen. ``plot`` is a picture to write, with
    ``overwrite`` in place of an older one.
    """

    context: int | None = None
    batch: int = 1
    kv: str | None = None
    mp: int | None = None
    o_proj_tp: int | None = None
    experts: str | None = None
    gguf: bool = False
    recipe: str | None = None
    draft: str = "keep"
    chunk: int | None = None
    memory: int | None = None
    routing: Path | None = None
    hardware: str | None = None
    plot: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Times:
    """How long the phases take on a machine of ``devices``; ``draft`` None without one."""

    hardware: Hardware
    devices: int
    prefill: Timed
    decode: Timed
    draft: Timed | None

    def as_json(self) -> dict[str, Any]:
        """Return the times as plain JSON values."""
        return {
            "hardware": self.hardware.as_json(),
            "devices": self.devices,
            "prefill": self.prefill.as_json(),
            "decode": self.decode.as_json(),
            "draft": None if self.draft is None else self.draft.as_json(),
        }


@dataclass(frozen=True)
class Estimate:
    """The answer; ``weights`` are those that run, in the form asked for. ``ranks`` and ``gguf`` None: not asked.

    ``times`` None without a machine; ``options`` are the forms that were tried on it, of which ``chosen`` fits.
    """

    path: str
    kind: str
    form: str
    subject: Subject
    weights: tuple[Part, ...]
    ranks: Ranks | None
    gguf: GgufSize | None
    recipes: tuple[GgufSize, ...]
    caches: Caches
    activations: tuple[Activation, ...]
    chunk: int
    need: Need
    prefill: Phase
    decode: Phase
    draft: Phase | None
    times: Times | None
    options: tuple[Option, ...]
    chosen: Option | None
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the estimate as plain JSON values (schemas/estimate.schema.json)."""
        config = self.subject.config
        return {
            "path": self.path,
            "kind": self.kind,
            "form": self.form,
            "version": config.version.value,
            "config": {key: getattr(config, key) for key in SHOWN_KEYS},
            "draft_layers": self.subject.n_draft,
            "weights": {
                "bytes": sum(part.nbytes for part in self.weights),
                "elements": sum(part.elements for part in self.weights),
                "families": counted(self.weights, "family"),
                "types": counted(self.weights, "type"),
                "files": dict(self.subject.files),
                "parts": [part.as_json() for part in self.weights],
            },
            "ranks": None if self.ranks is None else self.ranks.as_json(),
            "gguf": None if self.gguf is None else self.gguf.as_json(),
            "recipes": [size.as_json() for size in self.recipes],
            "caches": self.caches.as_json(),
            "activations": {
                "tokens": self.chunk,
                "bytes": peak_bytes(self.activations),
                "parts": [
                    {"sublayer": array.sublayer, "name": array.name, "bytes": array.nbytes}
                    for array in self.activations
                ],
            },
            "device": self.need.as_json(),
            "prefill": self.prefill.as_json(),
            "decode": self.decode.as_json(),
            "draft": None if self.draft is None else self.draft.as_json(),
            "times": None if self.times is None else self.times.as_json(),
            "options": [option.as_json() for option in self.options],
            "chosen": None if self.chosen is None else self.chosen.name,
            "notes": list(self.notes),
        }


def counted(parts: Iterable[Part], by: str) -> list[dict[str, Any]]:
    """Return tensors, elements and bytes of parts by ``family`` or ``type``, the most bytes first."""
    found: dict[str, list[int]] = {}
    for part in parts:
        sums = found.setdefault(getattr(part, by), [0, 0, 0])
        for place, value in enumerate((part.tensors, part.elements, part.nbytes)):
            sums[place] += value
    largest = sorted(found.items(), key=lambda item: -item[1][2])
    return [{by: key, "tensors": n, "elements": elements, "bytes": nbytes} for key, (n, elements, nbytes) in largest]


def estimate_path(path: Path, question: Question, *, index: str = BY_INDEX) -> Estimate:
    """Estimate what there is at ``path``: a checkpoint folder, a GGUF, shards or a config.json.

    Raises:
        UsageError: questions that do not go together, or ranks that cannot share the model.
        OutputExistsError: there is a picture already, which is not to be replaced.
        Dsv4Error: what is there cannot be read.
    """
    replaced = _check_plot(path, question)
    subject = open_subject(path, index=index, draft_wanted=question.draft != "drop")
    q = _checked(question, subject)
    context = q.context or min(DEFAULT_CONTEXT, subject.config.max_position_embeddings)
    hardware = None if q.hardware is None else load_hardware(q.hardware)
    recipes = tuple(recipe_sizes(subject.checkpoint)) if subject.checkpoint is not None else ()
    tried: tuple[Option, ...] = ()
    chosen: Option | None = None
    if hardware is not None:
        q = replace(q, memory=q.memory or hardware.usable_memory)
        if subject.checkpoint is not None and q.mp is None and not q.gguf and q.recipe is None:
            kept = subject.n_draft if q.draft == "keep" else 0
            checkpoint = subject.checkpoint if kept else without_draft(subject.checkpoint)
            tried = options(checkpoint, recipes, q.memory or 0, context, q.batch, kept)
            chosen = choice(tried, hardware)
            q = q if chosen is None else _of_choice(q, chosen)
    ranks: Ranks | None = None
    gguf: GgufSize | None = None
    form = AS_STORED
    parts = subject.parts
    n_draft = subject.n_draft
    if q.mp is not None and subject.mp is None:
        ranks = divided(needs_checkpoint(subject, "--mp"), q.mp, q.o_proj_tp, experts=q.experts, draft=q.draft)
        form = AS_SHARDS
    elif subject.mp is not None:
        ranks, form = ranks_of_shards(subject), AS_SHARDS
    if q.gguf or q.recipe is not None:
        gguf = gguf_size(subject, GgufOptions(recipe=q.recipe))
        form, parts, n_draft = AS_GGUF, gguf.parts, 0  # the text model's file has no draft
    if q.draft == "drop":
        parts, n_draft = tuple(part for part in parts if not part.is_draft), 0
    kv = q.kv or ("f16" if form == AS_GGUF or subject.kind == GGUF else "published")
    mp = ranks.mp if ranks is not None else 1
    load = Load(q.batch, kv, mp, n_draft, q.chunk or default_ubatch(kv))
    tokens = min(load.ubatch, q.batch * context)
    weights = max(ranks.rank_bytes) if ranks is not None else sum(part.nbytes for part in parts)
    routing = UNIFORM if q.routing is None else read_routing(q.routing, subject.config)
    prefill = Costs(subject.config, parts, prefill_steps(context, q.batch, load.ubatch), kv, routing)
    decode = Costs(subject.config, parts, decode_steps(context, q.batch), kv, routing)
    phases = prefill.phase("prefill"), decode.phase("decode")
    drafting = decode.draft_phase(subject.draft, n_draft) if n_draft else None
    times = None
    if hardware is not None:
        output = mp if ranks is None else ranks.o_proj_tp
        machine = Machine(hardware, mp, output, form == AS_GGUF or subject.kind == GGUF)
        times = Times(
            hardware,
            mp,
            timed(phases[0], subject.config, machine),
            timed(phases[1], subject.config, machine),
            None if drafting is None else timed(drafting, subject.config, machine),
        )
        if q.plot is not None:
            _plot(q, subject, parts, weights, load, routing, machine, replaced)
    elif q.plot is not None:
        _plot(q, subject, parts, weights, load, routing, None, replaced)
    notes = [*subject.notes, *(gguf.notes if gguf is not None else ())]
    return Estimate(
        shown(path),
        subject.kind,
        form,
        subject,
        parts,
        ranks,
        gguf,
        recipes,
        caches(subject.config, context, q.batch, kv, n_draft=n_draft, ubatch=load.ubatch),
        activations(subject.config, tokens, context, q.batch, mp),
        tokens,
        need(subject.config, weights, context, load, q.memory),
        *phases,
        drafting,
        times,
        tried,
        chosen,
        tuple(notes),
    )


def _of_choice(question: Question, chosen: Option) -> Question:
    """Return the question about the form that was chosen."""
    if chosen.is_gguf:
        return replace(question, gguf=chosen.recipe is None, recipe=chosen.recipe, kv=question.kv)
    shared = None if chosen.o_proj_tp == chosen.mp else chosen.o_proj_tp
    return question if chosen.mp == 1 else replace(question, mp=chosen.mp, o_proj_tp=shared)


def _check_plot(path: Path, question: Question) -> Identity | None:
    """Return what the picture replaces, where one is asked for; none of the files that are read is replaced."""
    if question.plot is None:
        return None
    from ..reference.plot import check_picture

    files = (question.routing, question.hardware, question.recipe)
    inputs = (path, *(Path(file) for file in files if file is not None))
    return check_picture(question.plot, inputs, overwrite=question.overwrite)


def _plot(
    question: Question,
    subject: Subject,
    parts: tuple[Part, ...],
    weights: int,
    load: Load,
    routing: Routing,
    machine: Machine | None,
    replaced: Identity | None,
) -> None:
    """Write the picture that was asked for: memory by context, and on a machine the time of decoding by batch."""
    from .plot import MemoryPoint, TimePoint, plot_estimate

    config = subject.config
    most = config.max_position_embeddings
    contexts = [2**power for power in range(10, 31) if 2**power < most] + [most]
    memory = []
    for context in contexts:
        held = need(config, weights, context, load)
        memory.append(MemoryPoint(context, held.weights, held.caches, held.activations))
    times = []
    if machine is not None:
        context = question.context or min(DEFAULT_CONTEXT, most)
        for batch in PLOTTED_BATCHES:
            phase = Costs(config, parts, decode_steps(context, batch), load.kv, routing).phase("decode")
            took = timed(phase, config, machine)
            times.append(TimePoint(batch, took.seconds, took.tokens_per_second))
    title = f"DeepSeek-{config.version.value}, {config.num_hidden_layers} layers, caches {load.kv}"
    if question.plot is not None:
        plot_estimate(memory, times, question.memory, title, question.plot, replaced)


def _checked(question: Question, subject: Subject) -> Question:
    """Return the question if it can be asked of the model.

    Raises:
        UsageError: it cannot.
    """
    q, config = question, subject.config
    check_choice("--draft", q.draft, DRAFT_MODES)
    if q.kv is not None:
        check_choice("--kv", q.kv, KV_TYPES)
    for option, value, most in (
        ("--context", q.context, config.max_position_embeddings),
        ("--batch", q.batch, MAX_BATCH),
        ("--chunk", q.chunk, MAX_CHUNK),
    ):
        if value is not None and not 1 <= value <= most:
            raise UsageError(f"{option}: out of range", where=subject.path, expected=f"1 to {most}", got=value)
    if q.mp is None:
        for option, is_given in (("--o-proj-tp", q.o_proj_tp is not None), ("--experts", q.experts is not None)):
            if is_given:
                raise UsageError(f"{option} needs --mp", hint="it says how the model is divided among ranks")
    elif q.mp < 1:
        raise UsageError("--mp: not a number of ranks", expected="1 or more", got=q.mp)
    if q.mp is not None and (q.gguf or q.recipe is not None):
        raise UsageError("--mp cannot be combined with a GGUF", hint="ask for shards or for a GGUF")
    if q.mp is not None and subject.mp is not None and (q.mp != subject.mp or q.o_proj_tp or q.experts):
        raise UsageError("the model is already divided", where=subject.path, expected=f"--mp {subject.mp}", got=q.mp)
    return q
