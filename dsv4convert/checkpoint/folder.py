"""Opens a Hugging Face checkpoint folder: config, index, headers; every tensor accounted for.

Nothing of the weights is read. Whatever is missing, unknown, duplicate or misshapen ends here, with
one line that names it.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from ..containers.folder_names import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from ..containers.json_object import read_json_object
from ..containers.safetensors import Stored, read_header
from ..containers.sources import prefetch_heads, shown, unlisted
from ..errors import (
    ConfigError,
    Dsv4Error,
    FileFormatError,
    InputMissingError,
    InputOutputError,
    InventoryError,
    UnsupportedError,
    UsageError,
    and_more,
    check_choice,
    counted,
)
from ..model.config import ModelConfig, Version, load_config
from ..model.engram import check_rows
from ..model.tensors import (
    DRAFT_PREFIX,
    UNUSED_DRAFT_SUFFIXES,
    Draft,
    checkpoint_tensors,
    is_draft_alone,
    is_vision_name,
    scale_name,
)
from .layouts import NUMBERED_FILE, TENSORS_DISAGREE, name_layout
from .packed import INPUT_SCALES, config_without_forms, forms_of, is_packed
from .renaming import official_name, official_tensors, zero_name
from .weights import Weight, needs_scale, pair

# More than V4-Pro has; a forged config could ask for hundreds of millions.
MAX_MISSING = 200_000

# How to find out which file holds a tensor: by the index where there is one, or by the headers of all files.
BY_INDEX, BY_HEADERS = INDEX_MODES = ("file", "headers")
MAX_NUMBERED = 10_000

# How many files, and kinds of tensors, an error names.
MAX_HOLDERS = 3
MAX_KINDS = 3
CHECK_DOWNLOAD = "check that the download is complete and that config.json belongs to these weights"
GO_BY_HEADERS = (
    "download index and files from one revision, go by the files with --index headers, or write the index anew with "
    "mend --reindex"
)

# 145,116 names of V4-Pro make 13 MB.
MAX_INDEX_BYTES = 32 * 2**20

TRUNK_NAME = re.compile(r"layers\.(\d+)\.")
DRAFT_NAME = re.compile(r"mtp\.(\d+)\.")
VISION_BIAS = ".ffn.gate.bias_vl"
DSPARK_MARKS = (".main_proj.weight", ".markov_head.markov_w1.weight", ".markov_head.embed.weight")


@dataclass(frozen=True)
class Unused:
    """Source tensors that no output needs, and why."""

    names: tuple[str, ...]
    nbytes: int
    reason: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, read from headers alone and checked against the name tables.

    ``weights`` holds every weight under its official name in the published order; scales are inside
    their weights. ``unused`` lists what the folder holds and no conversion reads; ``is_packed`` says that tensors have
    forms of ModelOpt or compressed-tensors (see ``packed``).
    """

    folder: Path
    config: ModelConfig
    weights: Mapping[str, Weight]
    draft: Draft
    n_draft: int
    files: tuple[Path, ...]
    n_tensors: int
    unused: tuple[Unused, ...] = ()
    notes: tuple[str, ...] = field(default=())
    is_packed: bool = False

    @property
    def nbytes(self) -> int:
        """Return the payload bytes of all weights and scales."""
        return sum(weight.nbytes for weight in self.weights.values())


def open_folder(
    folder: Path,
    *,
    draft_wanted: bool = True,
    index: str = BY_INDEX,
) -> Checkpoint:
    """Open the checkpoint in ``folder``.

    Without ``draft_wanted``, a draft that is not whole is listed as unused: it cannot block the trunk. ``index``
    "headers" goes by the headers of all files, whatever an index says. Folders in a layout that is known and not
    read are named as such.

    Raises:
        InputMissingError: the folder or a file of it is not there.
        InputOutputError: the system refused to read one.
        ConfigError, UnsupportedError: see ``load_config``.
        FileFormatError: a malformed index or safetensors file.
        InventoryError: missing, unknown, duplicate or misshapen tensors.
    """
    try:
        config = load_config(folder)
        headers = read_folder_headers(folder, index)
        return resolve(folder, config, *headers) if draft_wanted else _resolve_the_trunk(folder, config, headers)
    except (UsageError, InputOutputError):
        raise
    except Dsv4Error as error:
        if os.path.isfile(folder):
            raise _not_a_folder(folder) from None
        raise name_layout(folder, error) from None


