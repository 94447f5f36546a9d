"""The manifest: what a finished output is made of, with a checksum for every tensor and every file.

It lies next to the output as ``OUT.manifest.json`` and lets anybody re-check the bytes at disk speed,
without the source. A segment's checksum is the xxh3-128 of its bytes; a tensor's is that of its only
segment, or the xxh3-128 of its segments' checksums in order; a file's is the xxh3-128 of its header's
checksum and its tensors' checksums in order. Bytes between tensors are zero.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, groupby
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any

import xxhash

from ..containers.json_object import parse_json_object, validate_schema
from ..containers.presence import exists, is_file, is_folder
from ..containers.untrusted import open_regular, read_whole
from ..errors import ConfigError, FileFormatError, InputMissingError, OutputExistsError, UsageError
from ..plan import OutputFile, OutputTensor, Plan, sizes_of
from .fingerprint import is_same_source
from .ledger import READ_BYTES, combine_digests, digest_of_range
from .monitor import Step, Watched
from .names import (
    Identity,
    check_file_can_be_replaced,
    closing,
    entries_within,
    folders_of_names,
    not_ours,
    remove_known,
)
from .outputs import MANIFEST_SUFFIX, open_file, os_errors, partial_path, write_file
from .run import RunReport

FORMAT = 1
CHECKSUM = "xxh3_128"
# How a manifest of ours begins.
CLAIM = b'{"manifest": '

# The shards of V4-Pro for 16 ranks are 180,000 tensors: 41 MB.
MAX_MANIFEST_BYTES = 2**26
MAX_FILES = 2**16
MAX_SEGMENTS = 2**20  # of a tensor
WRITE_BYTES = 2**18

# As in the schema.
SCHEMA = "manifest.schema.json"
TENSOR_KEYS = {"name", "offset", "bytes", "segments", "checksum"}
DIGEST = re.compile(r"[0-9a-f]{32}")
MAX_SIZE = 2**53


def manifest_path(plan: Plan) -> Path:
    """Return where the manifest of a plan's output lies."""
    return manifest_of(plan.output_path())


def manifest_of(output: Path) -> Path:
    """Return where the manifest of an output lies."""
    return output.with_name(output.name + MANIFEST_SUFFIX)


def manifest_text(plan: Plan, report: RunReport, fingerprint: Mapping[str, Any]) -> Iterator[str]:
    """Yield the manifest of a finished run, a tensor to a line.

    It holds neither the time of the run nor its folders, so equal runs have equal ones. It is never in memory whole:
    with a hundred thousand tensors that would be the largest thing that a conversion keeps.
    """
    head = {
        "manifest": FORMAT,
        "program": fingerprint["program"],
        "target": plan.target,
        "options": fingerprint["options"],
        "source": _source_entry(fingerprint),
        "checksum": CHECKSUM,
        "is_folder": plan.is_folder,
    }
    yield _json(head)[:-1] + ', "files": ['
    reports = iter(report.tensors)
    for number, file in enumerate(plan.files):
        yield (",\n" if number else "\n") + _file_head(file, report.links)[:-1] + ', "tensors": ['
        digests: list[str] = []
        for tensor in file.tensors:
            yield (",\n " if digests else "\n ") + _tensor_entry(tensor, digest := next(reports).digest)
            digests.append(digest)
        yield f'], "checksum": "{file_checksum(_header_checksum(file), digests)}"}}'
    yield "]}\n"


def _file_head(file: OutputFile, links: Mapping[str, str]) -> str:
    head = {
        "name": file.name,
        "bytes": file.nbytes,
        "header_bytes": file.header_bytes,
        "header": _header_checksum(file),
    }
    return _json(head | ({"made_by": links[file.name]} if file.name in links else {}))


def _header_checksum(file: OutputFile) -> str:
    return str(xxhash.xxh3_128_hexdigest(file.header))


def _tensor_entry(tensor: OutputTensor, digest: str) -> str:
    # Runs of [count, bytes]: segments have few sizes. There are so many tensors that none goes through an encoder but
    # for what a name may need to escape.
    if len(tensor.segments) == 1:
        segments = [[1, tensor.nbytes]]
    else:
        segments = [[len(list(run)), size] for size, run in groupby(sizes_of(tensor))]
    return (
        f'{{"name": {encode_basestring(tensor.name)}, "offset": {tensor.offset}, "bytes": {tensor.nbytes}, '
        f'"segments": {segments}, "checksum": "{digest}"}}'
    )


