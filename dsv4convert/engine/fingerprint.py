"""The fingerprint of a plan: config, headers, options and version, and whether a later run has the same one."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from .. import __version__
from ..containers.sources import at, mount_of, shown
from ..errors import FileFormatError, ResumeError
from ..plan import Plan, identity_of
from .consume import is_cut
from .outputs import FRESH_HINT, os_errors

# Options of plans that the command line knows by other names. ggml is a library, whose version counts.
GGML = "ggml"
OPTION_NAMES = {
    "embedding": "--embedding-type",
    GGML: GGML,
    "max_file_bytes": "--max-file-size",
    "output": "--output-type",
    "ranks": "--rank",
    "split_max_bytes": "--max-file-size",
    "tensor_types": "--tensor-type",
}

# What a source file counts as that the run has used up.
USED_UP: list[int | str] = [0, 0]


def fingerprint_of(plan: Plan) -> dict[str, Any]:
    """Return what decides a plan's output: program, options, source files, and every range of the plan.

    Of a remote source, ``revision`` is its address with the commit, or the etags of its files.

    Source files count by name, size and modification time; their headers are part of the plan. Those that the plan
    has used up count by name. A run whose workers send its files adds the ``destination``.
    """
    names = {file: _name(plan, file) for file in plan.source_files}
    digest = xxhash.xxh3_128()
    mount = mount_of(plan.source)
    for file in plan.files:
        digest.update(f"{file.name} {file.nbytes}\n".encode())
        digest.update(file.header)
        for tensor in file.tensors:
            digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape} {tensor.offset}\n".encode())
            digest.update(identity_of(tensor.segments, names))
    return {
        "program": f"dsv4convert {__version__}",
        "target": plan.target,
        "options": json.loads(json.dumps(plan.options)),
        "source": {name: USED_UP if is_cut(plan, file) else mark_of(file) for file, name in names.items()},
        "plan": digest.hexdigest(),
    } | ({} if mount is None else {"revision": mount.revision})


def _name(plan: Plan, file: Path) -> str:
    """Return the name by which a source file counts.

    A file beside the model, such as an importance matrix, goes by its whole path or address.
    """
    return file.name if file.parent == plan.source else shown(Path(os.path.abspath(file)))


def mark_of(path: Path) -> list[int | str]:
    """Return what changes when a source file does: size and time, of a remote file size and commit or etag."""
    remote = at(path)
    if remote is not None:
        return [remote.size, remote.identity]
    with os_errors(path, "read"):
        status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def is_same_source(before: Sequence[int | str] | None, now: Sequence[int | str] | None) -> bool:
    """Return whether a source file is as it was, or was used up since."""
    return before == now or (before is not None and now == USED_UP)


def check_same(old: Mapping[str, Any], new: Mapping[str, Any], where: Path) -> None:
    """Check that an interrupted run can go on under the plan of this one.

    Raises:
        ResumeError: the program, the options or the source changed; says what.
    """
    if "revision" in old and "revision" in new and old["revision"] != new["revision"]:
        raise ResumeError(
            "the interrupted run cannot be resumed: the source moved to another revision",
            where=where,
            expected=old["revision"],
            got=new["revision"],
            hint=f"name the revision of the interrupted run, as OWNER/NAME@REVISION, or {FRESH_HINT}",
        )
    if old.get("destination") != new.get("destination"):
        ways = [files.get("destination") or "files here, sent from here" for files in (old, new)]
        raise ResumeError(
            "the interrupted run cannot be resumed: its files went elsewhere",
            where=where,
            expected=ways[0],
            got=ways[1],
            hint=f"pass --upload, --workers and --delete-uploaded as for that run, or {FRESH_HINT}",
        )
    changes = []
    for part in ("program", "target"):
        if old.get(part) != new[part]:
            changes.append(f"{part} was {old.get(part)}, is {new[part]}")
    next_step = "undo the changes" if changes else "pass the same options"
    for part in ("options", "source"):
        before = old.get(part)
        before = before if isinstance(before, dict) else {}
        for key in sorted(before.keys() | new[part].keys()):
            same = is_same_source if part == "source" else operator.eq
            if not same(before.get(key), new[part].get(key)):
                known = key in before and key in new[part]
                if part == "options":
                    changes += _other_option(key, before.get(key), new[part].get(key))
                else:
                    changes.append(
                        f"source file {key} " + ("changed" if known else "is new" if key in new[part] else "is gone")
                    )
                    next_step = "undo the changes"
    if not changes and old.get("plan") != new["plan"]:
        changes.append("the source's config, tokenizer or tensors changed")
        next_step = "undo the changes"
    if changes:
        raise ResumeError(
            "the interrupted run cannot be resumed: " + "; ".join(changes[:5]),
            where=where,
            hint=f"{next_step}, or {FRESH_HINT}",
        )


def _other_option(key: str, before: Any, now: Any) -> Iterator[str]:
    """Yield what is said of an option with another value."""
    name = OPTION_NAMES.get(key) or f"--{key.replace('_', '-')}"
    if now is None and key != GGML:
        yield f"{name} was {before} and is not given now"
    elif before is None and key != GGML:
        yield f"{name} was not given and is {now} now"
    elif before is not None and now is not None:  # whether ggml is used follows from options
        yield f"{name} was {before}, is {now}"


def check_unchanged(plan: Plan, fingerprint: Mapping[str, Any]) -> None:
    """Check that the source files are those of which ``fingerprint`` was taken.

    Raises:
        FileFormatError: one changed meanwhile; what was read of it may be of both.
        InputOutputError: one cannot be looked at.
    """
    for path in plan.source_files:
        if mark_of(path) != fingerprint["source"][_name(plan, path)] and not is_cut(plan, path):
            raise FileFormatError(
                "changed during the conversion", where=path, hint="run again once nothing writes to the file"
            )
