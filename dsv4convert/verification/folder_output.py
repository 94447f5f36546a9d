"""A finished folder of safetensors, a checkpoint or shards: which tensor holds which part of which weight."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.folder import Checkpoint, FolderHeaders, read_index
from ..checkpoint.nvfp4 import CODES
from ..checkpoint.weights import Weight, official_scale
from ..containers.folder_names import CONFIG_NAME, INDEX_NAME, SHARD_NAME
from ..containers.json_object import MAX_CONFIG_BYTES, read_json_object
from ..containers.presence import is_file
from ..containers.safetensors import METADATA_KEY, Stored, read_header, read_metadata
from ..containers.untrusted import open_regular
from ..errors import ConfigError, InputMissingError, InputOutputError, UnsupportedError
from ..model.config import ModelConfig, Version, parse_config
from ..model.config_v41 import inference_config
from ..model.tensors import Split, Store, When, is_vision_name
from .compare import Piece
from .matrix import Matrix, read_at, stored_matrix, weight_matrix
from .numbers import NVFP4_BLOCK
from .report import EXTRA, FILE, FOLDER, KEY, LAYOUT, MISSING, PADDING, TENSOR, LeftOut, Report

PREFIX = "model."
SCALE_SUFFIXES = (".scale", ".weight_scale_inv")
STACK_SCALE_SUFFIXES = ("_scale_inv",)
# Of NVFP4: block scales, the second scale and that of the activations.
NVFP4_SUFFIXES = (".weight_scale", ".weight_scale_2", ".input_scale")
# The matrices of an expert that share input and second scale.
FUSED = {".w1.": ".w3.", ".w3.": ".w1."}

# The weight that shards hold in BF16, whatever the source has. Scales that were lost there cannot be known again.
DEQUANTISED_IN_SHARDS = "attn.wo_a.weight"

INFERENCE_CONFIG_NAME = "inference_config.json"

HF_QUANT_CONFIG_NAME = "hf_quant_config.json"
MODELOPT_PRODUCER = {"name": "modelopt", "version": "dsv4-nvfp4-experts"}

# Rows and columns that share a scale where FP4 becomes FP8.
FP8_SIDE = {Version.V4: 128, Version.V41: 32}

ROW_BLOCK = (1, 32)
NVFP4_ROW_BLOCK = (1, NVFP4_BLOCK)

FLOATS = ("bf16", "f16", "f32")
# NVFP4 that is no FP4, and INT4: in sources only.
DECODED_FIRST = ("fp4/f32", "int4")
# What a weight that is published in scaled codes may become.
PUBLISHED_AS = {Store.DENSE: ("fp8",), Store.EXPERT: ("fp4", "fp8"), Store.ENGRAM: ("fp8",)}
QUANTISED = ("fp8", "fp8/f32", "fp4", "fp4/nv")

# Files that make a folder of use, compared byte for byte; the first ones have to be there if the source
# has them.
NEEDED_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
OTHER_FILES = (
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
)

DTYPE_NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
PYTORCH_METADATA = {"format": "pt"}
COPY_BYTES = 2**20

# Stands for the value of a key that is not there.
ABSENT = object()
# Characters of a JSON value that a problem shows.
MAX_SHOWN = 200

# What an output can leave out as a whole.
THE_DRAFT, THE_MODEL = "the draft layers", "the model without its draft"

# What config.json calls a field of ModelConfig, where it is not its name.
KEY_OF_FIELD = {"yarn": "rope_scaling", "version": "architectures"}


class Found(NamedTuple):
    """A weight of the output with its scales; NVFP4 has two besides ``scale``: the second one and the input's."""

    stored: Stored
    scale: Stored | None
    second: Stored | None = None
    input_scale: Stored | None = None