def _not_a_folder(file: Path) -> Dsv4Error:
    """Return the error of a file that was given for a checkpoint's folder."""
    if file.suffix == ".gguf":
        return UnsupportedError(
            "a GGUF file cannot be converted",
            where=file,
            hint="pass the folder of the safetensors checkpoint; inspect, forward and verify read GGUF files",
        )
    return InputMissingError("a file, not a folder", where=file, hint=f"pass its folder, {shown(file.parent)}")


def _resolve_the_trunk(folder: Path, config: ModelConfig, headers: FolderHeaders) -> Checkpoint:
    """Resolve a folder; where its draft is what is wrong, resolve the rest and list the draft as unused."""
    stored, files, notes = headers
    try:
        return resolve(folder, config, stored, files, notes)
    except (ConfigError, InventoryError) as error:
        draft = {name: tensor for name, tensor in stored.items() if official_name(name).startswith(DRAFT_PREFIX)}
        if not draft:
            raise
        trunk = {name: tensor for name, tensor in stored.items() if name not in draft}
        reason = f"a draft that is not whole ({error.what})"
        try:
            found = resolve(folder, config, trunk, files, notes)
        except (ConfigError, InventoryError):
            raise error from None
    unused = Unused(tuple(draft), sum(tensor.nbytes for tensor in draft.values()), reason)
    return replace(found, unused=(*found.unused, unused), n_tensors=len(stored))


# Of a folder: its tensors by name as stored, the files that hold them, and notes on others.
FolderHeaders: TypeAlias = tuple[dict[str, Stored], tuple[Path, ...], tuple[str, ...]]


def read_folder_headers(folder: Path, index: str = BY_INDEX) -> FolderHeaders:
    """Return the headers of a folder with or without an index.

    Without one, a complete set of numbered files, or a single file, is read by its headers; ``index`` "headers" reads
    every safetensors file of the folder so, whatever an index says.

    Raises:
        InputMissingError, FileFormatError, InventoryError: as for ``open_folder``.
        UsageError: ``index`` is none of ``INDEX_MODES``.
    """
    check_choice("--index", index, INDEX_MODES)
    index_path = folder / INDEX_NAME
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if index == BY_HEADERS and names:
        return (*_by_headers(folder, names), (f"all {len(names)} safetensors files are read, by their headers",))
    # What has the index's name is read as one: a link that leads nowhere is an error, not a folder without an index.
    if os.path.lexists(index_path):
        weight_map = read_index(index_path)["weight_map"]
        names = sorted(set(weight_map.values()))
        prefetch_heads(folder / name for name in names)
        headers = {name: read_header(folder / name) for name in names}
        return (
            _merge_indexed(weight_map, headers, index_path),
            tuple(folder / n for n in names),
            _strays(folder, names),
        )
    if SINGLE_NAME in names or (len(names) == 1 and NUMBERED_FILE.fullmatch(names[0]) is None):
        single = SINGLE_NAME if SINGLE_NAME in names else names[0]
        return read_header(folder / single), (folder / single,), _strays(folder, [single])
    if not names:
        raise InputMissingError(
            "no safetensors files",
            where=folder,
            expected=f"{INDEX_NAME} or {SINGLE_NAME}",
            hint=unlisted(folder) or "is the download complete?",
        )
    numbered = _complete_set(folder, names)
    note = f"no {INDEX_NAME}: {len(numbered)} numbered files are read by their headers"
    return (*_by_headers(folder, numbered), (note, *_strays(folder, numbered)))


def _by_headers(folder: Path, names: Sequence[str]) -> tuple[dict[str, Stored], tuple[Path, ...]]:
    """Return the tensors of files, and the files."""
    stored: dict[str, Stored] = {}
    prefetch_heads(folder / name for name in names)
    for name in names:
        for tensor_name, tensor in read_header(folder / name).items():
            if tensor_name in stored:
                raise InventoryError(
                    f"duplicate tensor {tensor_name}",
                    where=tensor.file,
                    got=f"also in {stored[tensor_name].file.name}",
                    hint="move the file that does not belong here out of the folder",
                )
            stored[tensor_name] = tensor
    return stored, tuple(folder / name for name in names)


