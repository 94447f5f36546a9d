"""What the page of a conversion shows besides its summary: checksums, parts of source and output, and the time line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..containers.presence import is_file
from ..errors import Dsv4Error

if TYPE_CHECKING:
    from ..engine.conversion import Summary
    from ..engine.monitor import Timeline

# All files of a split GGUF but the first, of which the set is described.
LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")


def more_for_a_page(summary: Summary, source: Path, timeline: Timeline) -> dict[str, Any]:
    """Return what ``--json`` has besides the summary where a page is asked for; weights are not read for it.

    ``before`` and ``after`` are the parts of source and output as ``inspect`` has them; none of what it does not know.
    """
    return {
        "checksums": _checksums(summary),
        "timeline": timeline.as_json(),
        "before": _parts(source),
        "after": [part for output in _outputs(summary) for part in _parts(output)],
    }


def _outputs(summary: Summary) -> list[Path]:
    """Return what ``inspect`` takes of a conversion's outputs: a GGUF or the first of a split one, or a folder."""
    paths = [Path(name) for name, _ in summary.files]
    ggufs = [path for path in paths if path.suffix == ".gguf" and LATER_PART.search(path.name) is None]
    return ggufs or list(dict.fromkeys(path.parent for path in paths if path.suffix == ".safetensors"))


def _parts(path: Path) -> list[dict[str, Any]]:
    from ..api import inspect

    try:
        parts: list[dict[str, Any]] = inspect(path).as_json()["parts"]
    except Dsv4Error:  # a layout that inspect does not know, or an output that was uploaded and is gone
        return []
    return [{key: part[key] for key in ("layer", "family", "dtype", "bytes")} for part in parts]


def _checksums(summary: Summary) -> dict[str, str]:
    """Return the checksum of each file that was written, by its path, as the manifests have them."""
    from ..engine.manifest import manifest_of, read_manifest

    paths = {name: Path(name).absolute() for name, _ in summary.files}
    # A manifest is named after a file, after the first of a split set, or after a folder.
    outputs = dict.fromkeys(place for path in paths.values() for place in (path, *path.parents) if place.name)
    found: dict[Path, str] = {}
    for output in outputs:
        if is_file(manifest_of(output)):
            manifest = read_manifest(manifest_of(output))
            folder = output if manifest["is_folder"] else output.parent
            found.update((folder / entry["name"], entry["checksum"]) for entry in manifest["files"])
    return {name: found[path] for name, path in paths.items() if path in found}
