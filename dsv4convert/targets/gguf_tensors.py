"""The GGUF layout: which tensors a file for llama.cpp holds, in which types, at which offsets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from ..checkpoint.folder import Checkpoint
from ..checkpoint.weights import Encoding, Weight
from ..containers.gguf import DEFAULT_ALIGNMENT as ALIGNMENT
from ..containers.gguf import SPLIT_NAME
from ..containers.gguf_write import I32 as GGUF_I32
from ..containers.gguf_write import U16 as GGUF_U16
from ..containers.gguf_write import KeyValue, TensorInfo, gguf_header
from ..errors import UnsupportedError, UsageError, check_choice, counted, either
from ..formats.ggml_types import BY_NAME as ELEMENT_TYPES
from ..model.config import ModelConfig, Version
from ..model.gguf_keys import DRAFT, LLAMA_CPP, LLAMA_CPP_V41, PORT
from ..model.tensors import LEFT_OUT_REASONS, Draft, Row, Store, When, gguf_name, is_vision_name
from ..plan import (
    LOW_BIT,
    Beside,
    Constant,
    Dropped,
    OutputFile,
    OutputTensor,
    Segment,
    align_up,
    at_offset,
    place,
    total_bytes,
)
from . import ds4, ds4_v41
from .claims import Claims
from .drafts import DROP, KEEP, ONLY, SPLIT
from .engram_tables import ENGRAM_TYPES, ROW264, table_tensors
from .gguf_metadata import ParameterCounts, count_parameters
from .gguf_types import Fallback, TypeChoice, TypeOptions, check_rules_used
from .low_bit import LowBitMaker
from .nvfp4_segments import moved_segments, second_scales
from .recipes import OUTPUT_TYPES, TYPE_KEYS, Recipe, load_recipe, tensor_type_rules
from .segments import (
    BF16,
    F16,
    F32,
    MXFP4,
    Q8_0,
    TARGETS,
    ElementType,
    codec_segment,
    convert_segments,
    matrix_shape,
    row_operation,
    stack_segments,
)

# The row whose output rows are grouped, [G * o_lora, heads * d / G].
WO_A_SHAPE = ("G*o_lora", "Hd/G")

# The row that becomes a convolution [width, channels, side, side], always F32.
PATCH_SHAPE = ("vd", "3pp")
IMAGE_CHANNELS = 3
MATRIX_DIMENSIONS = 2

# Where importance comes from when there is no matrix of it.
WEIGHTS = "weights"
IMPORTANCE_MODES = (WEIGHTS,)

# What an MTP file takes from the trunk.
SHARED_WITH_MTP = ("embed.weight", "norm.weight", "head.weight")

ALIGNMENT_KEY = "general.alignment"


@dataclass(frozen=True)
class TensorDialect:
    """How one family of readers wants the file: names, architecture, types and what becomes of MTP.

    ``default_dense`` and ``default_experts`` give the output type by the source's encoding, ``type_of`` that of
    tensors whose name decides, ``allowed`` those that a tensor may have (any, where there are none), and ``engram``
    that of n-gram tables. ``text_only``: drafts and vision towers have layouts of their own, which are not written.
    """

    name: str
    architecture: str
    name_of: Callable[[Row], str | None]
    default_dense: Mapping[Encoding, ElementType]
    default_experts: Mapping[Encoding, ElementType]
    mtp_inline: bool
    grouped_wo_a: bool
    type_of: Callable[[str], str | None] = lambda name: None
    allowed: Callable[[str], tuple[str, ...]] = lambda name: ()
    alignment: int = ALIGNMENT
    engram: str = "q8_0"
    text_only: bool = False


DS4 = "ds4"

NVFP4 = "nvfp4"
SECOND_SUFFIX = ".scale"
IGNORED_SECOND = (
    "NVFP4 experts have their second scales in tensors *.scale, which llama.cpp (as of llama-cpp-python 0.3.36) reads "
    "for these models and does not multiply by, so that its results are wrong; --experts q8_0 or mxfp4 needs none"
)

_QUANTISED = (Encoding.FP4, Encoding.NVFP4, Encoding.INT4, Encoding.FP8)
_PLAIN_TYPES = {Encoding.BF16: BF16, Encoding.F16: F16, Encoding.F32: F32}
_Q8_0_TYPES = {**_PLAIN_TYPES, **dict.fromkeys(_QUANTISED, Q8_0)}
DIALECTS = {
    "llama.cpp": TensorDialect(
        name="llama.cpp",
        architecture=LLAMA_CPP,
        name_of=lambda row: row.gguf,
        default_dense=_Q8_0_TYPES,
        default_experts={**_Q8_0_TYPES, Encoding.FP4: MXFP4, Encoding.NVFP4: ELEMENT_TYPES[NVFP4]},
        mtp_inline=False,
        grouped_wo_a=False,
    ),
    "deepseek-v4": TensorDialect(
        name="deepseek-v4",
        architecture=PORT,
        name_of=lambda row: row.port,
        default_dense={**_PLAIN_TYPES, **dict.fromkeys(_QUANTISED, BF16)},
        default_experts={**_PLAIN_TYPES, **dict.fromkeys(_QUANTISED, BF16)},
        mtp_inline=True,
        grouped_wo_a=True,
    ),
}
DIALECTS[DS4] = replace(
    DIALECTS["llama.cpp"],
    name=DS4,
    default_dense=dict.fromkeys(DIALECTS["llama.cpp"].default_dense, Q8_0),
    type_of=ds4.V4.type_of,
    allowed=ds4.V4.allowed,
    text_only=True,
)

DIALECTS_V41 = {
    "llama.cpp": replace(DIALECTS["llama.cpp"], architecture=LLAMA_CPP_V41),
    DS4: replace(
        DIALECTS[DS4],
        architecture=ds4_v41.ARCHITECTURE,
        name_of=lambda row: None if row.gguf is None else ds4_v41.NAMES.get(row.gguf, row.gguf),
        type_of=ds4.V41.type_of,
        allowed=ds4.V41.allowed,
        alignment=ds4_v41.ALIGNMENT,
        engram=ROW264,
    ),
}


def tensor_dialect(config: ModelConfig, name: str) -> TensorDialect:
    """Return the dialect ``name`` for models of the config's version.

    Raises:
        UsageError: no reader of that dialect knows the version.
    """
    known = DIALECTS_V41 if config.version is Version.V41 else DIALECTS
    if name not in known:
        raise UsageError(f"--dialect {name} is not for DeepSeek-{config.version.value}", expected=either(known))
    return known[name]


# DSpark's draft stages in llama.cpp's own architecture for such drafts, whose routers know no images.
DFLASH = replace(
    DIALECTS["llama.cpp"],
    name="dflash",
    architecture=DRAFT,
    name_of=lambda row: None if row.when is When.VISION else row.gguf,
)


@dataclass(frozen=True)
class GgufOptions:
    """The choices that decide a GGUF's bytes; None takes the dialect's default.

    ``draft`` (drop, only, split, keep) is for MTP layers and DSpark stages, ``mmproj`` (drop, only,
    split) for the vision tower. ``dense``, ``experts``, ``output`` and ``embedding`` are element types, ``recipe`` is
    a recipe's name or file, ``tensor_types`` are "REGEX=TYPE" and the last match wins; ``pure`` gives ``dense`` to all
    that may be quantised. ``imatrix`` is the file of an importance matrix, ``importance`` "weights" the fallback, and
    ``ggml_lib`` the library that makes low-bit types. ``engram`` is how the n-gram tables are
    stored, ``engram_last`` whether they come behind all other tensors. ``no_tensor_first_split`` leaves the first file
    of a split model to the metadata.
    """

    dense: str | None = None
    experts: str | None = None
    draft: str | None = None
    mmproj: str | None = None
    layers: tuple[int, int] | None = None
    dialect: str = "llama.cpp"
    split_max_bytes: int | None = None
    split_max_tensors: int | None = None
    no_tensor_first_split: bool = False
    engram: str | None = None
    engram_last: bool = False
    output: str | None = None
    embedding: str | None = None
    pure: bool = False
    recipe: str | None = None
    tensor_types: tuple[str, ...] = ()
    imatrix: str | None = None
    importance: str | None = None
    ggml_lib: str | None = None


class Kind(str, Enum):
    """What a GGUF of its own holds."""

    TEXT = "text model"
    MTP = "MTP layer"
    DSPARK = "DSpark draft"
    MMPROJ = "vision tower"


# Prefixes of file names by which llama.cpp's programs find what belongs to a model.
FILE_PREFIX = {Kind.TEXT: "", Kind.MTP: "mtp-", Kind.DSPARK: "dspark-", Kind.MMPROJ: "mmproj-"}


class TensorSpec(NamedTuple):
    """A tensor of a GGUF before it has a place."""

    name: str
    shape: tuple[int, ...]
    type: ElementType
    segments: Sequence[Segment]
    is_table: bool = False

    @property
    def nbytes(self) -> int:
        """Return the tensor's bytes."""
        return total_bytes(self.segments)