class Tensors:
    """The tensors of a file or folder by name without a prefix, each taken once; what is left is extra."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._left = dict(stored)

    def take(self, name: str) -> Found | None:
        """Return a weight and its scales, None where there is no such weight."""
        stored = self._pop(name)
        if stored is None:
            return None
        stem = name.removesuffix(".weight")
        suffixes = SCALE_SUFFIXES if stem != name else STACK_SCALE_SUFFIXES
        scales = (self._pop(stem + suffix) for suffix in suffixes)
        scale = next((scale for scale in scales if scale is not None), None)
        if scale is not None or stem == name:
            return Found(stored, scale)
        return Found(stored, *(self._pop(stem + suffix) for suffix in NVFP4_SUFFIXES))

    def _pop(self, name: str) -> Stored | None:
        return self._left.pop(name, None) or self._left.pop(PREFIX + name, None)

    def names(self) -> list[str]:
        """Return the names that are not taken yet."""
        return list(self._left)


def folder_pieces(folder: Path, headers: FolderHeaders, checkpoint: Checkpoint, report: Report) -> list[Piece]:
    """Return the pieces of a checkpoint folder, and report everything that does not belong or is missing."""
    stored, files, strays = headers
    for stray in strays:
        report.problem(FILE, folder, stray)
    check_file_metadata(files, report, PYTORCH_METADATA, *(read_metadata(path) for path in checkpoint.files))
    packed = next((name for name in stored if name.endswith(CODES)), None)
    if packed is not None:
        what = "packed by compressed-tensors, as no command does; compare holds such folders against each other"
        report.problem(LAYOUT, f"tensor {packed}", what)
        return []
    if is_file(folder / INDEX_NAME):
        check_index(folder / INDEX_NAME, stored, report)
    transformers = any(".self_attn." in name for name in stored)
    tensors = Tensors(stored)
    names: dict[str, str] = {}  # by official name
    nameless: list[Weight] = []
    for weight in checkpoint.weights.values():
        name = _transformers_name(weight) if transformers else weight.name
        if name is None:
            nameless.append(weight)
        else:
            names[weight.name] = name
    leave_out(nameless, "transformers has no such module", report)
    named = [checkpoint.weights[official] for official in names]
    pieces: list[Piece] = []
    groups: dict[str, list[Weight]] = {}
    for weight in without_absent_parts(named, stored, report):
        groups.setdefault(names[weight.name], []).append(weight)
    input_scales = InputScales()
    for name, weights in groups.items():
        made = _folder_tensor(name, weights, tensors, FP8_SIDE[checkpoint.config.version], report, input_scales)
        pieces += (_with_sharing(piece, weights[0], checkpoint) for piece in made)
    input_scales.report_uneven(report)
    for name in tensors.names():
        report.problem(EXTRA, f"tensor {name}", "not in the source")
    _check_folder_config(folder, checkpoint, pieces, report)
    _check_quant_config(folder, pieces, report)
    check_files(folder, checkpoint.folder, report)
    return pieces


class InputScales:
    """The scales of activations that NVFP4 experts have: positive numbers, alike for the matrices of one input.

    Nobody can tell from the source what they are.
    """

    def __init__(self) -> None:
        self._values: dict[str, float] = {}

    def add(self, name: str, stored: Stored | None, report: Report) -> None:
        """Check one and keep it."""
        where = f"tensor {name.removesuffix('.weight')}.input_scale"
        if stored is None:
            report.problem(MISSING, where, "not in the output; NVFP4 experts have one")
        elif stored.dtype != "F32" or stored.shape != ():
            report.problem(LAYOUT, where, f"expected F32 [], got {stored.dtype} {list(stored.shape)}")
        else:
            value = float(read_at(stored.file, stored.offset, stored.nbytes).view("<f4")[0])
            if not 0 < value < float("inf"):
                report.problem(TENSOR, where, f"expected a positive number, got {value:g}")
            self._values[name] = value

    def report_uneven(self, report: Report) -> None:
        """Report the matrices that read one input by two scales."""
        for name, value in self._values.items():
            partner = name.replace(".w3.", ".w1.")
            if ".w3." in name and self._values.get(partner, value) != value:
                where = f"tensor {name.removesuffix('.weight')}.input_scale"
                report.problem(TENSOR, where, f"expected that of w1, {self._values[partner]:g}, got {value:g}")


def _with_sharing(piece: Piece, weight: Weight, checkpoint: Checkpoint) -> Piece:
    """Return a piece of NVFP4 made of FP4 with the scales of the source that its second scale goes by."""
    if piece.output.encoding != "fp4/nv" or piece.source.encoding != "fp4":
        return piece
    fused = (weight.name.replace(own, other) for own, other in FUSED.items() if own in weight.name)
    matrices = [piece.source, *(weight_matrix(checkpoint.weights[name]) for name in fused)]
    return piece._replace(sharing=tuple(matrix.scale for matrix in matrices if matrix.scale is not None))


def _folder_tensor(
    name: str, weights: list[Weight], tensors: Tensors, side: int, report: Report, input_scales: InputScales
) -> Iterator[Piece]:
    """Yield the pieces of a tensor that holds a weight, or the experts of a layer one above the other."""
    found = tensors.take(name)
    if found is None:
        report.missing(name, weights[0].name)
        return
    first = weights[0]
    stacked = first.expert is not None and name != first.name
    shape = first.shape
    if stacked:
        weights = sorted(weights, key=lambda weight: (weight.expert or 0, weight.row.name))
        experts = len({weight.expert for weight in weights})
        shape = (experts, len(weights) // experts * first.shape[0], first.shape[1])
    matrix = _checked(name, found, shape, weights, side, report)
    if matrix is None:
        return
    if matrix.encoding == "fp4/nv":
        input_scales.add(name, found.input_scale, report)
    for number, weight in enumerate(weights):
        source = weight_matrix(weight)
        at = (number * source.rows, 0)
        by_value = weight.row.name == DEQUANTISED_IN_SHARDS
        yield Piece(matrix, shape, at, source, (0, 0), (source.rows, source.columns), by_value=by_value)


def _checked(
    name: str,
    found: Found,
    shape: tuple[int, ...],
    weights: list[Weight],
    side: int,
    report: Report,
) -> Matrix | None:
    """Return the stored matrix if its shape and type are what they may be, and report them if not.

    ``side``: the rows and columns of the blocks of FP8 that is made here.
    """
    stored = found.stored
    where = f"tensor {name}"
    scale = found.scale
    if scale is not None and found.second is None:
        scale = official_scale(stored, scale, None)  # mend leaves those of folders saved anew in their own type
    matrix = stored_matrix(name, stored, scale, found.second)
    if isinstance(matrix, str):
        report.problem(LAYOUT, where, matrix)
        return None
    logical = stored.shape
    if stored.dtype in ("I8", "U8"):
        logical = (*logical[:-1], logical[-1] * 2)
    if logical != shape:
        report.problem(LAYOUT, where, f"expected shape {list(shape)}, got {list(logical)}")
        return None
    allowed = _allowed_encodings(weights[0])
    if matrix.encoding not in allowed:
        report.problem(LAYOUT, where, f"expected {' or '.join(allowed)}, got {matrix.encoding}")
        if matrix.encoding == "fp4/nv":  # FP4 alone becomes NVFP4: no rule says what its elements should be here
            return None
    elif matrix.encoding in QUANTISED and matrix.scale is not None:
        own, made = weights[0].block, _made_block(matrix.encoding, weights[0], side)
        block = own if own is not None and matrix.encoding == weight_matrix(weights[0]).encoding else made
        if matrix.scale.block != block and not report.foreign:
            report.problem(LAYOUT, where, f"expected blocks {list(block)}, got {list(matrix.scale.block)}")
    return matrix


def _allowed_encodings(weight: Weight) -> tuple[str, ...]:
    """Return how a folder may store a weight: integers and what is published in F32 as they are, others as floats.

    What is published as FP8 or FP4 may be that again, and FP4 experts FP8.
    """
    own, store = weight_matrix(weight).encoding, weight.row.store
    made = ("fp4/nv",) if own == "fp4" and store is Store.EXPERT else ()
    if own in ("i32", "i64") or (own == "f32" and store is Store.F32):
        return (own,)
    return tuple(dict.fromkeys((own, *PUBLISHED_AS.get(store, ()), *made, *FLOATS)))


def _made_block(encoding: str, weight: Weight, side: int) -> tuple[int, int]:
    """Return the rows and columns that share a scale where a conversion quantises a weight."""
    if encoding == "fp4/nv":
        return NVFP4_ROW_BLOCK
    return ROW_BLOCK if encoding == "fp4" or weight.row.store is Store.ENGRAM else (side, side)


def _transformers_name(weight: Weight) -> str | None:
    """Return what transformers calls a weight; it has no draft layers, which keep their names in its folders."""
    if weight.is_draft:
        return None if weight.row.when is When.VISION else weight.name
    name = weight.row.transformers
    return name if name is None or weight.layer is None else f"{PREFIX}layers.{weight.layer}.{name}"


def leave_out(weights: Iterable[Weight], reason: str, report: Report) -> None:
    """Note weights that the output has no place for."""
    groups: dict[str, int] = {}
    for weight in weights:
        groups[weight.row.name] = groups.get(weight.row.name, 0) + 1 + (weight.scale is not None)
    report.left_out += [LeftOut(what, reason, count) for what, count in groups.items()]


def without_absent_parts(weights: list[Weight], names: Iterable[str], report: Report) -> list[Weight]:
    """Return the weights without those of draft layers if the output has none of them, or without all others.

    ``names``: of the tensors in all files of the output. Both are what ``--draft`` can leave out.
    """
    of_draft = {name.removeprefix(PREFIX).startswith("mtp.") for name in names}
    if len(of_draft) != 1:
        return weights
    (only_draft,) = of_draft
    absent = [weight for weight in weights if weight.is_draft != only_draft]
    if absent:
        tensors = sum(1 + (weight.scale is not None) for weight in absent)
        what = LeftOut(THE_MODEL, "the output holds the draft alone", tensors)
        report.left_out.append(what if only_draft else LeftOut(THE_DRAFT, "the output holds none", tensors))
    return [weight for weight in weights if weight.is_draft == only_draft]


def is_left_out(what: str, report: Report) -> bool:
    """Return whether the report says that the output leaves ``what`` out as a whole."""
    return any(entry.what == what for entry in report.left_out)


# Shards


def shard_pieces(folder: Path, checkpoint: Checkpoint, report: Report) -> list[Piece]:
    """Return the pieces of the shards in ``folder``, and report all that does not belong or is missing.

    Ranks that are not there are noted: ``shard --rank`` writes some only.

    Raises:
        Dsv4Error: a shard cannot be read at all.
    """
    files = {
        (int(found[2]), int(found[1])): path
        for path in sorted(folder.iterdir())
        if (found := SHARD_NAME.fullmatch(path.name)) is not None
    }
    sizes = sorted({size for size, _ in files})
    if len(sizes) > 1:
        report.problem(FILE, folder, f"shards of several divisions: mp {', '.join(map(str, sizes))}")
    mp = sizes[0]
    for path in sorted(folder.glob("*.safetensors")):
        if path not in files.values():
            report.problem(FILE, path, "unexpected file next to shards")
    ranks = {rank: path for (size, rank), path in files.items() if size == mp}
    absent = [rank for rank in range(mp) if rank not in ranks]
    if absent:
        report.notes.append(f"not there and not verified: ranks {', '.join(map(str, absent[:20]))} of {mp}")
    for rank in [rank for rank in ranks if rank >= mp]:
        report.problem(FILE, ranks.pop(rank), f"rank {rank} of {mp}")
    stored = {rank: read_header(path) for rank, path in ranks.items()}
    names = (name for tensors in stored.values() for name in tensors)
    present = without_absent_parts(list(checkpoint.weights.values()), names, report)
    pieces: list[Piece] = []
    for rank, tensors in stored.items():
        pieces += _rank_pieces(rank, mp, Tensors(tensors), present, checkpoint.config, report)
    check_file_metadata(ranks.values(), report, PYTORCH_METADATA)
    _check_folder_config(folder, checkpoint, pieces, report)
    if checkpoint.config.version is Version.V41 and not report.foreign:
        _check_inference_config(folder, checkpoint, pieces, report)
    check_files(folder, checkpoint.folder, report)
    return pieces


def _rank_pieces(
    rank: int, mp: int, tensors: Tensors, weights: Iterable[Weight], config: ModelConfig, report: Report
) -> Iterator[Piece]:
    for weight in weights:
        experts = max(1, (config.draft_n_routed_experts if weight.is_draft else config.n_routed_experts) // mp)
        if weight.expert is not None and weight.row.split is Split.EXPERT and weight.expert // experts != rank:
            continue
        source = weight_matrix(weight)
        found = tensors.take(weight.name)
        if found is None:
            report.problem(MISSING, f"rank {rank}: tensor {weight.name}", "not in the shard")
            continue
        if weight.row.split is Split.RUNS:
            yield from _run_piece(rank, mp, weight, found, report)
            continue
        axis = {Split.ROWS: 0, Split.COLUMNS: 1}.get(weight.row.split)
        shape = weight.shape
        if axis is not None:
            shape = (*shape[:axis], shape[axis] // mp, *shape[axis + 1 :])
        matrix = _checked(f"rank{rank}:{weight.name}", found, shape, [weight], FP8_SIDE[config.version], report)
        if matrix is None:
            continue
        dequantised = weight.row.name == DEQUANTISED_IN_SHARDS and source.encoding in QUANTISED
        if dequantised and matrix.encoding != "bf16":
            what = f"expected bf16, got {matrix.encoding}"
            report.problem(LAYOUT, f"rank {rank}: tensor {weight.name}", what)
        at = (0, 0)
        if axis is not None:
            vector = len(weight.shape) == 1
            at = (0, rank * matrix.columns) if vector or axis == 1 else (rank * matrix.rows, 0)
        yield Piece(matrix, shape, (0, 0), source, at, (matrix.rows, matrix.columns))
    for name in tensors.names():
        report.problem(EXTRA, f"rank {rank}: tensor {name}", "not in the source")


def _run_piece(rank: int, mp: int, weight: Weight, found: Found, report: Report) -> Iterator[Piece]:
    """Yield a rank's run of a table's rows; what fills up the last ranks must be zeros with scales of 1."""
    rows = weight.shape[0]
    share = (rows + mp - 1) // mp
    shape = (share, *weight.shape[1:])
    name = f"rank{rank}:{weight.name}"
    matrix = _checked(name, found, shape, [weight], FP8_SIDE[Version.V41], report)
    if matrix is None:
        return
    real = max(0, min(rows - rank * share, share))
    for stored, byte in zip((found.stored, found.scale), (b"\0", b"\x7f"), strict=True):
        if stored is not None and real < share:
            width = stored.nbytes // share
            filled = read_at(stored.file, stored.offset + real * width, (share - real) * width)
            if filled.tobytes().strip(byte):
                what = f"expected rows {real} to {share} to be filled with {byte.hex()}"
                report.problem(PADDING, f"rank {rank}: tensor {weight.name}", what)
    if real:
        yield Piece(matrix, shape, (0, 0), weight_matrix(weight), (rank * share, 0), (real, matrix.columns))


# Besides tensors


def check_file_metadata(files: Iterable[Path], report: Report, expected: Mapping[str, str], *others: object) -> None:
    """Report ``__metadata__`` of safetensors headers that is neither the layout's nor one of ``others``."""
    for path in files:
        report.keys += 1
        found = read_metadata(path)
        if found not in (None, expected, *others) and not report.foreign:
            report.problem(KEY, path, f"{METADATA_KEY}: expected {expected}, got {found!r:.80}")