def _complete_set(folder: Path, names: Iterable[str]) -> list[str]:
    """Return the files of the one numbered set that there is.

    Raises:
        InputMissingError: no set of numbered files, several, or one that is not complete.
    """
    sets: dict[tuple[str, int], dict[int, str]] = {}
    for name in names:
        found = NUMBERED_FILE.fullmatch(name)
        if found is not None:
            sets.setdefault((found[1], int(found[3])), {})[int(found[2])] = name
    if len(sets) != 1:
        raise InputMissingError(f"{INDEX_NAME} is missing", where=folder, hint="download the index file as well")
    ((stem, count), files) = next(iter(sets.items()))
    absent = [number for number in range(1, count + 1) if number not in files] if count <= MAX_NUMBERED else [count]
    if absent:
        raise InputMissingError(
            f"file {absent[0]} of {count} is missing{and_more(absent)}",
            where=folder,
            expected=f"{stem}N-of-{count}.safetensors for N from 1 to {count}",
            got=f"{counted(len(files), 'file')}, without {INDEX_NAME}",
            hint="is the download complete?",
        )
    return [files[number] for number in range(1, count + 1)]


def read_index(path: Path) -> dict[str, Any]:
    """Return an index whose ``weight_map`` leads every tensor to a plain file name.

    Raises:
        InputMissingError: the file is not there or cannot be read.
        FileFormatError: it is no such index.
    """
    index = read_json_object(path, MAX_INDEX_BYTES, error=FileFormatError, hint="download the index again")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileFormatError("key weight_map is missing, empty or not an object", where=path)
    for name, file_name in weight_map.items():
        if (
            not isinstance(file_name, str)
            or file_name in ("", ".", "..")
            or "/" in file_name
            or os.sep in file_name
            or "\0" in file_name
        ):
            raise FileFormatError(
                f"tensor {name!r}: the file name is not a plain name",
                where=path,
                got=repr(file_name)[:100],
            )
    return index


def _merge_indexed(
    weight_map: Mapping[str, str], headers: Mapping[str, Mapping[str, Stored]], index_path: Path
) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    for file_name, header in headers.items():
        for name, tensor in header.items():
            if name in stored:
                raise InventoryError(
                    f"duplicate tensor {name}", where=tensor.file, got=f"also in {stored[name].file.name}"
                )
            listed = weight_map.get(name)
            if listed != file_name:
                raise InventoryError(
                    f"tensor {name}: the index and the file disagree",
                    where=index_path,
                    expected=f"in {file_name}",
                    got="not listed" if listed is None else f"in {listed}",
                    hint=GO_BY_HEADERS,
                )
            stored[name] = tensor
    if len(stored) != len(weight_map):
        name = next(name for name in weight_map if name not in stored)
        raise InventoryError(
            f"tensor {name} is listed in the index and missing from the file",
            where=index_path,
            expected=f"in {weight_map[name]}",
            hint=GO_BY_HEADERS,
        )
    return stored


def _strays(folder: Path, used: Iterable[str]) -> tuple[str, ...]:
    """Return notes on safetensors files that the index does not name, and on what they hold."""
    notes: list[str] = []
    for name in sorted({path.name for path in folder.glob("*.safetensors")} - set(used)):
        held = list(_stray_names(folder / name))
        holds = f" ({counted(len(held))} such as {held[0]}; --index headers reads it)" if held else ""
        notes.append(f"{name}: not named by the index, not read{holds}")
    return tuple(notes)


def _stray_names(path: Path) -> Iterator[str]:
    """Yield the official names of the tensors of a file, none where it cannot be read."""
    try:
        yield from map(official_name, read_header(path))
    except Dsv4Error:
        return


def _holders(folder: Path, files: Iterable[Path], missing: Iterable[str]) -> str | None:
    """Return which unread files hold the missing tensors."""
    used, wanted = {path.name for path in files}, set(missing)
    found: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        count = 0 if path.name in used else len(wanted & set(_stray_names(path)))
        if count:
            found.append(f"{path.name} holds {count:,} of them")
    return f"{' and '.join(found[:MAX_HOLDERS])}: --index headers reads it" if found else None


def _describe_missing(missing: Sequence[str], expected: Counter[str]) -> str:
    """Return how many tensors are missing and of which kinds: "96 tensors missing, all experts' scales"."""
    kinds = Counter(map(_kind, missing)).most_common()
    parts = [f"all {kind}" if count == expected[kind] else f"{kind} ({count:,})" for kind, count in kinds[:MAX_KINDS]]
    more = ["others"] if kinds[MAX_KINDS:] else []
    return f"{len(missing):,} tensors missing, {', '.join([*parts, *more])}: {missing[0]} and others"