@dataclass(frozen=True)
class GgufModel:
    """One GGUF model (which may be split over files): its tensors and the config that its metadata states.

    ``main_type`` is the type of most of its parameters: that of the routed experts, or of the tower's matrices.
    """

    kind: Kind
    config: ModelConfig
    block_count: int
    tensors: tuple[TensorSpec, ...]
    main_type: str
    alignment: int = ALIGNMENT

    def parameters(self) -> ParameterCounts:
        """Return the parameter counts that size labels are made of."""
        return count_parameters((tensor.name, tensor.shape) for tensor in self.tensors)


class GgufModels(NamedTuple):
    """The models that a conversion makes, what they leave out, and how their low-bit tensors are made."""

    models: list[GgufModel]
    dropped: tuple[Dropped, ...]
    low_bit: LowBitMaker
    notes: tuple[str, ...]


def gguf_models(checkpoint: Checkpoint, options: GgufOptions, low_bit: LowBitMaker | None = None) -> GgufModels:
    """Return the GGUF models that ``options`` ask for, what they leave out, and what is worth a note.

    ``low_bit`` makes the low-bit tensors, None as the options say.

    Raises:
        UsageError: options that do not go together, or a type that the dialect lacks.
        UnsupportedError: a file of the draft is asked for, and there are several MTP layers.
        InventoryError: a shape that the asked type cannot hold, or a weight that no output tensor takes.
    """
    for option, value, known in (
        ("--dense", options.dense, OUTPUT_TYPES),
        ("--experts", options.experts, OUTPUT_TYPES),
        ("--output-type", options.output, OUTPUT_TYPES),
        ("--embedding-type", options.embedding, OUTPUT_TYPES),
        ("--importance", options.importance, IMPORTANCE_MODES),
        ("--dialect", options.dialect, {**DIALECTS, **DIALECTS_V41}),
        ("--engram", options.engram, ENGRAM_TYPES),
    ):
        if value is not None:
            check_choice(option, value, known)
    if options.split_max_tensors is not None and options.split_max_tensors < 1:
        raise UsageError("--split-max-tensors", expected="1 or more", got=options.split_max_tensors)
    if options.no_tensor_first_split and options.split_max_tensors is None and options.split_max_bytes is None:
        raise UsageError("--no-tensor-first-split: nothing is split", hint="add --max-file-size or --split-max-tensors")
    dialect = tensor_dialect(checkpoint.config, options.dialect)
    weights = list(checkpoint.weights.values())
    drafts = [w for w in weights if w.is_draft]
    tower = [w for w in weights if is_vision_name(w.name)]
    trunk = [w for w in weights if not w.is_draft and not is_vision_name(w.name)]
    draft_mode = _draft_mode(checkpoint, options, dialect)
    tower_mode = _tower_mode(checkpoint, options, dialect, bool(tower))
    has_text = ONLY not in (draft_mode, tower_mode)
    first, last = options.layers or (0, checkpoint.config.num_hidden_layers - 1)
    config = checkpoint.config if options.layers is None else checkpoint.config.sliced(first, last)
    claims = Claims(checkpoint)
    if low_bit is None:
        low_bit = LowBitMaker(options.ggml_lib, options.imatrix, squared=options.importance == WEIGHTS)
    type_options = type_options_of(options)
    if checkpoint.config.engram is None and (options.engram is not None or options.engram_last):
        option = "--engram" if options.engram is not None else "--engram-last"
        raise UsageError(f"{option}: the model has no n-gram tables", where=checkpoint.folder)
    engram = engram_type(options, dialect)
    types = _Types(dialect, type_options, checkpoint.config, low_bit, engram)
    choices = [types.choice]
    outside = [w for w in trunk if w.layer is not None and not first <= w.layer <= last]
    trunk = [w for w in trunk if w.layer is None or first <= w.layer <= last]
    claims.drop("layers outside the slice", f"--layers {first}-{last}", outside)

    models: list[GgufModel] = []
    if has_text:
        tensors = _block_tensors(trunk, types, claims, shift=-first)
        block_count = config.num_hidden_layers
        if draft_mode == KEEP:
            tensors += _block_tensors(drafts, types, claims, shift=config.num_hidden_layers)
            block_count += checkpoint.n_draft
        _check_types(tensors, dialect, types.choice.fallbacks)
        if options.engram_last or dialect.name == DS4:
            tensors.sort(key=lambda tensor: tensor.is_table)
        models.append(
            GgufModel(Kind.TEXT, config, block_count, tuple(tensors), _experts_type(tensors), dialect.alignment)
        )
    if draft_mode in (ONLY, SPLIT):
        if checkpoint.draft is Draft.DSPARK:
            # Its stages are the blocks of a model without compressors and hash tables.
            stages = checkpoint.n_draft
            draft_config = checkpoint.config.of_draft(stages)
            draft_types = _Types(DFLASH, type_options, draft_config, low_bit, engram)
            tensors = _block_tensors(drafts, draft_types, claims, shift=0)
            models.append(GgufModel(Kind.DSPARK, draft_config, stages, tuple(tensors), _experts_type(tensors)))
            choices.append(draft_types.choice)
        else:
            shared = [w for w in trunk if w.name in SHARED_WITH_MTP]
            # The trunk's own file has claimed them where there is one.
            tensors = _block_tensors(shared, types, None if has_text else claims, shift=0)
            tensors += _block_tensors(drafts, types, claims, shift=config.num_hidden_layers)
            block_count = config.num_hidden_layers + checkpoint.n_draft
            models.append(GgufModel(Kind.MTP, config, block_count, tuple(tensors), _experts_type(tensors)))
            trunk = [w for w in trunk if w.name not in SHARED_WITH_MTP]
    if tower_mode in (ONLY, SPLIT):
        tensors = _tower_tensors(tower, types, claims)
        main = next(tensor.type.name for tensor in tensors if len(tensor.shape) == MATRIX_DIMENSIONS)
        models.append(GgufModel(Kind.MMPROJ, config, config.flat["vision_n_layers"], tuple(tensors), main))
    if not has_text:
        claims.drop("the text model", "--draft only" if draft_mode == ONLY else "--mmproj only", trunk)
    if draft_mode == DROP:
        claims.drop(
            f"mtp.* ({counted(checkpoint.n_draft, 'draft layer')})",
            _drop_reason("--draft", options.draft, dialect),
            drafts,
        )
    if tower_mode == DROP:
        claims.drop("the vision tower", _drop_reason("--mmproj", options.mmproj, dialect), tower)
    notes = check_rules_used(type_options, choices)
    notes += [note for choice in choices for note in choice.notes()]
    if any(tensor.name.endswith(SECOND_SUFFIX) for model in models for tensor in model.tensors):
        notes.append(IGNORED_SECOND)
    return GgufModels(models, claims.close(), low_bit, (*notes, *low_bit.notes()))