def check_index(path: Path, stored: Mapping[str, Stored], report: Report) -> None:
    """Report what an index says wrong of its folder."""
    index = read_index(path)
    report.keys += 1
    metadata = index.get("metadata")
    total = sum(tensor.nbytes for tensor in stored.values())
    found = metadata.get("total_size") if isinstance(metadata, dict) else None
    if found != total:
        report.problem(KEY, path, f"total_size: expected {total}, got {found!r:.40}")
    if report.foreign:
        return
    for key in sorted(set(index) - {"metadata", "weight_map"}):
        report.problem(KEY, path, f"unknown key {key}")
    for key in sorted(set(metadata) - {"total_size"}) if isinstance(metadata, dict) else ():
        report.problem(KEY, path, f"unknown key metadata.{key}")


def _check_folder_config(folder: Path, checkpoint: Checkpoint, pieces: list[Piece], report: Report) -> None:
    """Report the keys of config.json that are not the source's, but for what the conversion has to change."""

    def expected_of(found: Mapping[str, Any]) -> Mapping[str, Any]:
        return _without_pruned(_expected_config(checkpoint, pieces, report), found, pieces)

    check_config(folder, expected_of, report)


def check_config(folder: Path, expected_of: Callable[[Mapping[str, Any]], Mapping[str, Any]], report: Report) -> None:
    """Report the keys of config.json that are not the expected ones, which may depend on what it holds."""
    path = folder / CONFIG_NAME
    found = read_reported(path, report)
    if found is None:
        return
    expected = expected_of(found)
    if report.foreign:
        try:
            theirs, ours = parse_config(found, path), parse_config(expected, path)
        except (ConfigError, UnsupportedError) as error:
            report.problem(KEY, path, str(error))
            return
        for field in fields(ours):
            left, right = getattr(ours, field.name), getattr(theirs, field.name)
            if field.compare and field.name not in report.ignored_keys:
                report.keys += 1
                if left != right:
                    key = KEY_OF_FIELD.get(field.name, field.name)
                    what = "describes another model than the source's config.json"
                    report.problem(KEY, path, f"{what}: key {key}: expected {left!s:.200}, got {right!s:.200}")
        return
    check_json_keys(path, expected, found, report, report.ignored_keys)


