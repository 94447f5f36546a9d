"""The whole estimate: what is asked, what is answered, and how the answer reads as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.folder import BY_INDEX
from ..containers.sources import shown
from ..engine.names import Identity
from ..errors import UsageError, check_choice, counted
from ..inspection.naming import SHOWN_KEYS
from ..model.cache_bytes import DEFAULT_CONTEXT, KV_TYPES
from ..model.config import ModelConfig
from ..targets.gguf_tensors import GgufOptions
from .fit import Option, choice, options, without_draft
from .hardware import Hardware, load_hardware
from .memory import Activation, Caches, Load, Need, activations, caches, default_ubatch, need, peak_bytes
from .operators import UNIFORM, Costs, Phase, Routing, Steps, decode_steps, prefill_steps
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
        phases = {"prefill": self.prefill, "decode": self.decode, "draft": self.draft}
        said = {name: None if phase is None else phase.as_json() for name, phase in phases.items()}
        return {"hardware": self.hardware.as_json(), "devices": self.devices, **said}


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
                "families": sums_by(self.weights, "family"),
                "types": sums_by(self.weights, "type"),
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
                "parts": [{"sublayer": a.sublayer, "name": a.name, "bytes": a.nbytes} for a in self.activations],
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


def sums_by(parts: Iterable[Part], by: str) -> list[dict[str, Any]]:
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
    hardware = None if q.hardware is None else load_hardware(q.hardware)
    recipes = tuple(recipe_sizes(subject.checkpoint)) if subject.checkpoint is not None else ()
    tried: tuple[Option, ...] = ()
    chosen: Option | None = None
    if hardware is not None:
        q = replace(q, memory=q.memory or hardware.usable_memory)
        tried = _tried(q, subject, recipes)
        chosen = choice(tried, hardware)
        q = q if chosen is None else _of_choice(q, chosen)
    form = _form(q, subject)
    run = _run(q, subject, form)
    phases = run.phases(subject)
    machine = None if hardware is None else Machine(hardware, form.mp, form.o_proj_tp, form.is_gguf)
    times = None if machine is None else _times(phases, run.config, machine)
    if q.plot is not None:
        _plot(q, run, machine, replaced)
    config, load = run.config, run.load
    return Estimate(
        shown(path),
        subject.kind,
        form.name,
        subject,
        form.parts,
        form.ranks,
        form.gguf,
        recipes,
        caches(config, run.context, load.batch, load.kv, n_draft=load.n_draft, ubatch=load.ubatch),
        activations(config, run.step_tokens, run.context, load.batch, load.mp),
        run.step_tokens,
        need(config, form.device_bytes, run.context, load, q.memory),
        *phases,
        times,
        tried,
        chosen,
        (*subject.notes, *(form.gguf.notes if form.gguf is not None else ())),
    )


@dataclass(frozen=True)
class Form:
    """The weights that run: as they are stored, as a GGUF, or divided among ranks; ``n_draft`` draft layers of them."""

    name: str
    parts: tuple[Part, ...]
    n_draft: int
    is_gguf: bool
    ranks: Ranks | None
    gguf: GgufSize | None

    @property
    def mp(self) -> int:
        """Return the number of ranks."""
        return 1 if self.ranks is None else self.ranks.mp

    @property
    def o_proj_tp(self) -> int:
        """Return how many of them share the output projections."""
        return 1 if self.ranks is None else self.ranks.o_proj_tp

    @property
    def device_bytes(self) -> int:
        """Return the bytes of the weights on one device, the one that holds most."""
        return sum(part.nbytes for part in self.parts) if self.ranks is None else max(self.ranks.rank_bytes)


def _form(question: Question, subject: Subject) -> Form:
    """Return the form that was asked for.

    Raises:
        UsageError, Dsv4Error: the model cannot take it.
    """
    q, ranks, gguf = question, None, None
    name, parts, n_draft = AS_STORED, subject.parts, subject.n_draft
    if subject.mp is not None:
        name, ranks = AS_SHARDS, ranks_of_shards(subject)
    elif q.mp is not None:
        name = AS_SHARDS
        ranks = divided(needs_checkpoint(subject, "--mp"), q.mp, q.o_proj_tp, experts=q.experts, draft=q.draft)
    if q.gguf or q.recipe is not None:
        gguf = gguf_size(subject, GgufOptions(recipe=q.recipe))
        name, parts, n_draft = AS_GGUF, gguf.parts, 0  # the text model's file has no draft
    if q.draft == "drop":
        parts, n_draft = tuple(part for part in parts if not part.is_draft), 0
    return Form(name, parts, n_draft, gguf is not None or subject.kind == GGUF, ranks, gguf)


class Run(NamedTuple):
    """What is computed: the weights of a form for sequences of ``context`` tokens, routed as ``routing`` says."""

    config: ModelConfig
    form: Form
    context: int
    load: Load
    routing: Routing

    @property
    def step_tokens(self) -> int:
        """Return the tokens that the largest step of prefill computes."""
        return min(self.load.ubatch, self.load.batch * self.context)

    def costs(self, steps: Steps) -> Costs:
        """Return what steps cost."""
        return Costs(self.config, self.form.parts, steps, self.load.kv, self.routing)

    def phases(self, subject: Subject) -> tuple[Phase, Phase, Phase | None]:
        """Return prefill of the whole context, the decoding of its last token, and one draft, None without any."""
        prefill = self.costs(prefill_steps(self.context, self.load.batch, self.load.ubatch))
        decode = self.costs(decode_steps(self.context, self.load.batch))
        n_draft = self.form.n_draft
        draft = decode.draft_phase(subject.draft, n_draft) if n_draft else None
        return prefill.phase("prefill"), decode.phase("decode"), draft


def _context(question: Question, config: ModelConfig) -> int:
    return question.context or min(DEFAULT_CONTEXT, config.max_position_embeddings)


def _run(question: Question, subject: Subject, form: Form) -> Run:
    """Return what is computed, with a default for what was not said."""
    q, config = question, subject.config
    kv = q.kv or ("f16" if form.is_gguf else "published")
    load = Load(q.batch, kv, form.mp, form.n_draft, q.chunk or default_ubatch(kv))
    routing = UNIFORM if q.routing is None else read_routing(q.routing, config)
    return Run(config, form, _context(q, config), load, routing)


def _times(phases: tuple[Phase, Phase, Phase | None], config: ModelConfig, machine: Machine) -> Times:
    prefill, decode, draft = phases
    drafted = None if draft is None else timed(draft, config, machine)
    return Times(machine.hardware, machine.mp, timed(prefill, config, machine), timed(decode, config, machine), drafted)


def _tried(question: Question, subject: Subject, recipes: tuple[GgufSize, ...]) -> tuple[Option, ...]:
    """Return the forms that are tried on the question's memory: none where one was asked for."""
    q = question
    if subject.checkpoint is None or q.mp is not None or q.gguf or q.recipe is not None:
        return ()
    kept = subject.n_draft if q.draft == "keep" else 0
    checkpoint = subject.checkpoint if kept else without_draft(subject.checkpoint)
    return options(checkpoint, recipes, q.memory or 0, _context(q, subject.config), q.batch, kept)


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


def _plot(question: Question, run: Run, machine: Machine | None, replaced: Identity | None) -> None:
    """Write the picture that was asked for: memory by context, and on a machine the time of decoding by batch."""
    from .plot import MemoryPoint, TimePoint, plot_estimate

    config, load = run.config, run.load
    most = config.max_position_embeddings
    memory = []
    for context in [2**power for power in range(10, 31) if 2**power < most] + [most]:
        held = need(config, run.form.device_bytes, context, load)
        memory.append(MemoryPoint(context, held.weights, held.caches, held.activations))
    times = []
    if machine is not None:
        for batch in PLOTTED_BATCHES:
            took = timed(run.costs(decode_steps(run.context, batch)).phase("decode"), config, machine)
            times.append(TimePoint(batch, took.seconds, took.tokens_per_second))
    title = f"DeepSeek-{config.version.value}, {counted(config.num_hidden_layers, 'layer')}, caches {load.kv}"
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