def engram_type(options: GgufOptions, dialect: TensorDialect) -> str:
    """Return how n-gram tables are stored.

    Raises:
        UsageError: in a way that the dialect's reader does not read.
    """
    if options.engram is not None and dialect.name == DS4 and options.engram != dialect.engram:
        raise UsageError(f"--engram {options.engram} is not supported by dialect {DS4}", expected=dialect.engram)
    return options.engram or dialect.engram


def _check_types(tensors: Iterable[TensorSpec], dialect: TensorDialect, fallbacks: Mapping[str, Fallback]) -> None:
    """Check that the dialect's reader reads every tensor's type, and gate and up experts alike.

    Raises:
        UsageError: it does not.
    """
    experts: dict[str, str] = {}
    for tensor in tensors:
        allowed, kind = dialect.allowed(tensor.name), tensor.type.name
        if allowed and kind not in allowed:
            fallback = fallbacks.get(tensor.name)
            asked = kind if fallback is None else fallback.wanted.name
            if fallback is not None and fallback.wanted.name in allowed:
                filling = [other for other in allowed if fallback.columns % ELEMENT_TYPES[other].elements == 0]
                raise UsageError(
                    f"tensor {tensor.name}: {fallback}, which is not supported by dialect {dialect.name}",
                    expected=either(filling) if filling else f"rows of a multiple of {fallback.wanted.elements}",
                    hint="choose a type whose blocks fill the rows, or --dialect llama.cpp",
                )
            subject, hint = f"tensor {tensor.name}:", "leave out the option or recipe that says so"
            if ds4.EXPERTS in tensor.name:
                subject, hint = "--experts", "--experts or --recipe chooses one"
            what = f"{subject} {asked} is not supported by dialect {dialect.name}"
            raise UsageError(what, expected=either(allowed), hint=hint)
        if allowed and (ds4.GATE in tensor.name or ds4.UP in tensor.name):
            other = experts.setdefault(tensor.name.replace(ds4.UP, ds4.GATE), kind)
            if kind != other:
                what = f"tensor {tensor.name}: dialect {dialect.name} wants gate and up experts in one type"
                raise UsageError(what, expected=other, got=kind)