def _check_inference_config(folder: Path, checkpoint: Checkpoint, pieces: Iterable[Piece], report: Report) -> None:
    """Report the keys of V4.1's config in the inference code's form that are not what the source says."""
    path = folder / INFERENCE_CONFIG_NAME
    found = read_reported(path, report)
    if found is None:
        return
    has_fp4 = any(piece.output.encoding == "fp4" for piece in pieces)
    with_draft = checkpoint.n_draft > 0 and not is_left_out(THE_DRAFT, report)
    expected = inference_config(checkpoint.config.flat, "fp4" if has_fp4 else "fp8", with_draft=with_draft)
    check_json_keys(path, expected, found, report)


def read_reported(path: Path, report: Report, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any] | None:
    """Return a JSON object of the output; None, and a problem, where it is none that can be read."""
    try:
        return read_json_object(path, max_bytes)
    except (ConfigError, InputMissingError, InputOutputError) as error:
        report.problem(FILE, path, str(error))
        return None


def check_json_keys(
    path: Path, expected: Mapping[str, Any], found: Mapping[str, Any], report: Report, ignored: Iterable[str] = ()
) -> None:
    """Report the keys of a JSON object that are not the expected ones."""
    for key in sorted({*expected, *found} - set(ignored)):
        report.keys += 1
        for inner, left, right in _differences(key, expected.get(key, ABSENT), found.get(key, ABSENT)):
            report.problem(KEY, path, f"key {inner}: expected {_shown(left)}, got {_shown(right)}")


