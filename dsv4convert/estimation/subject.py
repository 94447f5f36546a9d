"""What is estimated: a checkpoint folder, a GGUF, shards or a config.json alone, as one list of its weights' bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.folder import BY_INDEX, Checkpoint, open_folder, resolve
from ..checkpoint.shards import ShardCheckpoint, ShardedWeight, is_shard_folder, open_shards
from ..checkpoint.weights import Weight
from ..containers.folder_names import CONFIG_NAME
from ..containers.gguf import is_gguf, open_gguf
from ..containers.json_object import read_json_object
from ..containers.presence import exists, is_file, is_folder
from ..containers.safetensors import Stored
from ..containers.sources import shown, size_of, unlisted
from ..errors import InputMissingError, UnsupportedError
from ..inspection.description import ranges
from ..inspection.gguf import gguf_family, official_rows
from ..inspection.naming import family_of, layer_of
from ..model.config import ModelConfig, load_config, parse_config
from ..model.tensors import Draft
from ..reference.weights.gguf import gguf_config
from ..synth.write import synth_tensors

FOLDER, CONFIG, GGUF, SHARDS = "checkpoint folder", "config.json", "GGUF", "shards"

_EXPERT = re.compile(r"\.experts\.\d+\.")
_BLOCK = re.compile(r"blk\.(\d{1,9})\.")
_LAYER_ZERO = re.compile(r"^(?:layers|mtp)\.0\.")


class Part(NamedTuple):
    """A weight of the model with its scales, or all routed experts' weights of one name in a layer together.

    ``name`` is the official one without the layer's prefix and the expert's number; ``layer`` is a trunk layer, or a
    draft layer where ``is_draft``. ``tensors`` are those stored, scales included.
    """

    name: str
    layer: int | None
    is_draft: bool
    family: str
    type: str
    tensors: int
    elements: int
    nbytes: int

    def as_json(self) -> dict[str, Any]:
        """Return the part as plain JSON values."""
        values = self._asdict()
        nbytes = values.pop("nbytes")
        return {**values, "bytes": nbytes}


@dataclass(frozen=True)
class Subject:
    """A model to estimate: where it lies, its config, and the bytes of its weights as they are stored.

    ``checkpoint`` is what conversions of it can be planned from: that of a folder, or one as published for a config
    alone. ``files`` gives the bytes on disk by file name; empty for a config alone.
    """

    path: Path
    kind: str
    config: ModelConfig
    draft: Draft
    n_draft: int
    parts: tuple[Part, ...]
    checkpoint: Checkpoint | None = None
    mp: int | None = None
    files: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Return the bytes of all weights and scales, each counted once."""
        return sum(part.nbytes for part in self.parts)


def open_subject(path: Path, *, index: str = BY_INDEX, draft_wanted: bool = True) -> Subject:
    """Open what is to be estimated; without ``draft_wanted``, a draft that is not whole does not count.

    Raises:
        InputMissingError: nothing there, or nothing that is a model.
        Dsv4Error: what is there cannot be read.
    """
    if not exists(path):
        raise InputMissingError("no such file or folder", where=path)
    if is_file(path) and path.suffix == ".json":
        return _of_config(path, parse_config(read_json_object(path), path))
    if is_file(path) and path.suffix == ".safetensors":
        path = path.parent
    if is_shard_folder(path):
        return _of_opened(path, SHARDS, open_shards(path))
    has_weights = is_folder(path) and any(path.glob("*.safetensors"))
    if is_gguf(path):
        return _of_gguf(path)
    if is_folder(path) and is_file(path / CONFIG_NAME) and not has_weights:
        if (hint := unlisted(path)) is not None:  # there may be weights all the same
            raise InputMissingError(
                "no weights", where=path, hint=f"for its config alone, pass {shown(path)}/{CONFIG_NAME}; {hint}"
            )
        return _of_config(path / CONFIG_NAME, load_config(path))
    if is_folder(path):
        return _of_opened(path, FOLDER, open_folder(path, draft_wanted=draft_wanted, index=index))
    raise InputMissingError(
        "neither a checkpoint, a GGUF nor a config",
        where=path,
        hint="pass a checkpoint folder, a .gguf file, a folder of shards or a config.json",
    )


