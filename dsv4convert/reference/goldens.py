"""Goldens: a folder with one .npy for every activation of a run, and an index in the order of computation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..containers.json_object import read_json
from ..containers.presence import exists, is_file
from ..containers.untrusted import open_regular
from ..engine.manifest import check_outside_outputs
from ..engine.new_folder import NewFolder
from ..errors import FileFormatError, InputMissingError, UsageError, not_read
from .model import Model
from .weights.protocol import Array

INDEX_NAME = "goldens.json"
FORMAT = 1

# An index of V4-Pro's 61 layers with 145 tokens takes 200 KiB.
MAX_INDEX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Goldens:
    """Recorded activations: those of positions ``recorded_from`` on, of a run over ``tokens``."""

    folder: Path
    tokens: tuple[int, ...]
    recorded_from: int
    layers: int
    activation_rounding: bool
    entries: tuple[tuple[str, str], ...]  # (name, file)

    def activations(self) -> Iterator[tuple[str, Array]]:
        """Yield (name, value) in the order of computation.

        Raises:
            InputMissingError, FileFormatError: a file is not there or is no .npy.
        """
        for name, file in self.entries:
            yield name, _load(self.folder / file)


def is_goldens(path: Path) -> bool:
    """Return whether ``path`` is a folder of goldens."""
    return is_file(path / INDEX_NAME)


def recorded_activations(model: Model, tokens: Sequence[int], recorded_from: int = 0) -> Iterator[tuple[str, Array]]:
    """Yield the activations of positions ``recorded_from`` on; those before only fill the caches.

    Raises:
        UsageError: there is no position ``recorded_from``, or the tokens are no prompt of the model.
    """
    if recorded_from and not 0 < recorded_from < len(tokens):
        raise UsageError("first recorded position", expected=f"0 to {len(tokens) - 1}", got=recorded_from)
    state = model.new_state()
    if recorded_from:
        model.prefill(tokens[:recorded_from], state)
    yield from model.activations(tokens[recorded_from:], state)


def write_goldens(
    folder: Path, model: Model, tokens: Sequence[int], recorded_from: int = 0, *, overwrite: bool = False
) -> int:
    """Run ``model`` over ``tokens`` and write every activation; return how many.

    Raises:
        OutputExistsError: the folder holds something and ``overwrite`` is false, or it is no goldens folder.
        UsageError: as for ``recorded_activations``, or the folder would lie in a finished output.
        SpaceError, InputOutputError: the folder cannot be written.
    """
    check_outside_outputs(folder)
    index: dict[str, Any] = {
        "format": FORMAT,
        "tokens": [int(token) for token in tokens],
        "recorded_from": recorded_from,
        "layers": model.n_layers,
        "activation_rounding": model.activation_rounding,
        "activations": [],
    }
    with NewFolder(folder, INDEX_NAME, _is_of_goldens, overwrite=overwrite).written() as partial:
        _write_index(partial, index)  # by which the folder is known, should the run be killed
        for number, (name, value) in enumerate(recorded_activations(model, tokens, recorded_from)):
            file = f"{number:04d}.{name}.npy"
            np.save(partial / file, value)
            shape, dtype = list(value.shape), str(value.dtype)
            index["activations"].append({"name": name, "file": file, "shape": shape, "dtype": dtype})
        _write_index(partial, index)
    return len(index["activations"])


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _is_of_goldens(name: str) -> bool:
    return name.endswith(".npy") or name == INDEX_NAME


def open_goldens(folder: Path) -> Goldens:
    """Read the index of a goldens folder.

    Raises:
        InputMissingError: there is none.
        FileFormatError: it is malformed.
    """
    path = folder / INDEX_NAME
    if not exists(path):
        raise InputMissingError(f"{INDEX_NAME} is missing", where=folder)
    index = read_json(path, MAX_INDEX_BYTES, error=FileFormatError, hint="record the goldens again")
    if not _is_index(index):
        raise FileFormatError(
            "not an index of goldens",
            where=path,
            expected=f"format {FORMAT}",
            hint="record the goldens again",
        )
    return Goldens(
        folder=folder,
        tokens=tuple(index["tokens"]),
        recorded_from=index["recorded_from"],
        layers=index["layers"],
        activation_rounding=index["activation_rounding"],
        entries=tuple((entry["name"], entry["file"]) for entry in index["activations"]),
    )


def _is_index(index: Any) -> bool:
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        return False
    tokens, entries = index.get("tokens"), index.get("activations")
    return (
        isinstance(tokens, list)
        and all(type(token) is int for token in tokens)
        and type(index.get("recorded_from")) is int
        and type(index.get("layers")) is int
        and type(index.get("activation_rounding")) is bool
        and isinstance(entries, list)
        and all(map(_is_entry, entries))
    )


def _is_entry(entry: object) -> bool:
    name, file = (entry.get("name"), entry.get("file")) if isinstance(entry, dict) else (None, None)
    return isinstance(name, str) and isinstance(file, str) and file.endswith(".npy") and Path(file).name == file


def _load(path: Path) -> Array:
    try:
        with open_regular(path) as file:
            value: Array = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise InputMissingError("no such file", where=path, hint="record the goldens again") from None
    except OSError as error:
        raise not_read(path, error) from None
    except (ValueError, EOFError) as error:
        raise FileFormatError(f"not a readable .npy ({error})", where=path) from None
    return value