def _drop_reason(option: str, asked: str | None, dialect: TensorDialect) -> str:
    if asked is not None or dialect.mtp_inline:
        return f"{option} drop"
    if dialect.text_only:
        return f"{option} drop (the only choice with --dialect {dialect.name})"
    return f"{option} drop (the default); {option} split writes a file of its own"


def _draft_mode(checkpoint: Checkpoint, options: GgufOptions, dialect: TensorDialect) -> str:
    mode = options.draft or (KEEP if dialect.mtp_inline else DROP)
    allowed = (KEEP, DROP) if dialect.mtp_inline else (DROP,) if dialect.text_only else (DROP, ONLY, SPLIT)
    if mode not in allowed:
        raise UsageError(f"--draft {mode} is not supported by dialect {dialect.name}", expected=either(allowed))
    if options.layers is not None and mode != DROP:
        if options.draft is None:
            return DROP
        raise UsageError(f"--draft {mode} cannot be combined with --layers", hint="a slice has no draft")
    if mode in (ONLY, SPLIT) and checkpoint.draft is Draft.NONE:
        raise UsageError(f"--draft {mode}: the checkpoint has no draft", where=checkpoint.folder)
    if mode in (ONLY, SPLIT) and checkpoint.draft is Draft.MTP and checkpoint.n_draft > 1:
        raise UnsupportedError(
            f"--draft {mode}: llama.cpp's file of an MTP layer has place for one",
            where=checkpoint.folder,
            expected="1 MTP layer",
            got=checkpoint.n_draft,
            hint="pass --draft drop",
        )
    if mode == KEEP and checkpoint.draft is not Draft.MTP:
        return DROP
    return mode