def _of_opened(path: Path, kind: str, opened: Checkpoint | ShardCheckpoint) -> Subject:
    """Return the model of a folder or of shards that are opened."""
    return Subject(
        path,
        kind,
        opened.config,
        opened.draft,
        opened.n_draft,
        parts_of(opened.weights.values()),
        checkpoint=opened if isinstance(opened, Checkpoint) else None,
        mp=None if isinstance(opened, Checkpoint) else opened.mp,
        files={file.name: size_of(file) for file in opened.files},
        notes=opened.notes,
    )


def _of_config(path: Path, config: ModelConfig) -> Subject:
    """Return a model of which only the config is there: weights are taken to be stored as published."""
    note = "a config alone: every weight is taken to be stored as the published checkpoints store it"
    return replace(_of_opened(path, CONFIG, published_checkpoint(path, config)), files={}, notes=(note,))


def published_checkpoint(path: Path, config: ModelConfig) -> Checkpoint:
    """Return the checkpoint that a config describes, with each weight stored as published; no file holds it.

    Raises:
        UsageError: a dimension that packed FP4 cannot hold.
    """
    quantization = config.flat.get("quantization_config")
    inner = quantization.get("expert_dtype") if isinstance(quantization, Mapping) else None
    if inner is not None and "expert_dtype" not in config.flat:
        config = replace(config, flat={**config.flat, "expert_dtype": inner})
    stored = {t.name: Stored(path, t.dtype, t.shape, 0, t.nbytes) for t in synth_tensors(config)}
    return resolve(path.parent, config, stored, (path,))


def _of_gguf(path: Path) -> Subject:
    model = open_gguf(path)
    config, n_draft = gguf_config(model)
    tensors = ((t.name, t.type, t.shape, t.nbytes) for t in model.tensors.values())
    parts = gguf_parts(model.architecture, tensors, config.num_hidden_layers if n_draft else None)
    there = {part.layer for part in parts if not part.is_draft}
    absent = [layer for layer in range(config.num_hidden_layers) if layer not in there]
    if absent:
        raise UnsupportedError(
            "not a whole model: no tensor of the model's layers" + (f" {ranges(absent)}" if there - {None} else ""),
            where=path,
            expected=f"{config.num_hidden_layers} layers",
            got=config.num_hidden_layers - len(absent),
            hint="pass the file of the model, not that of its draft",
        )
    files = {part.path.name: part.nbytes for part in model.parts}
    return Subject(path, GGUF, config, Draft.MTP if n_draft else Draft.NONE, n_draft, parts, files=files)


def parts_of(weights: Iterable[Weight | ShardedWeight]) -> tuple[Part, ...]:
    """Return the parts of a checkpoint's weights, or of those of shards, each counted once."""
    found: dict[tuple[str, str], Part] = {}
    for weight in weights:
        full = _EXPERT.sub(".experts.", weight.name)
        stored = weight.parts[0] if isinstance(weight, ShardedWeight) else weight
        key = full, weight.encoding.value
        part = found.get(key)
        if part is None:
            layer = weight.layer if weight.is_draft else layer_of(full)  # blocks of a tower are no layers of the model
            name = full if layer is None else full.removeprefix(stored.prefix)
            part = Part(name, layer, weight.is_draft, family_of(full), weight.encoding.value, 0, 0, 0)
        found[key] = part._replace(
            tensors=part.tensors + 1 + (stored.scale is not None),
            elements=part.elements + math.prod(weight.shape),
            nbytes=part.nbytes + weight.nbytes,
        )
    return tuple(found.values())


def gguf_parts(
    architecture: str | None, tensors: Iterable[tuple[str, str, tuple[int, ...], int]], first_draft: int | None
) -> tuple[Part, ...]:
    """Return the parts of a GGUF's tensors (name, type, shape, bytes).

    ``first_draft`` is the block of the first draft layer, None without any.
    """
    rows = official_rows(architecture)
    parts: list[Part] = []
    for name, kind, shape, nbytes in tensors:
        block = _BLOCK.match(name)
        layer = None if block is None else int(block[1])
        official = rows.get(name if block is None else name[block.end() :], name)
        is_draft = layer is not None and first_draft is not None and layer >= first_draft
        family = gguf_family(name, rows, first_draft) or "other"
        own = _LAYER_ZERO.sub("", _EXPERT.sub(".experts.", official))
        number = layer - first_draft if is_draft and layer is not None and first_draft is not None else layer
        parts.append(Part(own, number, is_draft, family, kind, 1, math.prod(shape), nbytes))
    return tuple(parts)
