"""``--draft keep|drop`` of the targets that write checkpoint folders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

from ..checkpoint.folder import Checkpoint
from ..checkpoint.shards import ShardCheckpoint, ShardedWeight
from ..checkpoint.weights import Weight
from ..errors import UsageError
from ..model.tensors import Draft
from ..plan import Dropped

KEEP, DROP = "keep", "drop"

Source = TypeVar("Source", Checkpoint, ShardCheckpoint)


def apply_draft_option(source: Source, draft: str) -> tuple[Source, tuple[Dropped, ...]]:
    """Return the source as a target sees it, and what it leaves out: with "drop", the draft layers.

    Raises:
        UsageError: neither "keep" nor "drop".
    """
    if draft not in (KEEP, DROP):
        raise UsageError("--draft: unknown", expected=f"{KEEP} or {DROP}", got=draft)
    weights = {name: weight for name, weight in source.weights.items() if not weight.is_draft}
    if draft == KEEP or len(weights) == len(source.weights):
        return source, ()
    stored = [part for weight in source.weights.values() if weight.is_draft for part in _parts(weight)]
    count = sum(1 + (part.scale is not None) for part in stored)
    dropped = Dropped("mtp.*", "--draft drop", count, sum(part.nbytes for part in stored))
    return replace(source, weights=weights, draft=Draft.NONE, n_draft=0), (dropped,)


def _parts(weight: Weight | ShardedWeight) -> Iterator[Weight]:
    yield from (weight,) if isinstance(weight, Weight) else weight.parts