def _tower_mode(checkpoint: Checkpoint, options: GgufOptions, dialect: TensorDialect, has_tower: bool) -> str:
    mode = options.mmproj or DROP
    check_choice("--mmproj", mode, (DROP, ONLY, SPLIT))
    if mode == DROP:
        return mode
    if dialect.mtp_inline or dialect.text_only:
        raise UsageError(f"--mmproj {mode} is not supported by dialect {dialect.name}", expected=DROP)
    if not has_tower:
        raise UsageError(f"--mmproj {mode}: the checkpoint has no vision tower", where=checkpoint.folder)
    return mode


class _Types:
    """Which element type and which shape a weight gets in one model."""

    def __init__(
        self, dialect: TensorDialect, options: TypeOptions, config: ModelConfig, low_bit: LowBitMaker, engram: str
    ) -> None:
        self.dialect = dialect
        self.engram = engram
        self.low_bit = low_bit
        self.choice = TypeChoice(
            options, dialect.default_dense, dialect.default_experts, config.num_hidden_layers, dialect.type_of
        )
        self._o_groups = config.o_groups
        self._n_layers = config.num_hidden_layers

    def layer_of(self, weight: Weight) -> int | None:
        """Return the block of a weight in a file of the whole model, whose draft layers follow the trunk's."""
        if weight.layer is None or not weight.is_draft or self.dialect is DFLASH:
            return weight.layer
        return weight.layer + self._n_layers

    def of(self, weight: Weight, name: str) -> ElementType:
        return self.choice.of(weight, name, self.layer_of(weight))

    def segments(self, weights: Sequence[Weight], name: str, base: str, to: ElementType) -> Sequence[Segment]:
        """Return the segments that make one weight, or a stack of experts; ``base`` is the name without its block."""
        if self.is_moved(weights, to):
            return moved_segments(weights)
        if to.name in LOW_BIT:
            return self.low_bit.segments(name, gguf_name(base, self.layer_of(weights[0])), weights, to)
        return stack_segments(weights, to) if weights[0].expert is not None else convert_segments(weights[0], to)

    def is_moved(self, weights: Sequence[Weight], to: ElementType) -> bool:
        """Return whether experts are NVFP4 that becomes ggml's, their second scales a tensor of their own."""
        if to.name != NVFP4 or self.dialect.architecture == PORT or weights[0].expert is None:
            return False
        return all(weight.encoding is Encoding.NVFP4 for weight in weights)

    def shape_of(self, weight: Weight) -> tuple[int, ...]:
        """Return the shape under which a weight is listed: wo_a by output group where the dialect wants it."""
        if self.dialect.grouped_wo_a and weight.row.shape == WO_A_SHAPE:
            rows, columns = weight.shape
            return self._o_groups, rows // self._o_groups, columns
        return weight.shape


