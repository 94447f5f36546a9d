"""Describing model-parallel shards."""

from __future__ import annotations

import math
from pathlib import Path

from ..checkpoint.shards import open_shards
from ..containers.folder_names import SHARD_NAME
from ..containers.safetensors import read_header
from ..containers.sources import shown
from ..errors import InputMissingError, InventoryError, UsageError
from ..model.tensors import is_draft_alone
from .description import DRAFT_ALONE, Description
from .folder import count_encodings, describe_config, draft_of, lenient_config
from .naming import DEPTH_KEYS, WIDTH_KEYS, family_of, layer_of, name_variant


def describe_shards(folder: Path) -> Description:
    """Return the description of a folder of model-parallel shards.

    Raises:
        Dsv4Error: nothing there that can be read.
    """
    found = Description(shown(folder), "model-parallel shards")
    config = lenient_config(folder, found)
    matches = [
        (path, match)
        for path in sorted(folder.glob("*.safetensors"))
        if (match := SHARD_NAME.fullmatch(path.name)) is not None
    ]
    found.files = len(matches)
    found.ranks = max(int(match[2]) for _, match in matches)
    names: set[str] = set()
    for path, _ in matches:
        for name, tensor in read_header(path).items():
            names.add(name)
            found.count(family_of(name), tensor.dtype, tensor.nbytes, layer_of(name))
    found.draft, found.draft_layers = draft_of(names, found)
    if is_draft_alone(names):
        found.notes.append(DRAFT_ALONE)
    if config is not None:
        describe_config(found, config)
        try:
            weights = open_shards(folder, may_be_draft=True).weights.values()
        except (InputMissingError, InventoryError, UsageError) as error:
            found.unexpected.append(str(error))
        else:
            found.elements = sum(math.prod(weight.shape) for weight in weights)
            count_encodings(found, (weight.parts[0] for weight in weights))
        name_variant(found, {key: getattr(config, key) for key in WIDTH_KEYS + DEPTH_KEYS})
    return found
