"""The GGUF layout: which tensors a file for llama.cpp holds, in which types, at which offsets."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..checkpoint.folder import Checkpoint
from ..checkpoint.weights import Encoding, Weight
from ..config import ModelConfig
from ..errors import UnsupportedError, UsageError
from ..plan import BESIDE, Claims, Dropped, OutputFile, OutputTensor, Segment, align_up, place
from .gguf_metadata import I32 as GGUF_I32
from .gguf_metadata import U16 as GGUF_U16
from .gguf_metadata import KeyValue, ParameterCounts, count_parameters, encode_key_values
from .names import Draft, Row, Store
from .segments import (
    BF16,
    F16,
    F32,
    I32,
    MXFP4,
    Q8_0,
    ElementType,
    codec_segment,
    convert_segments,
    matrix_shape,
)

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32

# ggml's type numbers.
GGML_TYPE = {"f32": 0, "f16": 1, "q8_0": 8, "i32": 26, "bf16": 30, "mxfp4": 39}
ELEMENT_TYPES = {t.name: t for t in (F32, F16, BF16, I32, Q8_0, MXFP4)}

DENSE_TYPES = ("q8_0", "bf16", "f16", "f32")
EXPERT_TYPES = ("mxfp4", "q8_0", "bf16", "f16", "f32")

# The row whose output rows are grouped, [G * o_lora, heads * d / G].
WO_A_SHAPE = ("G*o_lora", "Hd/G")

SPLIT_NAME = "{stem}-{number:05d}-of-{count:05d}.gguf"


@dataclass(frozen=True)
class TensorDialect:
    """How one family of readers wants the file: names, architecture, types and what becomes of MTP.

    ``default_dense`` and ``default_experts`` give the output type by the source's encoding.
    """

    name: str
    architecture: str
    name_of: Callable[[Row], str | None]
    default_dense: Mapping[Encoding, ElementType]
    default_experts: Mapping[Encoding, ElementType]
    mtp_inline: bool
    grouped_wo_a: bool


_PLAIN_TYPES = {Encoding.BF16: BF16, Encoding.F16: F16, Encoding.F32: F32}
DIALECTS = {
    "llama.cpp": TensorDialect(
        name="llama.cpp",
        architecture="deepseek4",
        name_of=lambda row: row.gguf,
        default_dense={**_PLAIN_TYPES, Encoding.FP8: Q8_0},
        default_experts={**_PLAIN_TYPES, Encoding.FP4: MXFP4, Encoding.FP8: Q8_0},
        mtp_inline=False,
        grouped_wo_a=False,
    ),
    "deepseek-v4": TensorDialect(
        name="deepseek-v4",
        architecture="deepseek-v4",
        name_of=lambda row: row.port,
        default_dense={**_PLAIN_TYPES, Encoding.FP8: BF16},
        default_experts={**_PLAIN_TYPES, Encoding.FP4: BF16, Encoding.FP8: BF16},
        mtp_inline=True,
        grouped_wo_a=True,
    ),
}


@dataclass(frozen=True)
class GgufOptions:
    """The choices that decide a GGUF's bytes; None takes the dialect's default."""

    dense: str | None = None
    experts: str | None = None
    mtp: str | None = None
    layers: tuple[int, int] | None = None
    dialect: str = "llama.cpp"
    split_max_bytes: int | None = None


class TensorSpec(NamedTuple):
    """A tensor of a GGUF before it has a place."""

    name: str
    shape: tuple[int, ...]
    type: ElementType
    segments: tuple[Segment, ...]

    @property
    def nbytes(self) -> int:
        """Return the tensor's bytes."""
        return sum(segment.nbytes for segment in self.segments)


@dataclass(frozen=True)
class GgufModel:
    """One GGUF model (which may be split over files): its tensors and the config that its metadata states."""

    config: ModelConfig
    block_count: int
    is_mtp: bool
    tensors: tuple[TensorSpec, ...]
    experts_type: str
    dense_type: str

    def parameters(self) -> ParameterCounts:
        """Return the parameter counts that size labels are made of."""
        return count_parameters((tensor.name, tensor.shape) for tensor in self.tensors)


