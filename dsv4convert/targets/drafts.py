"""``--draft keep|drop`` of the targets that write checkpoint folders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ..checkpoint.folder import Checkpoint
from ..checkpoint.meaning import open_checked
from ..checkpoint.shards import ShardCheckpoint, ShardedWeight
from ..checkpoint.weights import Weight
from ..errors import check_choice
from ..model.tensors import Draft
from ..plan import Dropped

KEEP, DROP = "keep", "drop"

Source = TypeVar("Source", Checkpoint, ShardCheckpoint)


def apply_draft_option(source: Source, draft: str) -> tuple[Source, tuple[Dropped, ...]]:
    """Return the source as a target sees it, and what it leaves out: with "drop", the draft layers.

    Raises:
        UsageError: neither "keep" nor "drop".
    """
    check_choice("--draft", draft, (KEEP, DROP))
    weights = {name: weight for name, weight in source.weights.items() if not weight.is_draft}
    if draft == KEEP or len(weights) == len(source.weights):
        return source, ()
    stored = [part for weight in source.weights.values() if weight.is_draft for part in _parts(weight)]
    count = sum(1 + (part.scale is not None) for part in stored)
    dropped = Dropped("mtp.*", "--draft drop", count, sum(part.nbytes for part in stored))
    return replace(source, weights=weights, draft=Draft.NONE, n_draft=0), (dropped,)


def open_with_draft_option(
    folder: Path, draft: str, *, strict: bool, index: str
) -> tuple[Checkpoint, tuple[Dropped, ...]]:
    """Open and check a checkpoint folder as a target sees it; see ``apply_draft_option``.

    Raises:
        UsageError: neither "keep" nor "drop".
        Dsv4Error: as for ``open_checked``.
    """
    checkpoint = open_checked(folder, draft_wanted=draft != DROP, strict=strict, index=index)
    return apply_draft_option(checkpoint, draft)


def _parts(weight: Weight | ShardedWeight) -> Iterator[Weight]:
    yield from (weight,) if isinstance(weight, Weight) else weight.parts