def _differences(key: str, left: object, right: object) -> Iterator[tuple[str, object, object]]:
    """Yield (dotted key, expected, found) of all values that differ, inside objects too."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        for inner in sorted({*left, *right}):
            yield from _differences(f"{key}.{inner}", left.get(inner, ABSENT), right.get(inner, ABSENT))
    elif left is ABSENT or right is ABSENT or json.dumps(left, sort_keys=True) != json.dumps(right, sort_keys=True):
        yield key, left, right


def _shown(value: object) -> str:
    """Return a value of a JSON file in a line."""
    if value is ABSENT:
        return "no such key"
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


def _expected_config(checkpoint: Checkpoint, pieces: list[Piece], report: Report) -> dict[str, Any]:
    """Return the source's config as the tensors of source and output say that it must have changed."""
    config = borne_out_config(checkpoint)
    became = dict.fromkeys((piece.source.encoding, piece.output.encoding) for piece in pieces)
    is_quantised = any(output in QUANTISED for _, output in became)
    decoded = [output for source, output in became if source in (*QUANTISED, *DECODED_FIRST)]
    if decoded and not is_quantised:
        for key in ("quantization_config", "expert_dtype"):
            config.pop(key, None)
        config |= dict.fromkeys(("torch_dtype", "dtype"), DTYPE_NAMES[decoded[0]])
    elif any(source in (*FLOATS, *DECODED_FIRST) and output in QUANTISED for source, output in became):
        config = _quantised_config(config, FP8_SIDE[checkpoint.config.version])
    elif ("fp4", "fp4/nv") in became:
        config = {**config, "quantization_config": _nvfp4_quantization(checkpoint, config, pieces)}
    elif ("fp4", "fp8") in became:
        if "text_config" not in config:  # V4.1 says it in one place
            config["expert_dtype"] = "fp8"
        quantization = config.get("quantization_config")
        if isinstance(quantization, dict) and "expert_dtype" in quantization:
            config["quantization_config"] = {**quantization, "expert_dtype": "fp8"}
    elif checkpoint.is_packed and report.layout == FOLDER and ("fp4", "fp4") in became:
        config = _quantised_config(config, FP8_SIDE[checkpoint.config.version])
    else:
        # Floats to floats: what dequantize was asked for is the type that some have now, and F32 stays as it is.
        kinds = [output for source, output in became if source != "f32" and output in FLOATS]
        if kinds and not is_quantised:
            config |= dict.fromkeys(("torch_dtype", "dtype"), DTYPE_NAMES[kinds[0]])
    has_tower = any(is_vision_name(weight.name) for weight in checkpoint.weights.values())
    keeps_tower = is_left_out(THE_MODEL, report) or any(is_vision_name(piece.source.name) for piece in pieces)
    if has_tower and not keeps_tower:
        config = {key: value for key, value in config.items() if not key.startswith("vision_")}
    if checkpoint.n_draft and is_left_out(THE_DRAFT, report):
        config = without_draft(config)
    return config


