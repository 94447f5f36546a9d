"""``merge``: the files of a split GGUF become one file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from gguf import GGUFValueType

from ..containers.gguf import (
    ALIGNMENT_KEY,
    ARRAY,
    SCALARS,
    SPLIT_COUNT,
    SPLIT_FILE,
    SPLIT_NO,
    SPLIT_TENSORS,
    STRING,
    GgufModelFile,
    GgufPart,
    open_gguf,
    paths_of_set,
    read_gguf_part,
)
from ..containers.gguf_write import KeyValue
from ..containers.presence import is_file, is_folder, is_link
from ..engine.manifest import manifest_of, remove_manifest, sources_of_finished
from ..engine.names import Identity, remove_known
from ..engine.outputs import os_errors
from ..errors import Dsv4Error, FileFormatError, UsageError, not_read
from ..plan import CopySegments, OutputTensor, Plan
from .gguf_tensors import gguf_file

MERGE = "merge"
SPLIT_KEYS = frozenset({SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS})
VALUE_TYPES = {"str": STRING, **{name: number for number, (name, _) in SCALARS.items()}}


def plan_merge(source: Path, out: Path, *, delete_parts: bool = False) -> Plan:
    """Plan ``merge``: one GGUF ``out`` of all files of the set that ``source`` is one of.

    Tensors keep their order, and keys theirs; those about the split are left out. The file is the one that would have
    been written without splitting. ``out`` ends in .gguf or is an existing folder. ``delete_parts`` uses the files up.

    Raises:
        UsageError: ``source`` is a whole model already, ``out`` is no name for a GGUF, or a file that is to be used up
            has another name as well.
        FileFormatError, InputMissingError: see ``open_gguf``; or a later file has metadata of its own.
    """
    # Absolute, as a run that goes on knows the files by these names.
    model = open_gguf(Path(os.path.abspath(source)), allow_cut=delete_parts)
    if len(model.parts) == 1:
        raise UsageError("not one of several files of a split GGUF", where=source, expected="NAME-00001-of-00003.gguf")
    for part in model.parts[1:]:
        _check_keys(part, model)
    consumes: tuple[tuple[Path, int], ...] = ()
    if delete_parts:
        _check_only_names(model)
        consumes = tuple((part.path, part.data_start) for part in model.parts if part.tensors)
    return _plan(model, _place_of(out, model.files[0]), model.files[0], consumes)


def plan_of_merged(source: Path, out: Path) -> Plan | None:
    """Return the plan of a merge that was interrupted after it began to remove the files of the set, None without one.

    The output is whole then, and every file that is left was used up. The first one, which goes last, has the keys;
    once it is gone too, the output's manifest says of which files it was made.
    """
    paths = paths_of_set(Path(os.path.abspath(source)))
    left = [path for path in paths if os.path.lexists(path)]
    if len(left) == len(paths) or (left and left[0] != paths[0]):
        return None
    folder, name = _place_of(out, paths[0])
    if not is_file(folder / name):
        return None
    parts = [read_gguf_part(path, allow_cut=True) for path in left]
    if not all(_is_used_up(part) for part in parts):
        return None
    merged = open_gguf(folder / name)
    plan = _plan(merged, (folder, name), paths[0], tuple((part.path, part.data_start) for part in parts))
    if parts:
        return plan if key_values(merged) == key_values(GgufModelFile((parts[0],), {})) else None
    made_of = sources_of_finished(plan)
    return plan if made_of and made_of <= {path.name for path in paths} else None


def _plan(model: GgufModelFile, place: tuple[Path, str], source: Path, consumes: tuple[tuple[Path, int], ...]) -> Plan:
    alignment = model.parts[0].alignment
    tensors = [
        OutputTensor(t.name, t.type, t.shape, 0, t.nbytes, CopySegments(t.file, t.offset, t.nbytes))
        for t in model.tensors.values()
    ]
    folder, name = place
    return Plan(
        target=MERGE,
        source=source,
        destination=folder,
        is_folder=False,
        files=(gguf_file(name, tensors, key_values(model), alignment),),
        dropped=(),
        options={},
        source_bytes=sum(tensor.nbytes for tensor in tensors),
        consumes=consumes,
    )


def remove_parts(plan: Plan) -> None:
    """Remove the manifest of the files that a finished plan has used up, then the files, the first one last.

    Raises:
        FileFormatError: something else stands under the name of a file; it is left as it is.
        InputOutputError: the system refused.
    """
    paths = paths_of_set(plan.source) if plan.consumes else []
    used_up = [_used_up(path, number, len(paths)) for number, path in enumerate(paths)]
    for path in paths[:1]:
        remove_manifest(manifest_of(path))
    for path, identity in reversed(list(zip(paths, used_up, strict=True))):
        with os_errors(path, "removed"):
            remove_known(path, identity)


def _used_up(path: Path, number: int, count: int) -> Identity | None:
    """Return the identity of a file of the set that was used up, None where it is gone.

    Raises:
        FileFormatError: something else has its name.
    """
    identity = Identity.of(path)
    if identity is None:
        return None
    try:
        part = read_gguf_part(path, allow_cut=True)
        place = part.metadata.get(SPLIT_NO), part.metadata.get(SPLIT_COUNT)
        is_ours = not is_link(path) and place == (number, count) and _is_used_up(part)
    except Dsv4Error:
        is_ours = False
    if not is_ours:
        raise FileFormatError(
            "not the file that was used up, and left in place",
            where=path,
            hint="the output is complete: move this file away and run again with --resume",
        )
    return identity


def _is_used_up(part: GgufPart) -> bool:
    return not part.tensors or part.nbytes <= part.data_start


def key_values(model: GgufModelFile) -> list[KeyValue]:
    """Return the key-values of a model as they are to be written, without those about its split."""
    entries = []
    for key, value in model.metadata.items():
        kind = model.types[key]
        if key in SPLIT_KEYS:
            continue
        if kind.startswith("["):
            inner = GGUFValueType(VALUE_TYPES[kind.strip("[]")])
            entries.append(KeyValue(key, GGUFValueType(ARRAY), value, inner))
        else:
            entries.append(KeyValue(key, GGUFValueType(VALUE_TYPES[kind]), value))
    return entries


def _check_only_names(model: GgufModelFile) -> None:
    """Check that each file of the set has one name only, so that nobody else loses what is cut.

    Raises:
        UsageError: one is a link, or has a second name.
        InputMissingError, InputOutputError: one is gone, or cannot be looked at.
    """
    for path in model.files:
        try:
            status = path.lstat()
        except OSError as error:
            raise not_read(path, error) from None
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise UsageError(
                "--delete-parts: the file is a link or has a second name",
                where=path,
                hint="leave out --delete-parts, or copy the file",
            )


def _check_keys(part: GgufPart, model: GgufModelFile) -> None:
    """Check that a later file has no key that would be lost.

    Raises:
        FileFormatError: it has.
    """
    for key, value in part.metadata.items():
        if key in SPLIT_KEYS or key == ALIGNMENT_KEY:
            continue
        if key not in model.metadata or model.metadata[key] != value:
            raise FileFormatError(
                f"key {key!r} differs from that of the first file",
                where=part.path,
                expected=repr(model.metadata.get(key, "no such key")),
                got=repr(value),
                hint="the metadata of a split GGUF belongs into its first file",
            )


def _place_of(out: Path, first: Path) -> tuple[Path, str]:
    """Return folder and name of the file to write."""
    if is_folder(out):
        found = SPLIT_FILE.fullmatch(first.name)
        return out, f"{found['stem'] if found is not None else first.stem}.gguf"
    if out.suffix != ".gguf":
        raise UsageError("the output must end in .gguf or be an existing folder", where=out)
    return out.parent, out.name