def _experts_type(tensors: Iterable[TensorSpec]) -> str:
    """Return the type of most elements of the routed experts."""
    elements: Counter[str] = Counter()
    for tensor in tensors:
        if "_exps." in tensor.name:
            elements[tensor.type.name] += math.prod(tensor.shape)
    return max(elements, key=lambda name: elements[name], default="")


def type_options_of(options: GgufOptions) -> TypeOptions:
    """Return the choices about element types: the recipe's, with the user's own over them.

    Raises:
        UsageError, FileFormatError, InputMissingError: an option or the recipe is malformed, or ``pure`` has no type.
    """
    base = Recipe("") if options.recipe is None else load_recipe(options.recipe)
    rules = tensor_type_rules(options.tensor_types)
    chosen = {key: getattr(options, key) or getattr(base, key) for key in TYPE_KEYS}
    if options.pure and chosen["dense"] is None:
        raise UsageError("--pure needs a type for every tensor", expected="--dense TYPE or a recipe with one")
    return TypeOptions(**chosen, pure=options.pure, rules=(*base.rules, *rules), named=len(base.rules))


def _block_tensors(weights: Sequence[Weight], types: _Types, claims: Claims | None, shift: int) -> list[TensorSpec]:
    """Return the tensors of ``weights``: blocks renumbered by ``shift``, experts stacked, e_proj and h_proj joined."""
    specs: list[TensorSpec] = []
    groups: dict[tuple[str, str], list[Weight]] = {}
    unnamed: list[Weight] = []
    for weight in weights:
        base = types.dialect.name_of(weight.row)
        if base is None:
            unnamed.append(weight)
            continue
        name = gguf_name(base, None if weight.layer is None else weight.layer + shift)
        groups.setdefault((name, base), []).append(weight if claims is None else claims.take(weight))
    if claims is not None:
        for row in dict.fromkeys(weight.row for weight in unnamed):
            reason = LEFT_OUT_REASONS.get(row.when, f"not part of the {types.dialect.name} layout")
            claims.drop(row.name, reason, [weight for weight in unnamed if weight.row == row])
    for (name, base), group in groups.items():
        if group[0].row.store is Store.ENGRAM:
            specs += [TensorSpec(*table, is_table=True) for table in table_tensors(name, group[0], types.engram)]
            continue
        to = types.of(group[0], name)
        if len(group) > 1 and group[0].expert is None:
            specs.append(_joined(name, group, to))
            continue
        shape = types.shape_of(group[0]) if group[0].expert is None else (len(group), *group[0].shape)
        specs.append(TensorSpec(name, shape, to, types.segments(group, name, base, to)))
        if types.is_moved(group, to):
            specs += _second_scales(name, group)
    return specs


def _second_scales(name: str, group: Sequence[Weight]) -> list[TensorSpec]:
    """Return the tensor of the second scales of a stack of NVFP4 experts, none where all are 1, as llama.cpp does."""
    scales = second_scales(group)
    if (scales == 1).all():
        return []
    made = Segment(Constant(scales.tobytes()), (), 1, scales.nbytes)
    return [TensorSpec(name.removesuffix(".weight") + SECOND_SUFFIX, (len(group),), F32, (made,))]


