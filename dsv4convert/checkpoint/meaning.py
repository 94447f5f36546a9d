"""Facts that right bytes can get wrong: tables, biases and norms, file tails, and config.json against the tensors.

All of it is read before the first output byte: tables, small tensors, and a few KiB of each file and expert. What
takes the whole of a checkpoint is in ``census``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..containers.folder_names import CONFIG_NAME
from ..containers.safetensors import Stored, read_header
from ..containers.sources import at, mount_of, prefetch, size_of
from ..containers.untrusted import open_regular, shrank
from ..errors import InventoryError, and_more, counted, first_of, not_read
from ..formats.not_finite import count_not_finite, element_bytes
from ..model.config import ModelConfig, Version
from ..model.tensors import DRAFT_PREFIX, Draft, Store
from .engram import token_map_notes
from .folder import BY_INDEX, Checkpoint, open_folder
from .graft import open_grafted
from .layouts import companion_notes
from .renaming import official_name
from .shards import ShardedWeight
from .weights import FLOAT_ENCODINGS, Encoding, Weight

# A tensor of at most this many bytes is read whole: norms, biases, sinks, and the constants of hyper-connections.
MAX_SMALL_BYTES = 64 * 2**10

# Of the others, and of the ends of files, this much is looked at, in three places.
PROBE_BYTES = 4096
ZEROS = bytes(PROBE_BYTES)

TABLE_CHUNK_BYTES = 4 * 2**20

HEADERS_ONLY = "the files are remote: headers were read, and no table or small tensor was looked at yet"

NOT_FINITE = "NaN or infinite values in {count}"
ALL_ZERO = "all bytes are zero in {count}"
LOOKS_ZERO = "all bytes looked at are zero in {count}"

EXPERT = re.compile(r"(.*\.experts\.\d+)\.w[123]\.weight")
MATRICES_OF_AN_EXPERT = 3

# How many names a note lists.
MAX_NAMED = 3

INTEGERS: Mapping[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "I32": np.dtype("<i4")}


class Finding(NamedTuple):
    """Something that a model may not mean: what it is, and the tensors or files that it was found in."""

    what: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.what}: {first_of(self.names, MAX_NAMED)}"


def open_checked(
    folder: Path,
    *,
    draft_wanted: bool = True,
    strict: bool = False,
    index: str = BY_INDEX,
    draft_from: Path | None = None,
) -> Checkpoint:
    """Open a checkpoint folder as ``open_folder`` does, and check what it means; notes say what is suspicious.

    With ``draft_from`` the draft is that of another folder (see ``open_grafted``).

    Raises:
        Dsv4Error: as for ``open_folder``, ``open_grafted`` and ``check_meaning``.
    """
    if draft_from is None:
        found = open_folder(folder, draft_wanted=draft_wanted, index=index)
    else:
        found = open_grafted(folder, draft_from, index=index)
    weights = found.weights.values()
    notes = check_meaning(found.config, weights, found.files, where=folder, strict=strict)
    beside = (*companion_notes(folder), *token_map_notes(folder, found.config))
    stored = any(official_name(name).startswith(DRAFT_PREFIX) for unused in found.unused for name in unused.names)
    said = config_notes(found.config, weights, found.draft, found.n_draft, is_stored=stored)
    return replace(found, notes=(*found.notes, *beside, *said, *notes))


def check_meaning(
    config: ModelConfig, weights: Iterable[Weight], files: Iterable[Path], *, where: Path, strict: bool = False
) -> tuple[str, ...]:
    """Read tables, small tensors and probes of a checkpoint; return a note for all that is suspicious.

    Raises:
        InventoryError: a routing table that no model can have; or anything suspicious, if ``strict``.
        InputMissingError, InputOutputError: a file cannot be read.
    """
    held = list(weights)
    mount = mount_of(where)
    if mount is not None:
        return _check_remote(config, held, where, strict, headers_only=mount.headers_only)
    with _Reader() as reader:
        check_tables(config, held, reader)
        found = [*_small_findings(held, reader), *_zero_experts(held, reader), *_zero_tails(files, reader)]
    if strict and found:
        refuse(found, where)
    return tuple(map(str, found))


def _check_remote(
    config: ModelConfig, weights: Sequence[Weight], where: Path, strict: bool, *, headers_only: bool
) -> tuple[str, ...]:
    """Check what a remote checkpoint means as far as a few requests tell: its tables and small tensors.

    Zeros are found by the conversion itself, which sees every byte. With ``headers_only`` nothing is looked at.
    """
    if headers_only:
        return (HEADERS_ONLY,)
    looked_at = [weight.stored for weight in weights if weight.stored.dtype in INTEGERS or _is_small(weight)]
    prefetch((stored.file, stored.offset, stored.nbytes) for stored in looked_at)
    with _Reader() as reader:
        check_tables(config, weights, reader)
        found = list(_small_findings(weights, reader))
    if strict and found:
        refuse(found, where)
    return tuple(map(str, found))


def file_findings(config: ModelConfig, weights: Iterable[Weight], files: Iterable[Path]) -> list[Finding]:
    """Check the tables of a checkpoint, and return which of its files end in zero bytes.

    Raises:
        InventoryError: a routing table that no model can have.
        InputMissingError, InputOutputError: a file cannot be read.
    """
    held, paths = list(weights), list(files)
    tables = (weight.stored for weight in held if weight.row.store is Store.TABLE)
    prefetch((stored.file, stored.offset, stored.nbytes) for stored in tables)
    prefetch((path, max(0, size_of(path) - PROBE_BYTES), PROBE_BYTES) for path in paths if at(path) is not None)
    with _Reader() as reader:
        check_tables(config, held, reader)
        return list(_zero_tails(paths, reader))


def refuse(found: Sequence[Finding], where: object) -> NoReturn:
    """Refuse a checkpoint for what was found in it.

    Raises:
        InventoryError: always.
    """
    raise InventoryError(
        f"{found[0]}{and_more(found, 'finding')}", where=where, hint="without --strict such findings are notes"
    )


class _Reader:
    """Reads pieces of tensors, one file open at a time: tensors mostly come file by file."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: Any = None

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def read(self, path: Path, offset: int, nbytes: int) -> bytes:
        """Return ``nbytes`` bytes at ``offset`` of a file."""
        try:
            if path != self._path:
                if self._file is not None:
                    self._file.close()
                self._path, self._file = path, open_regular(path)
            self._file.seek(offset)
            found: bytes = self._file.read(nbytes)
        except OSError as error:
            raise not_read(path, error) from None
        if len(found) != nbytes:
            raise shrank(path)
        return found

    def stored(self, tensor: Stored) -> bytes:
        """Return the bytes of a tensor."""
        return self.read(tensor.file, tensor.offset, tensor.nbytes)

    def looks_zero(self, tensor: Stored) -> bool:
        """Return whether a tensor is zero at its start, in the middle and at its end; a small one everywhere."""
        size = min(PROBE_BYTES, tensor.nbytes)
        last = tensor.nbytes - size
        # A small tensor is all of these at once; comparing is many times as fast as stripping zeros.
        places = dict.fromkeys((0, last // 2, last))
        zeros = ZEROS[:size]
        return size > 0 and all(self.read(tensor.file, tensor.offset + at, size) == zeros for at in places)


# Tables


def check_tables(config: ModelConfig, weights: Iterable[Weight], reader: _Reader) -> None:
    """Check that each row of each routing table has distinct ids of experts that there are.

    Raises:
        InventoryError: one has not; names the tensor, the row and the id.
    """
    for weight in weights:
        if weight.row.store is Store.TABLE:
            dtype = INTEGERS[weight.stored.dtype]
            experts = config.n_experts(weight.is_draft)
            rows, columns = weight.shape
            step = max(1, TABLE_CHUNK_BYTES // (columns * dtype.itemsize))
            for first in range(0, rows, step):
                count = min(step, rows - first) * columns
                offset = weight.stored.offset + first * columns * dtype.itemsize
                found = reader.read(weight.stored.file, offset, count * dtype.itemsize)
                ids = np.frombuffer(found, dtype).reshape(-1, columns)
                check_table_rows(weight.name, ids, np.arange(first, first + len(ids)), experts, weight.stored.file)


def check_table_rows(
    name: str, ids: NDArray[np.integer[Any]], rows: NDArray[np.integer[Any]], experts: int, where: object = None
) -> None:
    """Check rows of a routing table, [rows, experts a token]; ``rows`` are their numbers.

    Raises:
        InventoryError: a row has an id outside 0..experts-1, or one twice.
    """
    if ids.size and (ids.min() < 0 or ids.max() >= experts):
        row, column = np.argwhere((ids < 0) | (ids >= experts))[0]
        raise InventoryError(
            f"tensor {name}: row {rows[row]} names an expert that is not there",
            where=where,
            expected=f"ids of 0 to {experts - 1}",
            got=int(ids[row, column]),
            hint="were experts removed and this table left as it was?",
        )
    # Every pair of columns, one distance after another: sorting rows as short as these takes four times as long.
    columns = np.ascontiguousarray(ids.T)
    if any((columns[apart:] == columns[:-apart]).any() for apart in range(1, len(columns))):
        ordered = np.sort(ids, axis=1)
        row, column = np.argwhere(ordered[:, 1:] == ordered[:, :-1])[0]
        raise InventoryError(
            f"tensor {name}: row {rows[row]} names an expert twice",
            where=where,
            expected=f"{ids.shape[1]} distinct ids",
            got=f"{int(ordered[row, column])} in {ids[row].tolist()}",
            hint="was this table lost when the weights were saved? take the table from the published checkpoint",
        )


# Values


def _small_findings(weights: Iterable[Weight], reader: _Reader) -> Iterator[Finding]:
    """Yield what is not finite, or all zero, in tensors that are small enough to be read whole."""
    bad_names: list[str] = []
    zero: list[str] = []
    scratch = np.empty(MAX_SMALL_BYTES, np.uint8)
    small = [weight for weight in weights if _is_small(weight)]
    for weight in sorted(small, key=_place):
        content = reader.stored(weight.stored)
        bad = count_not_finite(weight.stored.dtype, np.frombuffer(content, np.uint8), scratch)
        if bad:
            bad_names.append(f"{weight.name} ({bad} of {len(content) // element_bytes(weight.stored.dtype)})")
        elif content and not content.strip(b"\0"):
            zero.append(weight.name)
    if bad_names:
        yield Finding(NOT_FINITE.format(count=counted(len(bad_names))), tuple(bad_names))
    if zero:
        yield Finding(ALL_ZERO.format(count=counted(len(zero))), tuple(zero))


def _is_small(weight: Weight) -> bool:
    return weight.encoding in FLOAT_ENCODINGS and weight.expert is None and weight.nbytes <= MAX_SMALL_BYTES


def zero_findings(names: Sequence[str]) -> Iterator[Finding]:
    """Yield the tensors that are all zero, experts as such where all of their matrices are."""
    matrices: dict[str, list[str]] = {}
    for name in names:
        match = EXPERT.fullmatch(name)
        if match is not None:
            matrices.setdefault(match[1], []).append(name)
    experts = [expert for expert, found in matrices.items() if len(found) == MATRICES_OF_AN_EXPERT]
    whole = {name for expert in experts for name in matrices[expert]}
    others = tuple(name for name in names if name not in whole)
    if experts:
        yield Finding(ALL_ZERO.format(count=counted(len(experts), "expert")), tuple(experts))
    if others:
        yield Finding(ALL_ZERO.format(count=counted(len(others), "tensor")), others)


def with_zeros(notes: Iterable[str], names: Sequence[str]) -> tuple[str, ...]:
    """Return the notes of a plan and those on tensors that its run found to be all zero, by their names in the files.

    What the plan saw of the same tensors goes: the run has seen every byte.
    """
    official = [official_name(name) for name in names]
    shown = [name.removesuffix(".w1.weight") for name in official]
    starts = ALL_ZERO.format(count=""), LOOKS_ZERO.format(count="")
    kept = (note for note in notes if not (note.startswith(starts) and any(name in note for name in shown)))
    return (*kept, *map(str, zero_findings(official)))


def refuse_zeros(names: Sequence[str], where: object) -> None:
    """Refuse a run that found tensors to be all zero; ``names`` are those in the files.

    Raises:
        InventoryError: there are any.
    """
    if names:
        refuse(list(zero_findings([official_name(name) for name in names])), where)


def _place(weight: Weight) -> tuple[Path, int]:
    return weight.stored.file, weight.stored.offset


def _zero_experts(weights: Iterable[Weight], reader: _Reader) -> Iterator[Finding]:
    """Yield the routed experts whose matrices are zero wherever they are looked at: a lost rank leaves such."""
    first = [w for w in weights if w.expert is not None and w.row.name == "w1.weight"]
    zero = [w.name.removesuffix(".w1.weight") for w in sorted(first, key=_place) if reader.looks_zero(w.stored)]
    if zero:
        yield Finding(LOOKS_ZERO.format(count=counted(len(zero), "expert")), tuple(zero))


def _zero_tails(files: Iterable[Path], reader: _Reader) -> Iterator[Finding]:
    """Yield what there is of files that end in zero bytes, as those do whose room was reserved for a stopped download.

    Where the zeros begin is a matter of all tensors of a file, those that nothing uses too.
    """
    found: list[tuple[str, str, str]] = []  # the file, how many tensors are zero, and the first of them
    for path in files:
        try:
            size = size_of(path)
        except OSError as error:
            raise not_read(path, error) from None
        if size < PROBE_BYTES or reader.read(path, size - PROBE_BYTES, PROBE_BYTES) != ZEROS:
            continue
        stored = sorted(read_header(path).items(), key=lambda item: item[1].offset, reverse=True)
        tensors = [(official_name(name), tensor) for name, tensor in stored if tensor.nbytes]
        zero = [name for name, _ in takewhile(lambda item: reader.looks_zero(item[1]), tensors)]
        if zero:
            found.append((path.name, f" the last {counted(len(zero))}", zero[-1]))
        elif tensors:
            found.append((path.name, "", tensors[0][0]))
    if len(found) == 1:
        [(name, where, first)] = found
        yield Finding(f"{name} ends in zero bytes, did its download stop? They begin in{where}", (first,))
    elif found:
        names = tuple(f"{name} at {first}" for name, _, first in found)
        yield Finding(f"{counted(len(found), 'file')} end in zero bytes, did a download stop? Where they begin", names)


# config.json against the tensors


def has_draft_keys(raw: Mapping[str, Any]) -> bool:
    """Return whether a config speaks of draft layers."""
    return bool(raw.get("num_nextn_predict_layers")) or any(key.startswith("dspark_") for key in raw)


def wrong_mtp_layers(config: ModelConfig, draft: Draft, n_draft: int) -> int | None:
    """Return how many MTP layers a config of V4 says that there are, None where that is right or not said."""
    if draft is not Draft.MTP or config.version is not Version.V4:
        return None
    layers: int = config.raw.get("num_nextn_predict_layers", n_draft)
    return layers if layers != n_draft else None


def stored_expert_dtype(weights: Iterable[Weight | ShardedWeight]) -> str | None:
    """Return how the trunk's routed experts are stored, as ``expert_dtype`` spells it; None where it has no word."""
    held = {w.encoding for w in weights if w.expert is not None and not w.is_draft}
    names = {Encoding.FP4: "fp4", Encoding.FP8: "fp8"}
    return names.get(held.pop()) if len(held) == 1 else None


def stated_expert_dtypes(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config says of the experts' encoding, by key: it can say so in two places."""
    quantization = raw.get("quantization_config")
    inner = quantization.get("expert_dtype") if isinstance(quantization, dict) else None
    stated = {"expert_dtype": raw.get("expert_dtype"), "quantization_config.expert_dtype": inner}
    return {key: value for key, value in stated.items() if value is not None}


def config_notes(
    config: ModelConfig,
    weights: Iterable[Weight | ShardedWeight],
    draft: Draft,
    n_draft: int,
    *,
    is_stored: bool = False,
) -> tuple[str, ...]:
    """Return notes on what config.json says and the tensors do not bear out; output configs say what is there.

    ``is_stored`` says that there are tensors of a draft, of which none is used.
    """
    notes: list[str] = []
    if draft is Draft.NONE and has_draft_keys(config.flat):
        drafts = "the draft's tensors are not used" if is_stored else "no tensor is of one"
        notes.append(f"{CONFIG_NAME} speaks of draft layers and {drafts}: outputs say that there are none")
    layers = wrong_mtp_layers(config, draft, n_draft)
    if layers is not None:
        there_are = f"there {'is' if n_draft == 1 else 'are'} {n_draft}"
        notes.append(f"{CONFIG_NAME}: key num_nextn_predict_layers says {layers}, {there_are}: taken as such")
    held = stored_expert_dtype(weights)
    for key, value in stated_expert_dtypes(config.raw).items():
        if held is not None and value != held:
            notes.append(f"{CONFIG_NAME}: key {key} says {str(value)[:40]!r}, the experts are {held}: taken as such")
    return tuple(notes)
