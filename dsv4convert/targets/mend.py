"""``mend``: a checkpoint folder with its index, draft, config or names put right; files that stay are shared."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ..checkpoint.folder import BY_HEADERS, BY_INDEX, Checkpoint
from ..checkpoint.graft import is_draft_name
from ..checkpoint.meaning import open_checked
from ..checkpoint.model_card import MODEL_CARD_NAME
from ..checkpoint.weights import Weight
from ..containers.folder_names import CONFIG_NAME, INDEX_NAME, file_names
from ..containers.json_object import MAX_CONFIG_BYTES, parse_json_object
from ..containers.safetensors import Stored, read_header
from ..containers.untrusted import open_regular, read_whole
from ..containers.wide_scales import E8M0, stored_dtype
from ..engine.conversion import Summary
from ..engine.links import COPY, HARD_LINK, REFLINK, can_share
from ..errors import UnsupportedError, UsageError, check_choice, counted, first_of, not_read
from ..model.config import Version
from ..model.tensors import scale_name
from ..plan import CopySegments, Dropped, OutputFile, OutputTensor, Plan
from .claims import dropped_unused
from .companions import auxiliary_files, check_apart, folder_plan
from .drafts import DROP, KEEP, choose_draft
from .hf_folder import NAMES, NO_MODULE, index_files, json_file, kinds_of, transformers_name
from .output_config import VISION_KEY_PREFIX, pruned_config
from .safetensors_files import safetensors_file, unplaced_tensor, whole_file
from .segments import join_segments

MEND = "mend"

OFFICIAL, TRANSFORMERS = NAMES
DROP_REASON, GRAFT_REASON = "--drop-draft", "--graft-draft puts another in its place"

# How files were made that are the source's, as a note says it.
SHARING_NOTES = {
    REFLINK: "shared by reflink, each folder's its own when changed",
    HARD_LINK: "shared by hard link: a change in place would be one in both folders",
    COPY: "copied, since sharing is not possible",
}

# How many other files of a source a note names.
MAX_NAMED = 4


@dataclass(frozen=True)
class Mends:
    """What to put right; ``rename`` is official or transformers, None leaves the names as they are."""

    reindex: bool = False
    drop_draft: bool = False
    graft_draft: Path | None = None
    prune_config: bool = False
    rename: str | None = None


@dataclass(frozen=True)
class MendSummary(Summary):
    """A ``Summary`` with how the files were made that are the source's: how many in which way, and the bytes shared."""

    links: Mapping[str, int]
    shared_bytes: int


_Place: TypeAlias = tuple[Path, int]  # a file and an offset in it


class _Wanted(NamedTuple):
    """A tensor of the output: its name and shape, and what lies in the source, one behind the other, to make it."""

    name: str
    shape: tuple[int, ...]
    parts: list[Stored]


def plan_mend(source: Path, out: Path, mends: Mends, *, strict: bool = False) -> Plan:
    """Plan ``mend``: the folder ``out`` with the tensors of ``source``, bit for bit, and with ``mends`` made.

    Raises:
        UsageError: nothing to mend, an unknown naming, folders that overlap, or two drafts.
        UnsupportedError: NVFP4 weights; transformers' names for V4.1, or for scales that cannot be stacked.
        Dsv4Error: whatever is wrong with the source.
    """
    _check(mends)
    checkpoint, config, left_out = _open(source, mends, strict=strict)
    out = check_apart(checkpoint.folder, checkpoint.files, out)
    if mends.graft_draft is not None:
        check_apart(mends.graft_draft, checkpoint.files, out)
    headers = {path: read_header(path) for path in checkpoint.files}
    left_out += _replaced_draft(checkpoint, headers, mends)
    wanted, nameless = _wanted(checkpoint, headers, mends)
    left_out += nameless
    if mends.prune_config:
        config = pruned_config(config, checkpoint.weights.values())
    if mends.rename == TRANSFORMERS:
        config = {key: value for key, value in config.items() if not key.startswith(VISION_KEY_PREFIX)}
    files = _tensor_files(wanted, headers, _e8m0_in_bytes(checkpoint, headers))
    beside = auxiliary_files(source, also=(MODEL_CARD_NAME,))
    # First a file that is never shared: by it an interrupted run knows its folder again.
    all_files = (_config_file(checkpoint, config), *files, *index_files(files), *beside)
    options = {**asdict(mends), "graft_draft": mends.graft_draft is not None}
    notes = _not_taken_over(source, checkpoint.files, beside)
    return folder_plan(MEND, checkpoint, out, all_files, left_out, options, notes)


