"""The fingerprint of a plan: config, headers, options and version, and whether a later run has the same one."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from .. import __version__
from ..errors import FileFormatError, ResumeError
from ..plan import Plan
from .consume import is_cut
from .outputs import FRESH_HINT, os_errors

# What a source file counts as that the run has used up.
USED_UP = [0, 0]


def fingerprint_of(plan: Plan) -> dict[str, Any]:
    """Return what decides a plan's output: program, options, source files, and every range of the plan.

    Source files count by name, size and modification time; their headers are part of the plan. Those that the plan
    has used up count by name.
    """
    sources: dict[str, list[int]] = {}
    digest = xxhash.xxh3_128()
    for file in plan.files:
        digest.update(f"{file.name} {file.nbytes}\n".encode())
        digest.update(file.header)
        for tensor in file.tensors:
            digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape} {tensor.offset}\n".encode())
            for segment in tensor.segments:
                digest.update(f"{segment.operation} {segment.rows} {segment.row_bytes}\n".encode())
                for operand in segment.operands:
                    # A file beside the model, such as an importance matrix, goes by its whole path.
                    inside = operand.file.parent == plan.source
                    name = operand.file.name if inside else os.path.abspath(operand.file)
                    if name not in sources:
                        with os_errors(operand.file, "read"):
                            status = operand.file.stat()
                        used_up = is_cut(plan, operand.file)
                        sources[name] = USED_UP if used_up else [status.st_size, status.st_mtime_ns]
                    digest.update(f"{name} {operand[1:]}\n".encode())
    return {
        "program": f"dsv4convert {__version__}",
        "target": plan.target,
        "options": json.loads(json.dumps(plan.options)),
        "source": sources,
        "plan": digest.hexdigest(),
    }


def is_same_source(before: Sequence[int] | None, now: Sequence[int] | None) -> bool:
    """Return whether a source file is as it was, or was used up since."""
    return before == now or (before is not None and now == USED_UP)


def check_same(old: Mapping[str, Any], new: Mapping[str, Any], where: Path) -> None:
    """Check that an interrupted run can go on under the plan of this one.

    Raises:
        ResumeError: the program, the options or the source changed; says what.
    """
    changes = []
    for part in ("program", "target"):
        if old.get(part) != new[part]:
            changes.append(f"{part} was {old.get(part)}, is {new[part]}")
    for part, what in (("options", "option"), ("source", "source file")):
        before = old.get(part)
        before = before if isinstance(before, dict) else {}
        for key in sorted(before.keys() | new[part].keys()):
            same = is_same_source if part == "source" else operator.eq
            if not same(before.get(key), new[part].get(key)):
                known = key in before and key in new[part]
                if part == "options":
                    changes.append(f"{what} {key} was {before.get(key)}, is {new[part].get(key)}")
                else:
                    changes.append(
                        f"{what} {key} " + ("changed" if known else "is new" if key in new[part] else "is gone")
                    )
    if not changes and old.get("plan") != new["plan"]:
        changes.append("the source's config, tokenizer or tensors changed")
    if changes:
        raise ResumeError(
            "the interrupted run cannot be resumed: " + "; ".join(changes[:5]),
            where=where,
            hint=f"undo the changes, or {FRESH_HINT}",
        )


def check_unchanged(plan: Plan, fingerprint: Mapping[str, Any]) -> None:
    """Check that the source files are those of which ``fingerprint`` was taken.

    Raises:
        FileFormatError: one changed meanwhile; what was read of it may be of both.
        InputOutputError: one cannot be looked at.
    """
    for name, before in fingerprint["source"].items():
        path = plan.source / name
        with os_errors(path, "read"):
            status = path.stat()
        if [status.st_size, status.st_mtime_ns] != before and not is_cut(plan, path):
            raise FileFormatError(
                "changed during the conversion", where=path, hint="run again once nothing writes to the file"
            )