def gguf_models(checkpoint: Checkpoint, options: GgufOptions) -> tuple[list[GgufModel], tuple[Dropped, ...]]:
    """Return the GGUF models that ``options`` ask for, and what they leave out.

    Raises:
        UsageError: options that do not go together, or a type that the dialect lacks.
        InventoryError: a shape that the asked type cannot hold, or a weight nobody claims.
    """
    dialect = DIALECTS[options.dialect]
    mtp = _mtp_mode(checkpoint, options, dialect)
    first, last = options.layers or (0, checkpoint.config.num_hidden_layers - 1)
    config = checkpoint.config if options.layers is None else checkpoint.config.sliced(first, last)
    claims = Claims(checkpoint)
    types = _Types(dialect, options, config.o_groups)
    weights = list(checkpoint.weights.values())
    trunk = [w for w in weights if not w.is_draft and (w.layer is None or first <= w.layer <= last)]
    outside = [w for w in weights if not w.is_draft and w.layer is not None and not first <= w.layer <= last]
    drafts = [w for w in weights if w.is_draft]
    claims.drop("layers outside the slice", f"--layers {first}-{last}", outside)

    models: list[GgufModel] = []
    if mtp in ("drop", "split", "keep"):
        tensors = _block_tensors(trunk, types, claims, shift=-first)
        block_count = config.num_hidden_layers
        if mtp == "keep":
            tensors += _block_tensors(drafts, types, claims, shift=config.num_hidden_layers)
            block_count += checkpoint.n_draft
        models.append(
            GgufModel(
                config,
                block_count,
                False,
                tuple(tensors),
                types.experts_name(weights),
                types.dense_name(weights),
            )
        )
    if mtp in ("only", "split"):
        top = [w for w in trunk if w.name in ("embed.weight", "norm.weight", "head.weight")]
        if mtp == "only":
            claims.drop("the trunk", "--mtp only", [w for w in trunk if w not in top])
            shared_claims: Claims | None = claims
        else:
            shared_claims = None  # the trunk's own file has claimed them
        tensors = _block_tensors(top, types, shared_claims, shift=0)
        tensors += _block_tensors(drafts, types, claims, shift=config.num_hidden_layers)
        models.append(
            GgufModel(
                config,
                config.num_hidden_layers + checkpoint.n_draft,
                True,
                tuple(tensors),
                types.experts_name(drafts),
                types.dense_name(drafts),
            )
        )
    if mtp == "drop":
        claims.drop(
            f"mtp.* ({checkpoint.n_draft} draft layer{'s' if checkpoint.n_draft > 1 else ''})",
            "--mtp drop (the default); --mtp split writes it beside the model"
            if checkpoint.draft is Draft.MTP
            else "--mtp drop (the default)",
            drafts,
        )
    return models, claims.close()


def _mtp_mode(checkpoint: Checkpoint, options: GgufOptions, dialect: TensorDialect) -> str:
    mtp = options.mtp or ("keep" if dialect.mtp_inline else "drop")
    allowed = ("keep", "drop") if dialect.mtp_inline else ("drop", "only", "split")
    if mtp not in allowed:
        raise UsageError(f"--mtp {mtp} is not for dialect {dialect.name}", expected=" or ".join(allowed))
    if options.layers is not None and mtp != "drop":
        if options.mtp is None:
            return "drop"
        raise UsageError(f"--mtp {mtp} does not go with --layers", hint="a slice has no draft")
    if mtp in ("only", "split"):
        if checkpoint.draft is Draft.NONE:
            raise UsageError(f"--mtp {mtp}: the checkpoint has no MTP layer", where=checkpoint.folder)
        if checkpoint.draft is Draft.DSPARK:
            raise UnsupportedError(
                "a DSpark draft is not an MTP layer and has no mtp- file", where=checkpoint.folder
            )
    if mtp == "keep" and checkpoint.draft is not Draft.MTP:
        return "drop"
    return mtp


class _Types:
    """Which element type a weight gets: the precision rules."""

    def __init__(self, dialect: TensorDialect, options: GgufOptions, o_groups: int) -> None:
        self.dialect = dialect
        self._o_groups = o_groups
        self._dense = ELEMENT_TYPES[options.dense] if options.dense else None
        self._experts = ELEMENT_TYPES[options.experts] if options.experts else None

    def of(self, weight: Weight) -> ElementType:
        store = weight.row.store
        if store is Store.EXPERT:
            return self._experts or self.dialect.default_experts[weight.encoding]
        if store is Store.TABLE:
            return I32
        # Norms, sinks, biases and everything of the hyper-connections keep full precision, always.
        if store is Store.F32 or len(weight.shape) == 1:
            return F32
        if store is Store.DENSE:
            return self._dense or self.dialect.default_dense[weight.encoding]
        # Embedding, head, router and compressors are stored in BF16: q8_0 and bf16 leave them so.
        if self._dense in (F16, F32):
            return self._dense
        return F32 if weight.encoding is Encoding.F32 else ELEMENT_TYPES[weight.encoding.value]

    def shape_of(self, weight: Weight) -> tuple[int, ...]:
        """Return the shape under which a weight is listed: wo_a by output group where the dialect wants it."""
        if self.dialect.grouped_wo_a and weight.row.shape == WO_A_SHAPE:
            rows, columns = weight.shape
            return self._o_groups, rows // self._o_groups, columns
        return weight.shape

    def _name(self, weights: Iterable[Weight], store: Store) -> str:
        return next((self.of(weight).name for weight in weights if weight.row.store is store), "")

    def experts_name(self, weights: Iterable[Weight]) -> str:
        """Return the type of the routed experts among ``weights``."""
        return self._name(weights, Store.EXPERT)

    def dense_name(self, weights: Iterable[Weight]) -> str:
        """Return the type of the dense linears among ``weights``."""
        return self._name(weights, Store.DENSE)