# Made once: json.dumps makes an encoder for every call.
_json = json.JSONEncoder(ensure_ascii=False).encode


def file_checksum(header: str, tensors: list[str]) -> str:
    """Return a file's checksum from those of its header and its tensors."""
    return str(xxhash.xxh3_128_hexdigest(bytes.fromhex(header + "".join(tensors))))


def check_claimed(path: Path) -> None:
    """Check that a manifest's name is free, or that of a manifest of ours; the same for its temporary name.

    Raises:
        OutputExistsError, InputOutputError: see ``_claimed``.
    """
    for name in (path, partial_path(path)):
        _claimed(name)


def check_outside_outputs(path: Path) -> None:
    """Check that a file to be written lies in no folder that is a finished output: a manifest lists all that is there.

    Raises:
        UsageError: it would.
        InputOutputError: that cannot be told.
    """
    folder = Path(os.path.realpath(path.parent))
    with contextlib.suppress(OutputExistsError):
        if folder.name and _claimed(manifest_of(folder)) is not None:
            raise UsageError(
                "the file would lie in a finished output, whose manifest would call it a difference",
                where=path,
                hint="choose another folder",
            )


def check_replaceable(path: Path) -> None:
    """Check that an older manifest of ours, where there is one, could give its name away.

    Raises:
        OutputExistsError: it could not.
    """
    for name in (path, partial_path(path)):
        check_file_can_be_replaced(name)


def _claimed(name: Path) -> Identity | None:
    """Return the identity of the manifest of ours under a name, None where nothing stands there.

    Raises:
        OutputExistsError: something else has the name.
        InputOutputError: it cannot be looked at.
    """
    with os_errors(name, "looked at"):
        if not os.path.lexists(name):
            return None
        with closing(open_file(name, os.O_RDONLY)) as descriptor:
            start = os.pread(descriptor, len(CLAIM), 0)
            identity = Identity.in_status(os.fstat(descriptor))
    if start.strip(b"\0") and start != CLAIM:
        raise not_ours(name, "a manifest of dsv4convert")
    return identity


def remove_manifest(path: Path) -> None:
    """Remove the manifest of an output that is removed; what is no manifest of ours stays.

    Raises:
        InputOutputError: the system refused.
    """
    with contextlib.suppress(OutputExistsError), os_errors(path, "removed"):
        remove_known(path, _claimed(path))


def write_manifest(path: Path, plan: Plan, report: RunReport, fingerprint: Mapping[str, Any]) -> None:
    """Write the manifest of a finished run; it appears under its name whole, in place of an older manifest of ours.

    Raises:
        OutputExistsError: something else took its name meanwhile.
        SpaceError, InputOutputError: the system refused.
    """
    partial = partial_path(path)
    old, leftover = _claimed(path), _claimed(partial)
    with os_errors(partial, "removed"):
        remove_known(partial, leftover)
    write_file(path, _batches(manifest_text(plan, report, fingerprint)), old)