def _without_pruned(config: dict[str, Any], found: Mapping[str, Any], pieces: list[Piece]) -> dict[str, Any]:
    """Return a config without the keys that ``found`` may leave out: they speak of what the output does not have."""
    has_tower = any(is_vision_name(piece.source.name) for piece in pieces)
    is_quantised = any(piece.output.encoding in QUANTISED for piece in pieces)

    def is_idle(key: str) -> bool:
        if key in ("quantization_config", "expert_dtype"):
            return not is_quantised
        return key.startswith("vision_") and not has_tower

    return {key: value for key, value in config.items() if key in found or not is_idle(key)}


def _modelopt_quantization(pieces: Iterable[Piece]) -> dict[str, Any]:
    """Return what ModelOpt's configs say of a folder with NVFP4 experts."""
    names = [piece.output.name for piece in pieces if piece.output.encoding == "fp4/nv"]
    modules = sorted({name[: name.index(".experts.")] + ".experts" for name in names})
    excluded = ["*.attn.*", "*.ffn.shared_experts.*", "head"]
    if not any(name.startswith("mtp.") for name in names):
        excluded.append("mtp.*")
    return {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "group_size": NVFP4_BLOCK,
        "quantized_layers": {module: {"quant_algo": "NVFP4", "group_size": NVFP4_BLOCK} for module in modules},
        "exclude_modules": excluded,
    }