def _check(mends: Mends) -> None:
    if mends == Mends():
        raise UsageError(
            "nothing to mend",
            expected="one or more of --reindex, --drop-draft, --graft-draft, --prune-config and --rename",
        )
    if mends.rename is not None:
        check_choice("--rename", mends.rename, NAMES)


def _open(source: Path, mends: Mends, *, strict: bool) -> tuple[Checkpoint, Mapping[str, Any], list[Dropped]]:
    """Return the checkpoint with the draft that the output has, its config, and what is left out so far."""
    without_draft = mends.drop_draft and mends.graft_draft is None
    checkpoint = open_checked(
        source,
        draft_wanted=not without_draft,
        strict=strict,
        index=BY_HEADERS if mends.reindex else BY_INDEX,
        draft_from=mends.graft_draft,
    )
    left_out = dropped_unused(checkpoint)
    checkpoint, config, dropped = choose_draft(checkpoint, DROP if without_draft else KEEP)
    left_out += [replace(entry, reason=DROP_REASON) for entry in dropped]
    if checkpoint.is_packed:
        raise UnsupportedError(
            "weights of NVFP4 or compressed-tensors, some of whose tensors mend would leave behind",
            where=source,
            hint="run requantize first, which gives them the published layout",
        )
    if mends.rename == TRANSFORMERS and checkpoint.config.version is Version.V41:
        raise UnsupportedError("--rename transformers: transformers has no modules for DeepSeek-V4.1", where=source)
    return checkpoint, config, left_out


def _replaced_draft(
    checkpoint: Checkpoint, headers: Mapping[Path, Mapping[str, Stored]], mends: Mends
) -> list[Dropped]:
    """Return the source's own draft as left out where another one takes its place.

    Raises:
        UsageError: it was not asked to go.
    """
    if mends.graft_draft is None:
        return []
    own = [
        tensor
        for path, header in headers.items()
        if path.parent == checkpoint.folder
        for name, tensor in header.items()
        if is_draft_name(name)
    ]
    if own and not mends.drop_draft:
        raise UsageError(
            "--graft-draft: the source has a draft already",
            where=checkpoint.folder,
            hint="pass --drop-draft as well to replace it",
        )
    return [Dropped("mtp.*", GRAFT_REASON, len(own), sum(t.nbytes for t in own))] if own else []


def _wanted(
    checkpoint: Checkpoint, headers: Mapping[Path, Mapping[str, Stored]], mends: Mends
) -> tuple[list[_Wanted], list[Dropped]]:
    """Return the tensors of the output, and what has no name there."""
    if mends.rename is None:
        return list(_under_their_names(checkpoint, headers)), []
    lying = {(t.file, t.offset, t.nbytes): t for header in headers.values() for t in header.values()}
    weights = checkpoint.weights.values()
    if mends.rename == OFFICIAL:
        return [wanted for weight in weights for wanted in _stack(weight.name, [weight], lying)], []
    groups: dict[str | None, list[Weight]] = {}
    for weight in weights:
        groups.setdefault(transformers_name(weight), []).append(weight)
    nameless = groups.pop(None, [])
    dropped = [stored for weight in nameless for stored in _parts(weight)]
    left_out = [Dropped(kinds_of(nameless), NO_MODULE, len(dropped), sum(stored.nbytes for stored in dropped))]
    named = [wanted for name, group in groups.items() if name for wanted in _stack(name, group, lying)]
    return named, left_out if dropped else []