def _block_tensors(
    weights: Sequence[Weight], types: _Types, claims: Claims | None, shift: int
) -> list[TensorSpec]:
    """Return the tensors of ``weights``: blocks renumbered by ``shift``, experts stacked, e_proj and h_proj joined."""
    specs: list[TensorSpec] = []
    groups: dict[str, list[Weight]] = {}
    unnamed: list[Weight] = []
    for weight in weights:
        name = types.dialect.name_of(weight.row)
        if name is None:
            unnamed.append(weight)
            continue
        if weight.layer is not None and not (weight.is_draft and name.startswith("output")):
            name = f"blk.{weight.layer + shift}.{name}"
        groups.setdefault(name, []).append(weight if claims is None else claims.take(weight))
    if claims is not None:
        claims.drop(
            ", ".join(sorted({w.row.name for w in unnamed})),
            f"not part of the {types.dialect.name} layout",
            unnamed,
        )
    for name, group in groups.items():
        to = types.of(group[0])
        if group[0].expert is not None:
            segments = tuple(segment for weight in group for segment in convert_segments(weight, to))
            specs.append(TensorSpec(name, (len(group), *group[0].shape), to, segments))
        elif len(group) > 1:
            specs.append(_joined(name, group, to))
        else:
            weight = group[0]
            shape = types.shape_of(weight)
            specs.append(TensorSpec(name, shape, to, convert_segments(weight, to)))
    return specs


def _joined(name: str, group: list[Weight], to: ElementType) -> TensorSpec:
    """Return two weights joined along their input, the first one's columns first."""
    left, right = (codec_segment(weight, to) for weight in group)
    rows, columns = matrix_shape(group[0].shape)
    segment = Segment(
        BESIDE,
        left.operands + right.operands,
        rows,
        left.row_bytes + right.row_bytes,
        (left.row_bytes, left.codec, left.args, right.codec, right.args),
    )
    return TensorSpec(name, (rows, 2 * columns), to, (segment,))


def gguf_files(
    tensors: Sequence[TensorSpec], metadata: Sequence[KeyValue], stem: str, split_max_bytes: int | None
) -> list[OutputFile]:
    """Return the files of a model: one, or splits of at most ``split_max_bytes`` of tensors each.

    The metadata goes into the first split; every split carries ``split.no``, ``split.count`` and
    ``split.tensors.count``. A tensor larger than the limit gets a split of its own.
    """
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in tensors:
        if split_max_bytes is not None and groups[-1] and size + tensor.nbytes > split_max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return [_gguf_file(f"{stem}.gguf", groups[0], metadata)]
    files = []
    for number, group in enumerate(groups):
        split = [
            KeyValue("split.no", GGUF_U16, number),
            KeyValue("split.count", GGUF_U16, len(groups)),
            KeyValue("split.tensors.count", GGUF_I32, len(tensors)),
        ]
        name = SPLIT_NAME.format(stem=stem, number=number + 1, count=len(groups))
        files.append(_gguf_file(name, group, [*metadata, *split] if number == 0 else split))
    return files


def _gguf_file(name: str, tensors: Sequence[TensorSpec], metadata: Sequence[KeyValue]) -> OutputFile:
    placed = list(
        place(
            [OutputTensor(t.name, t.type.name, t.shape, 0, t.nbytes, t.segments) for t in tensors],
            0,
            ALIGNMENT,
        )
    )
    infos = b"".join(_tensor_info(tensor) for tensor in placed)
    keys = encode_key_values(list(metadata))
    head = MAGIC + struct.pack("<IQQ", VERSION, len(placed), len(metadata)) + keys + infos
    start = align_up(len(head), ALIGNMENT)
    moved = tuple(tensor._replace(offset=start + tensor.offset) for tensor in placed)
    end = align_up(moved[-1].offset + moved[-1].nbytes, ALIGNMENT) if moved else start
    return OutputFile(name, head.ljust(start, b"\0"), moved, end)


def _tensor_info(tensor: OutputTensor) -> bytes:
    """Return the entry of a tensor in the header: name, dimensions fastest first, type, offset in the data."""
    name = tensor.name.encode()
    dims = tuple(reversed(tensor.shape)) or (1,)
    return (
        struct.pack("<Q", len(name))
        + name
        + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, GGML_TYPE[tensor.dtype], tensor.offset)
    )