def _nvfp4_quantization(checkpoint: Checkpoint, config: dict[str, Any], pieces: list[Piece]) -> dict[str, Any]:
    side = FP8_SIDE[checkpoint.config.version]
    said = _modelopt_quantization(pieces)
    group = {"type": "float", "num_bits": 4, "dynamic": False, "group_size": NVFP4_BLOCK}
    return {
        "activation_scheme": "dynamic",
        "weight_block_size": [side, side],
        **config.get("quantization_config", {}),
        **said,
        "quant_method": "fp8",
        "moe_quant_algo": "NVFP4",
        "producer": MODELOPT_PRODUCER,
        "ignore": said["exclude_modules"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": group, "input_activations": group}},
    }


def _check_quant_config(folder: Path, pieces: list[Piece], report: Report) -> None:
    """Report the keys of hf_quant_config.json that are not what NVFP4 experts need; others need no such file."""
    path = folder / HF_QUANT_CONFIG_NAME
    if not any(piece.output.encoding == "fp4/nv" for piece in pieces):
        return
    found = read_reported(path, report)
    if found is None:
        return
    expected = {"producer": MODELOPT_PRODUCER, "quantization": _modelopt_quantization(pieces)}
    if not report.foreign:
        check_json_keys(path, expected, found, report)


def _quantised_config(config: dict[str, Any], side: int) -> dict[str, Any]:
    """Return a config with what the published ones say of FP8 weights in blocks of ``side`` and FP4 experts."""
    quantization: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "scale_fmt": "ue8m0"}
    quantization["weight_block_size"] = [side, side]
    config = config | {key: "bfloat16" for key in ("torch_dtype", "dtype") if key in config}
    if "text_config" in config:
        return {**config, "quantization_config": {**quantization, "expert_dtype": "fp4"}}
    return {**config, "quantization_config": {**quantization, "fmt": "e4m3"}, "expert_dtype": "fp4"}