def _under_their_names(checkpoint: Checkpoint, headers: Mapping[Path, Mapping[str, Stored]]) -> Iterator[_Wanted]:
    """Yield every tensor that a weight of the checkpoint, or its scale, is or is a part of."""
    spans: dict[Path, set[int]] = {path: set() for path in headers}
    for weight in checkpoint.weights.values():
        for stored in _parts(weight):
            spans[stored.file].add(stored.offset)
    for path, header in headers.items():
        for name, tensor in header.items():
            # A stack begins with the first expert's weight.
            if tensor.offset in spans[path] and tensor.nbytes:
                yield _Wanted(name, tensor.shape, [tensor])


def _parts(weight: Weight) -> Iterator[Stored]:
    yield weight.stored
    if weight.scale is not None:
        yield weight.scale


def _stack(name: str, group: Sequence[Weight], lying: Mapping[tuple[Path, int, int], Stored]) -> Iterator[_Wanted]:
    """Yield a weight under ``name`` and its scale; of several experts, all of them one behind the other."""
    first = group[0]
    is_official = name == first.name
    is_stack = not is_official and first.expert is not None
    stacks = {name: [weight.stored for weight in group]}
    if first.scale is not None:
        scales = [weight.scale for weight in group if weight.scale is not None]
        if len(scales) != len(group):
            raise UnsupportedError(
                f"tensor {first.name}: experts with and without scales cannot be stacked", where=first.stored.file
            )
        if is_stack and first.block is not None and first.shape[0] % first.block[0]:
            raise UnsupportedError(
                f"tensor {first.name}: cannot be stacked, an expert's rows end inside a scale block",
                where=first.stored.file,
                expected=f"a multiple of {first.block[0]} rows",
                got=first.shape[0],
            )
        stacks[scale_name(name) if is_official else f"{name}_scale_inv"] = scales
    for made, parts in stacks.items():
        found = [_as_it_lies(part, lying) for part in parts]
        shape = found[0].shape
        if len({(part.dtype, part.shape) for part in found}) > 1:
            raise UnsupportedError(
                f"tensor {first.name}: cannot be stacked, the experts of the layer are not stored alike",
                where=first.stored.file,
            )
        if is_stack:
            experts = len({weight.expert for weight in group})
            shape = (experts, len(group) // experts * shape[0], *shape[1:])
        yield _Wanted(made, shape, found)


def _as_it_lies(part: Stored, lying: Mapping[tuple[Path, int, int], Stored]) -> Stored:
    """Return a tensor with the type that its file gives it, whatever it is read as.

    Its shape stays: the only expert of a stack lies where the stack does.
    """
    found = lying.get((part.file, part.offset, part.nbytes))
    return part._replace(dtype=stored_dtype(part) if found is None else found.dtype, scale_form=None)


def _e8m0_in_bytes(checkpoint: Checkpoint, headers: Mapping[Path, Mapping[str, Stored]]) -> frozenset[_Place]:
    """Return where E8M0 scales lie that their file calls U8."""
    in_bytes = {(t.file, t.offset) for header in headers.values() for t in header.values() if t.dtype == "U8"}
    scales = (weight.scale for weight in checkpoint.weights.values() if weight.scale is not None)
    return frozenset(
        place for scale in scales if scale.dtype == E8M0 and (place := (scale.file, scale.offset)) in in_bytes
    )


def _tensor_files(
    wanted: Iterable[_Wanted], headers: Mapping[Path, Mapping[str, Stored]], e8m0: Container[_Place]
) -> list[OutputFile]:
    """Return the safetensors files: each source file that keeps something, as it is or written anew.

    ``e8m0`` is where bytes are such scales, of which those that are NaN are to be counted.
    Names stay while the set of files does; otherwise the files are numbered anew.
    """
    groups: dict[Path, list[_Wanted]] = {path: [] for path in headers}
    for tensor in wanted:
        groups[tensor.parts[0].file].append(tensor)
    kept = [path for path, tensors in groups.items() if tensors]
    names = [path.name for path in kept]
    if len(kept) != len(groups) or len({path.parent for path in kept}) > 1:
        names = file_names(len(kept))
    return [
        _same_file(name, path, headers[path], e8m0)
        if _is_untouched(groups[path], headers[path])
        else safetensors_file(name, [_copied(tensor, e8m0) for tensor in groups[path]])
        for name, path in zip(names, kept, strict=True)
    ]


def _is_untouched(tensors: Sequence[_Wanted], header: Mapping[str, Stored]) -> bool:
    return len(tensors) == len(header) and all(
        len(tensor.parts) == 1 and header.get(tensor.name) == tensor.parts[0] for tensor in tensors
    )


def _same_file(name: str, path: Path, header: Mapping[str, Stored], e8m0: Container[_Place]) -> OutputFile:
    """Return a file of the source as one of the output."""
    ordered = sorted(header.items(), key=lambda entry: entry[1].offset)
    start = ordered[0][1].offset
    tensors = tuple(
        OutputTensor(tensor_name, tensor.dtype, tensor.shape, tensor.offset, tensor.nbytes, _verbatim(tensor, e8m0))
        for tensor_name, tensor in ordered
    )
    last = ordered[-1][1]
    try:
        with open_regular(path) as file:
            head = file.read(start)
    except OSError as error:
        raise not_read(path, error) from None
    return OutputFile(name, head, tensors, last.offset + last.nbytes, same_as=path)


def _copied(tensor: _Wanted, e8m0: Container[_Place]) -> OutputTensor:
    segments = join_segments([_verbatim(part, e8m0) for part in tensor.parts])
    return unplaced_tensor(tensor.name, tensor.parts[0].dtype, tensor.shape, segments)


def _verbatim(tensor: Stored, e8m0: Container[_Place]) -> CopySegments:
    holds = E8M0 if (tensor.file, tensor.offset) in e8m0 else tensor.dtype
    return CopySegments(tensor.file, tensor.offset, tensor.nbytes, holds)


def _config_file(checkpoint: Checkpoint, config: Mapping[str, Any]) -> OutputFile:
    """Return config.json, byte for byte that of the source where it says what is there."""
    content = read_whole(checkpoint.folder / CONFIG_NAME, MAX_CONFIG_BYTES)
    is_same = parse_json_object(content, checkpoint.folder / CONFIG_NAME) == config
    return whole_file(CONFIG_NAME, content) if is_same else json_file(CONFIG_NAME, config)


def _not_taken_over(source: Path, read: Iterable[Path], beside: Iterable[OutputFile]) -> Iterator[str]:
    """Yield a note on what else lies in the source."""
    known = {CONFIG_NAME, INDEX_NAME, *(path.name for path in read), *(file.name for file in beside)}
    others = sorted(name for name in os.listdir(source) if name not in known and not name.startswith("."))
    if others:
        yield f"not taken over: {first_of(others, MAX_NAMED)}"


def summarize_mend(plan: Plan, summary: Summary) -> MendSummary:
    """Return the summary of a plan of ``plan_mend`` with how the files were made that are the source's."""
    same = [file for file in plan.files if file.same_as is not None]
    links: dict[str, int] = {}
    if summary.dry_run is None:
        how = {file.name: summary.report.links.get(file.name, COPY) for file in same}
        shared = sum(file.nbytes for file in same if how[file.name] != COPY)
        links = {kind: list(how.values()).count(kind) for kind in (REFLINK, HARD_LINK, COPY) if kind in how.values()}
        notes = [f"{counted(number, 'file')} of the source: {SHARING_NOTES[kind]}" for kind, number in links.items()]
    else:
        sharing = [file for file in same if can_share(file, plan.destination)]
        shared = sum(file.nbytes for file in sharing)
        notes = [f"{counted(len(sharing), 'file')} of the source can be shared"] if sharing else []
    fields = {**summary.__dict__, "notes": (*summary.notes, *notes)}
    if summary.dry_run is not None:
        fields["dry_run"] = replace(summary.dry_run, notes=(*summary.dry_run.notes, *notes))
    return MendSummary(**fields, links=links, shared_bytes=shared)