def _kind(name: str) -> str:
    """Return which kind of tensor a name is of, for counting."""
    draft = "the draft's " if name.startswith(DRAFT_PREFIX) else ""
    is_scale = name.endswith(".scale")
    if ".ffn.experts." in name:
        return f"{draft}experts' {'scales' if is_scale else 'weights'}"
    rest = re.sub(r"^(?:layers|mtp|vision\.blocks)\.\d+\.", "", name)
    return f"{draft}{rest}" if draft or rest == name else f"{rest} of layers"


def draft_alone(folder: Path) -> InventoryError:
    """Return the error of a folder that holds a draft and no model."""
    return InventoryError(
        "a draft without its model, as --draft only and split write it",
        where=folder,
        hint="pass the folder with the whole model; inspect and verify read the draft's",
    )


def resolve(
    folder: Path,
    config: ModelConfig,
    stored: Mapping[str, Stored],
    files: tuple[Path, ...],
    notes: tuple[str, ...] = (),
) -> Checkpoint:
    """Check tensors against the tables and pair them: every one is claimed exactly once, or listed as unused.

    Raises:
        InventoryError: missing, unknown, duplicate or misshapen tensors.
    """
    tensors = official_tensors(stored, config.n_experts)
    if is_draft_alone(tensors):
        raise draft_alone(folder)
    draft, n_draft = draft_kind(tensors, folder)
    check_roles_of_tensors(tensors, config, folder)
    if config.engram is not None:
        check_rows(config.engram, folder / CONFIG_NAME)
    weights: dict[str, Weight] = {}
    missing: list[str] = []
    unscaled: dict[str, Stored] = {}
    left = dict(tensors)
    has_forms = is_packed(stored)
    if has_forms:
        config = replace(config, raw=config_without_forms(config.raw))
    config = with_draft_layers(config, draft, n_draft)
    has_vision, has_tower = vision_kind(tensors)
    scale_fmt = stated_scale_fmt(config)
    for expected in checkpoint_tensors(config, draft, n_draft, has_vision=has_vision, has_tower=has_tower):
        weight = left.pop(expected.name, None)
        if weight is None:
            missing.append(expected.name)
            if len(missing) > MAX_MISSING:
                break
            continue
        scale = left.pop(scale_name(expected.name), None) if expected.name.endswith(".weight") else None
        if scale is None and needs_scale(weight):
            missing.append(scale_name(expected.name))
            unscaled[expected.name] = weight
            continue
        zero = left.pop(zero_name(expected.name), None) if has_forms else None
        weights[expected.name] = pair(expected, weight, scale, scale_fmt=scale_fmt, zero=zero)
    unused, unknown = _sort_leftovers(left)
    if missing:
        if len(missing) > 1:
            scales = [scale_name(name) for name, weight in weights.items() if weight.scale is not None]
            what = _describe_missing(missing, Counter(map(_kind, [*weights, *scales, *missing, *unscaled])))
        elif missing[0].endswith(".scale") and unscaled:
            unscaled_dtype = next(iter(unscaled.values())).dtype
            what = f"tensor {missing[0]} is missing, the scale of a {unscaled_dtype} weight"
        else:
            what = f"tensor {missing[0]} is missing" + (" (its scale is not)" if scale_name(missing[0]) in left else "")
        raise InventoryError(
            what,
            where=folder,
            expected=f"{len(weights) + len(missing)} weights" + (" or more" if len(missing) > MAX_MISSING else ""),
            got=len(weights),
            hint=_holders(folder, files, missing) or CHECK_DOWNLOAD,
        )
    if unknown:
        name = unknown[0]
        orphan = name.endswith(".scale") and name.removesuffix(".scale") + ".weight" not in tensors
        raise InventoryError(
            f"tensor {name}: {'a scale without its weight' if orphan else 'unknown'}{and_more(unknown)}",
            where=left[name].file,
            hint=f"check that this is a DeepSeek-{config.version.value} checkpoint; unknown tensors are never dropped",
        )
    notes = (*notes, *_vision_note(config, has_tower), *forms_of(weights.values()))
    held = MappingProxyType(weights)
    return Checkpoint(folder, config, held, draft, n_draft, files, len(stored), unused, notes, has_forms)


def stated_scale_fmt(config: ModelConfig) -> object:
    """Return what config.json says of the format of scales, None where it says nothing."""
    quantization = config.raw.get("quantization_config")
    inner = quantization.get("scale_fmt") if isinstance(quantization, Mapping) else None
    return inner if inner is not None else config.raw.get("scale_fmt")