def without_draft(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without what it says of draft layers, in V4.1's object of the text model too."""
    nested = config.get("text_config")
    text = {key: value for key, value in (nested or config).items() if not key.startswith("dspark_")}
    text["num_nextn_predict_layers"] = 0
    if "compress_ratios" in text:
        text["compress_ratios"] = text["compress_ratios"][: text["num_hidden_layers"]]
    return {**config, "text_config": text} if nested else text


def borne_out_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the source's config without what its own tensors say is wrong."""
    config = dict(checkpoint.config.raw)
    layers = checkpoint.config.num_hidden_layers
    said = config.get("text_config", config)
    if not checkpoint.n_draft and (
        said.get("num_nextn_predict_layers") or any(key.startswith("dspark_") for key in said)
    ):
        config = without_draft(config)
    if "compress_ratios" in config and checkpoint.config.version is Version.V4:
        ratios = [0 if ratio == 1 else ratio for ratio in config["compress_ratios"]]
        config["compress_ratios"] = ratios + [0] * (layers + checkpoint.n_draft - len(ratios))
    held = {w.encoding.value for w in checkpoint.weights.values() if w.expert is not None and not w.is_draft}
    if held in ({"fp4"}, {"fp8"}):
        (dtype,) = held
        quantization = config.get("quantization_config")
        if config.get("expert_dtype") is not None:
            config["expert_dtype"] = dtype
        if isinstance(quantization, dict) and quantization.get("expert_dtype") is not None:
            config["quantization_config"] = {**quantization, "expert_dtype": dtype}
    return config


def check_files(folder: Path, source: Path, report: Report) -> None:
    """Report files next to the weights that are not the source's."""
    for name in NEEDED_FILES + OTHER_FILES:
        original, copy = source / name, folder / name
        if not is_file(original):
            continue
        if not is_file(copy):
            if name in NEEDED_FILES and not report.foreign:
                report.problem(FILE, copy, "missing from the output")
            continue
        if report.foreign:
            continue
        report.keys += 1
        position = _first_difference(original, copy)
        if position is not None:
            report.problem(FILE, copy, f"differs from the source's from byte {position} on")


def _first_difference(left: Path, right: Path) -> int | None:
    """Return the first byte in which two files differ, None where they are the same."""
    position = 0
    with open_regular(left) as a, open_regular(right) as b:
        while True:
            first, second = a.read(COPY_BYTES), b.read(COPY_BYTES)
            if first != second:
                pairs = enumerate(zip(first, second, strict=False))
                return position + next((i for i, (x, y) in pairs if x != y), min(len(first), len(second)))
            if not first:
                return None
            position += len(first)
