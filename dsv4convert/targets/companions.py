"""What plans of folders have in common: a place apart from the source, and the files that accompany the weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.folder import Checkpoint
from ..checkpoint.shards import ShardCheckpoint
from ..containers.folder_names import AUXILIARY_FILES
from ..containers.untrusted import read_whole
from ..engine.outputs import PARTIAL_SUFFIX, REPLACED_SUFFIX
from ..errors import FileFormatError, UsageError
from ..plan import Dropped, OutputFile, Plan
from .safetensors_files import whole_file

# Together; the published ones are 7 MB. They are held in memory with the plan.
MAX_AUXILIARY_BYTES = 64 * 2**20
OTHER_FOLDER = "choose another output folder"


def folder_plan(
    target: str,
    source: Checkpoint | ShardCheckpoint,
    out: Path,
    files: Iterable[OutputFile],
    dropped: Iterable[Dropped],
    options: Mapping[str, Any],
    notes: Iterable[str] = (),
) -> Plan:
    """Return the plan of the folder ``out`` made of ``source``, with notes besides the source's own."""
    return Plan(
        target,
        source=source.folder,
        destination=out,
        is_folder=True,
        files=tuple(files),
        dropped=tuple(dropped),
        options=options,
        source_bytes=source.nbytes,
        notes=(*source.notes, *notes),
    )


def check_apart(folder: Path, files: Sequence[Path], out: Path) -> Path:
    """Return ``out`` as a path with a name, having made sure that replacing it leaves the source alone.

    Raises:
        UsageError: the source, or a file that it links to, lies inside the output, or the output inside it.
    """
    absolute = Path(os.path.abspath(out))
    if not absolute.name:
        raise UsageError("the output must be a folder name", where=out)
    source = _real(folder)
    # The output's own name, those under which it is made and an older one leaves.
    for suffix in ("", PARTIAL_SUFFIX, REPLACED_SUFFIX):
        target = _real(absolute.with_name(absolute.name + suffix))
        for path in (source, *map(_real, files)):
            if target == path or target in path.parents:
                raise UsageError("the source lies inside the output", where=out, got=path, hint=OTHER_FOLDER)
        if source in target.parents:
            raise UsageError("the output lies inside the source", where=out, got=source, hint=OTHER_FOLDER)
    return out if out.name == absolute.name else absolute


def _real(path: Path) -> Path:
    """Return a path with its links followed as far as they lead; one that leads in a circle stays as it is."""
    return Path(os.path.realpath(path))


def auxiliary_files(source: Path, also: Sequence[str] = ()) -> list[OutputFile]:
    """Return the tokenizer, generation and licence files of ``source``, and those named ``also``, byte for byte.

    Raises:
        InputMissingError: one cannot be read.
        FileFormatError: together they are larger than ``MAX_AUXILIARY_BYTES``.
    """
    files: list[OutputFile] = []
    left = MAX_AUXILIARY_BYTES
    for name in (*AUXILIARY_FILES, *also):
        path = source / name
        if not os.path.lexists(path):
            continue
        try:
            content = read_whole(path, left)
        except FileFormatError:
            raise FileFormatError(
                "too large to be copied",
                where=path,
                expected=f"at most {MAX_AUXILIARY_BYTES} bytes of tokenizer and generation files",
                hint="check that the file is what the name says",
            ) from None
        left -= len(content)
        files.append(whole_file(name, content))
    return files