def _batches(pieces: Iterator[str]) -> Iterator[bytes]:
    """Yield the pieces joined to writes of about ``WRITE_BYTES``."""
    batch = bytearray()
    for piece in pieces:
        batch += piece.encode()
        if len(batch) >= WRITE_BYTES:
            yield bytes(batch)
            batch.clear()
    yield bytes(batch)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and validate a manifest.

    Raises:
        InputMissingError: it is not there.
        FileFormatError: it is not a manifest.
    """
    if not exists(path):
        raise InputMissingError("manifest is missing", where=path, hint="only outputs of dsv4convert have one")
    try:
        text = read_whole(path, MAX_MANIFEST_BYTES, error=ConfigError)
        # Objects take more memory than text: a manifest, of long lines, has few for its length.
        if text.count(b"[") + text.count(b"{") > len(text) // 16 + 64 or text.count(b",") > len(text) // 8 + 64:
            raise ConfigError("too many values for its length")
        manifest = parse_json_object(text, path)
        _validate(manifest, path)
    except ConfigError as error:
        raise FileFormatError(f"not a manifest: {error.what}", where=path) from None
    for file in manifest["files"]:
        parts = file["name"].split("/")
        if "\0" in file["name"] or not {"", ".", ".."}.isdisjoint(parts) or (parts[1:] and not manifest["is_folder"]):
            raise FileFormatError("not a manifest: a file name that leads elsewhere", where=path, got=file["name"])
    return manifest


def _validate(manifest: dict[str, Any], path: Path) -> None:
    """Check a parsed manifest against its schema; the tensors by hand, for there are many.

    Raises:
        ConfigError: it does not fit.
    """
    head = dict(manifest)
    tensors: list[list[Any]] = []
    if isinstance(files := manifest.get("files"), list):
        if len(files) > MAX_FILES:
            raise ConfigError(f"more than {MAX_FILES} files")
        head["files"] = list(files)
        for number, file in enumerate(files):
            if isinstance(file, dict) and isinstance(file.get("tensors"), list):
                tensors.append(file["tensors"])
                head["files"][number] = {**file, "tensors": []}
    validate_schema(head, SCHEMA, path)
    for tensor in chain.from_iterable(tensors):
        if not _is_tensor_entry(tensor):
            name = tensor.get("name") if isinstance(tensor, dict) else None
            raise ConfigError(f"tensor {str(name)[:100]!r}: malformed entry")


def _is_tensor_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() == TENSOR_KEYS
        and isinstance(entry["name"], str)
        and _is_size(entry["offset"])
        and _is_size(entry["bytes"])
        and isinstance(entry["checksum"], str)
        and DIGEST.fullmatch(entry["checksum"]) is not None
        and isinstance(entry["segments"], list)
        and all(
            isinstance(run, list) and len(run) == 2 and all(_is_size(number) and number for number in run)
            for run in entry["segments"]
        )
        and sum(count for count, _ in entry["segments"]) <= MAX_SEGMENTS
    )


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_SIZE


def finished_before(plan: Plan, fingerprint: Mapping[str, Any]) -> bool:
    """Return whether the output is there already, finished by the same program from the same source and options."""
    return _all_there(plan) and is_of(plan, fingerprint)


def is_of(plan: Plan, fingerprint: Mapping[str, Any]) -> bool:
    """Return whether the manifest next to an output is that of ``plan``, whether or not all of its files are there."""
    manifest = _manifest_of(plan)
    return (
        manifest is not None
        and manifest["program"] == fingerprint["program"]
        and manifest["options"] == fingerprint["options"]
        and _is_same_source(manifest["source"], _source_entry(fingerprint))
    )


def sources_of_finished(plan: Plan) -> set[str] | None:
    """Return the names of the files of which the finished output of a plan was made, None where it is not there.

    The source itself can be gone.
    """
    manifest = _manifest_of(plan) if _all_there(plan) else None
    return None if manifest is None else set(manifest["source"])


def _manifest_of(plan: Plan) -> dict[str, Any] | None:
    """Return the manifest of a plan's output if it names the plan's files, with their sizes and headers."""
    path = manifest_path(plan)
    if not is_file(path):
        return None
    try:
        manifest = read_manifest(path)
    except (InputMissingError, FileFormatError):
        return None
    is_ours = manifest["target"] == plan.target and [
        (entry["name"], entry["bytes"], entry["header"]) for entry in manifest["files"]
    ] == [(file.name, file.nbytes, _header_checksum(file)) for file in plan.files]
    return manifest if is_ours else None


def _all_there(plan: Plan) -> bool:
    return all(_is_of_size(final, file.nbytes) for final, file in zip(plan.final_paths(), plan.files, strict=True))


def _is_of_size(path: Path, nbytes: int) -> bool:
    """Return whether a regular file of so many bytes is there; a link to one counts."""
    try:
        status = path.stat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == nbytes


def links_in(path: Path) -> dict[str, str]:
    """Return how the files of a finished output were made that are files of the source, by name; see ``links``.

    Raises:
        InputMissingError, FileFormatError: as for ``read_manifest``.
    """
    return {entry["name"]: entry["made_by"] for entry in read_manifest(path)["files"] if "made_by" in entry}


def _is_same_source(before: Mapping[str, Mapping[str, int]], now: Mapping[str, Mapping[str, int]]) -> bool:
    return before.keys() == now.keys() and all(
        is_same_source(list(before[name].values()), list(now[name].values())) for name in now
    )


def _source_entry(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    # By name alone: a manifest holds no path. A second source's file of the same name has its folder's before it.
    found: dict[str, Any] = {}
    for name, (size, mark) in fingerprint["source"].items():
        base = os.path.basename(name)
        if base in found:
            base = f"{os.path.basename(os.path.dirname(name))}/{base}"
        found[base] = {"bytes": size, "version" if isinstance(mark, str) else "mtime_ns": mark}
    return found


@dataclass(frozen=True)
class Mismatch:
    """Something in an output that is not as its manifest says; ``tensor`` is None for the file itself."""

    file: str
    tensor: str | None
    what: str

    def __str__(self) -> str:
        """Return it as a line."""
        where = self.file if self.tensor is None else f"{self.file}: tensor {self.tensor}"
        return f"{where}: {self.what}"


@dataclass(frozen=True)
class ManifestReport:
    """The outcome of re-checking an output against its manifest."""

    files: int
    tensors: int
    nbytes: int
    mismatches: tuple[Mismatch, ...]

    @property
    def ok(self) -> bool:
        """Return whether every byte is as the manifest says."""
        return not self.mismatches


def check_manifest(output: Path, watch: Callable[[Step], None] | None = None) -> ManifestReport:
    """Read every byte of ``output`` and compare it with the manifest next to it; ``watch`` is told how far that is.

    Raises:
        InputMissingError, FileFormatError: no manifest, or not one.
    """
    manifest = read_manifest(manifest_of(output))
    folder = output if manifest["is_folder"] else output.parent
    mismatches: list[Mismatch] = []
    watched = Watched(watch, ())
    done = 0
    for entry in manifest["files"]:
        mismatches += _check_file(folder / entry["name"], entry, done, watched)
        done += entry["bytes"]
        watched.tell(done, entry["name"])
    if manifest["is_folder"] and is_folder(folder):
        known = {entry["name"] for entry in manifest["files"]}
        found = entries_within(folder, set(folders_of_names(known)).__contains__)
        names = (os.path.relpath(entry.path, folder) for entry in found)
        mismatches += [Mismatch(name, None, "is not in the manifest") for name in sorted({*names} - known)]
    return ManifestReport(
        len(manifest["files"]), sum(len(entry["tensors"]) for entry in manifest["files"]), done, tuple(mismatches)
    )


def _check_file(path: Path, entry: Mapping[str, Any], before: int, watched: Watched) -> Iterator[Mismatch]:
    name = entry["name"]
    digests = [tensor["checksum"] for tensor in entry["tensors"]]
    try:
        if file_checksum(entry["header"], digests) != entry["checksum"]:
            yield Mismatch(name, None, "the manifest itself is damaged: file and tensor checksums disagree")
    except ValueError:
        yield Mismatch(name, None, "the manifest itself is damaged: not a checksum")
        return
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry["bytes"]:
                yield Mismatch(name, None, f"has {size} bytes, not {entry['bytes']}")
                return
            if digest_of_range(file.fileno(), 0, entry["header_bytes"]).hex() != entry["header"]:
                yield Mismatch(name, None, "the header differs")
            position = entry["header_bytes"]
            for tensor in entry["tensors"]:
                if tensor["offset"] < position or tensor["offset"] + tensor["bytes"] > size:
                    yield Mismatch(name, tensor["name"], "the manifest itself is damaged: an impossible offset")
                    return
                if not _all_zero(file.fileno(), position, tensor["offset"]):
                    yield Mismatch(name, tensor["name"], "the bytes before it are not zero")
                if not _same_tensor(file.fileno(), tensor):
                    yield Mismatch(name, tensor["name"], "the bytes differ")
                position = tensor["offset"] + tensor["bytes"]
                watched.tell(before + position, name)
            if not _all_zero(file.fileno(), position, size):
                yield Mismatch(name, None, "the bytes after the last tensor are not zero")
    except OSError as error:
        yield Mismatch(name, None, f"cannot be read ({error.strerror})")


def _same_tensor(descriptor: int, tensor: Mapping[str, Any]) -> bool:
    digests = bytearray()
    position = tensor["offset"]
    if sum(count * size for count, size in tensor["segments"]) != tensor["bytes"]:
        return False
    for count, size in tensor["segments"]:
        for _ in range(count):
            digests += digest_of_range(descriptor, position, size)
            position += size
    return bool(combine_digests(digests) == tensor["checksum"])


def _all_zero(descriptor: int, begin: int, end: int) -> bool:
    while begin < end and (chunk := os.pread(descriptor, min(READ_BYTES, end - begin), begin)):
        if any(chunk):
            return False
        begin += len(chunk)
    return True