def _tower_tensors(weights: Sequence[Weight], types: _Types, claims: Claims) -> list[TensorSpec]:
    """Return the vision tower's tensors: rows with two names are halved among them, patches become a convolution."""
    specs: list[TensorSpec] = []
    for weight in weights:
        claims.take(weight)
        names = (weight.row.gguf or "").split()
        rows, columns = matrix_shape(weight.shape)
        share = rows // len(names)
        shape: tuple[int, ...] = weight.shape if len(weight.shape) == 1 else (share, columns)
        to = types.choice.of(weight, names[0], None)
        if to.name not in TARGETS:
            raise UsageError(
                f"tensor {names[0]}: the vision tower is not made in {to.name}", expected=", ".join(TARGETS)
            )
        if weight.row.shape == PATCH_SHAPE:
            side = math.isqrt(columns // IMAGE_CHANNELS)
            shape, to = (rows, IMAGE_CHANNELS, side, side), F32
        for number, name in enumerate(names):
            full = name if weight.layer is None else f"v.blk.{weight.layer}.{name}"
            specs.append(TensorSpec(full, shape, to, convert_segments(weight, to, number * share, share)))
    return specs


def _joined(name: str, group: list[Weight], to: ElementType) -> TensorSpec:
    """Return two weights joined along their input, the first one's columns first.

    Raises:
        UsageError: a low-bit type; halves of a row are made by themselves.
    """
    if to.name not in TARGETS:
        raise UsageError(
            f"tensor {name}: joined of two weights, it is not made in {to.name}",
            expected=", ".join(TARGETS),
            hint="add --tensor-type eh_proj=q8_0",
        )
    left, right = (codec_segment(weight, to) for weight in group)
    rows, columns = matrix_shape(group[0].shape)
    beside = Beside(row_operation(group[0], to), row_operation(group[1], to), left.row_bytes)
    segment = Segment(beside, left.operands + right.operands, rows, left.row_bytes + right.row_bytes)
    return TensorSpec(name, (rows, 2 * columns), to, (segment,))


def gguf_files(
    tensors: Sequence[TensorSpec],
    metadata: Sequence[KeyValue],
    stem: str,
    split_max_bytes: int | None,
    split_max_tensors: int | None = None,
    alignment: int = ALIGNMENT,
    no_tensor_first: bool = False,
) -> list[OutputFile]:
    """Return the files of a model: one, or splits of at most ``split_max_bytes`` and ``split_max_tensors`` each.

    The metadata goes into the first split; every split carries ``split.no``, ``split.count`` and
    ``split.tensors.count``. A tensor larger than the limit gets a split of its own, and so does an n-gram table,
    which a runtime may leave on disk. Tensors begin at multiples of ``alignment``, which the metadata must name if
    it is not the usual one. ``no_tensor_first`` leaves the first of several files to the metadata.
    """
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in tensors:
        alone = tensor.is_table or (bool(groups[-1]) and groups[-1][-1].is_table)
        apart = alone and (split_max_bytes is not None or split_max_tensors is not None)
        too_large = split_max_bytes is not None and size + tensor.nbytes > split_max_bytes
        if groups[-1] and (apart or too_large or len(groups[-1]) == split_max_tensors):
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if no_tensor_first:
        groups.insert(0, [])
    if len(groups) == 1:
        return [gguf_file(f"{stem}.gguf", _unplaced(groups[0]), metadata, alignment)]
    files = []
    aligned = [entry for entry in metadata if entry.key == ALIGNMENT_KEY]
    for number, group in enumerate(groups):
        split = [
            KeyValue("split.no", GGUF_U16, number),
            KeyValue("split.count", GGUF_U16, len(groups)),
            KeyValue("split.tensors.count", GGUF_I32, len(tensors)),
        ]
        name = SPLIT_NAME.format(stem=stem, number=number + 1, count=len(groups))
        files.append(gguf_file(name, _unplaced(group), [*(metadata if number == 0 else aligned), *split], alignment))
    return files


def _unplaced(tensors: Iterable[TensorSpec]) -> list[OutputTensor]:
    return [OutputTensor(t.name, t.type.name, t.shape, 0, t.nbytes, t.segments) for t in tensors]


def gguf_file(name: str, tensors: Sequence[OutputTensor], metadata: Sequence[KeyValue], alignment: int) -> OutputFile:
    """Return a GGUF of ``tensors``, which get their places in it, one after the other."""
    placed = list(place(tensors, 0, alignment))
    infos = [TensorInfo(t.name, t.shape, ELEMENT_TYPES[t.dtype].number, t.offset) for t in placed]
    header = gguf_header(list(metadata), infos, alignment)
    start = len(header)
    moved = tuple(at_offset(tensor, start + tensor.offset) for tensor in placed)
    end = align_up(moved[-1].offset + moved[-1].nbytes, alignment) if moved else start
    return OutputFile(name, header, moved, end)