def draft_kind(tensors: Mapping[str, Stored], folder: Path) -> tuple[Draft, int]:
    """Tell MTP from DSpark by the tensors, and count the draft layers.

    Raises:
        InventoryError: their numbers have a gap.
    """
    numbers = {int(found[1]) for name in tensors if (found := DRAFT_NAME.match(name)) is not None}
    if not numbers:
        return Draft.NONE, 0
    n_draft = max(numbers) + 1
    if len(numbers) != n_draft:
        absent = next(number for number in range(n_draft) if number not in numbers)
        raise InventoryError(f"draft layer mtp.{absent} is missing", where=folder, got=f"mtp.{n_draft - 1}")
    is_dspark = any(name.startswith("mtp.") and name.endswith(DSPARK_MARKS) for name in tensors)
    return (Draft.DSPARK if is_dspark else Draft.MTP), n_draft


# What only the layers of a role have, and the config key that says which those are.
ROLE_MARKS = (
    ("kv_source_layer_ids", "attn.compressor.wkv.weight"),
    ("index_source_layer_ids", "attn.indexer.weights_proj.weight"),
)


def check_roles_of_tensors(names: Iterable[str], config: ModelConfig, folder: Path) -> None:
    """Check that the layers which the config calls sources have the tensors of sources, and no others have.

    Raises:
        ConfigError: they do not; names the config key and the layers.
    """
    if config.version is not Version.V41:
        return
    found: dict[str, set[int]] = {mark: set() for _, mark in ROLE_MARKS}
    for name in names:
        match = TRUNK_NAME.match(name)
        if match is not None and name[match.end() :] in found:
            found[name[match.end() :]].add(int(match[1]))
    for key, mark in ROLE_MARKS:
        layers, claimed = sorted(found[mark]), list(getattr(config, key))
        if layers != claimed:
            raise ConfigError(
                f"key {key}{TENSORS_DISAGREE}{mark} disagree",
                where=folder / CONFIG_NAME,
                expected=layers,
                got=claimed,
                hint=CHECK_DOWNLOAD,
            )


def with_draft_layers(config: ModelConfig, draft: Draft, n_draft: int) -> ModelConfig:
    """Return ``config`` with the number of MTP layers that there are, and a ratio for every draft layer.

    Stages of DSpark are counted by the tensors alone: V4's folders hold three and say 1. transformers' form and many a
    folder list no ratios of drafts.
    """
    if draft is Draft.MTP and config.num_nextn_predict_layers != n_draft:
        # Surplus ratios go with a wrong number; where none is stated, the list stays as it is.
        is_stated = "num_nextn_predict_layers" in config.flat
        ratios = config.compress_ratios[: config.num_hidden_layers + n_draft if is_stated else None]
        config = replace(config, num_nextn_predict_layers=n_draft, compress_ratios=ratios)
    lacking = max(0, n_draft - config.n_draft_ratios)
    return replace(config, compress_ratios=config.compress_ratios + (0,) * lacking) if lacking else config


def vision_kind(names: Iterable[str]) -> tuple[bool, bool]:
    """Return whether the routers have their bias for images, and whether there is a vision tower."""
    has_bias = has_tower = False
    for name in names:
        has_bias = has_bias or name.endswith(VISION_BIAS)
        has_tower = has_tower or is_vision_name(name)
    return has_bias, has_tower


def _vision_note(config: ModelConfig, has_tower: bool) -> tuple[str, ...]:
    if has_tower or not config.has_vision:
        return ()
    return (f"{CONFIG_NAME} speaks of a vision tower and no tensor is of one: read as a text model",)


def _sort_leftovers(left: Mapping[str, Stored]) -> tuple[tuple[Unused, ...], list[str]]:
    """Split what no row claimed into (known and never read, unknown)."""
    copies = [
        name
        for name in left
        if (found := DRAFT_NAME.match(name)) is not None and name[found.end() :] in UNUSED_DRAFT_SUFFIXES
    ]
    inputs = [name for name in left if name.endswith(INPUT_SCALES)]
    kinds = (
        (copies, "the draft shares the trunk's embedding and head"),
        (inputs, "scales of activations, of NVFP4 only"),
    )
    unused = (Unused(tuple(names), sum(left[n].nbytes for n in names), why) for names, why in kinds if names)
    known = {*copies, *inputs}
    return tuple(unused), [name for name in left if name not in known]
