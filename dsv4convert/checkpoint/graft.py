"""A checkpoint folder with the draft of another one: trunk and draft of two releases, read as one model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..containers.folder_names import CONFIG_NAME
from ..errors import InventoryError, UsageError
from ..model.config import ModelConfig, load_config, parse_config
from ..model.config_v41 import TEXT
from ..model.tensors import DRAFT_PREFIX
from .folder import BY_INDEX, Checkpoint, open_folder, read_folder_headers, resolve
from .renaming import official_name

DRAFT_COUNT = "num_nextn_predict_layers"
RATIOS = "compress_ratios"
DSPARK_KEYS = "dspark_"


def is_draft_name(name: str) -> bool:
    """Return whether a tensor, by its name in a file, belongs to a draft layer.

    >>> is_draft_name("model.mtp.0.norm.weight"), is_draft_name("norm.weight")
    (True, False)
    """
    return official_name(name).startswith(DRAFT_PREFIX)


def open_grafted(folder: Path, draft_from: Path, *, index: str = BY_INDEX) -> Checkpoint:
    """Open the checkpoint in ``folder`` with the draft of the folder ``draft_from`` instead of its own.

    ``draft_from`` holds a whole model or a draft alone. The config is that of ``folder`` with the other's keys of draft
    layers; every tensor of the draft is checked against it.

    Raises:
        UsageError: the two are one folder.
        InventoryError: ``draft_from`` has no draft, is of another version, or its draft does not fit the model.
        Dsv4Error: as for ``open_folder``.
    """
    if os.path.realpath(folder) == os.path.realpath(draft_from):
        raise UsageError("the draft is that of the source itself", where=draft_from)
    base = open_folder(folder, draft_wanted=False, index=index)
    donor = load_config(draft_from)
    if donor.version is not base.config.version:
        raise InventoryError(
            "the draft belongs to another architecture",
            where=draft_from,
            expected=base.config.version.value,
            got=donor.version.value,
        )
    theirs, _, _ = read_folder_headers(draft_from)
    draft = {name: tensor for name, tensor in theirs.items() if is_draft_name(name)}
    if not draft:
        raise InventoryError("no draft layers to take", where=draft_from, expected="tensors named mtp.N.*")
    stored, files, _ = read_folder_headers(folder, index)
    trunk = {name: tensor for name, tensor in stored.items() if not is_draft_name(name)}
    holders = tuple(dict.fromkeys(tensor.file for tensor in draft.values()))
    config = parse_config(grafted_config(base.config, donor), folder / CONFIG_NAME)
    found = resolve(folder, config, trunk | draft, (*files, *holders), base.notes)
    return replace(found, notes=(*found.notes, *_expert_notes(found)))


def _expert_notes(grafted: Checkpoint) -> tuple[str, ...]:
    """Return a note where the draft's experts are stored otherwise than the trunk's, of which alone a config speaks."""
    experts = [weight for weight in grafted.weights.values() if weight.expert is not None]
    trunk, draft = ({w.encoding.value for w in experts if w.is_draft is part} for part in (False, True))
    if not trunk or not draft or draft <= trunk:
        return ()
    stored = f"the draft's experts are {' and '.join(sorted(draft))}, the model's {' and '.join(sorted(trunk))}"
    return (f"{stored}: {CONFIG_NAME} states the model's, and a reader may expect it of both",)


def grafted_config(base: ModelConfig, donor: ModelConfig) -> dict[str, Any]:
    """Return the config.json of ``base`` with what ``donor`` says of its draft layers instead of its own keys."""
    if TEXT in base.raw:
        return {**base.raw, TEXT: _grafted(base.raw[TEXT], base, donor)}
    return _grafted(base.raw, base, donor)


def _grafted(text: Mapping[str, Any], base: ModelConfig, donor: ModelConfig) -> dict[str, Any]:
    config = {key: value for key, value in text.items() if not key.startswith(DSPARK_KEYS)}
    config |= {key: value for key, value in donor.flat.items() if key.startswith(DSPARK_KEYS)}
    config[DRAFT_COUNT] = donor.num_nextn_predict_layers
    if RATIOS in config:
        drafts = donor.compress_ratios[donor.num_hidden_layers :]
        config[RATIOS] = [*config[RATIOS][: base.num_hidden_layers], *drafts]
    return config
