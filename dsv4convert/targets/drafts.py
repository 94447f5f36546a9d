"""``--draft keep|drop|only|split`` of the targets that write folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from ..checkpoint.folder import Checkpoint
from ..checkpoint.meaning import open_checked
from ..checkpoint.shards import ShardCheckpoint, ShardedWeight
from ..checkpoint.weights import Weight
from ..errors import UsageError, check_choice
from ..model.tensors import Draft
from ..plan import Dropped, Plan
from .output_config import config_without_draft, true_config

KEEP, DROP, ONLY, SPLIT = DRAFT_MODES = ("keep", "drop", "only", "split")

# How the folder of a draft is called after that of its model.
DRAFT_SUFFIX = "-draft"

Source = TypeVar("Source", Checkpoint, ShardCheckpoint)


# What a target sees of a source, config.json for it, and what is left out.
Chosen: TypeAlias = tuple[Source, Mapping[str, Any], tuple[Dropped, ...]]


def folders_of(out: Path, draft: str) -> list[tuple[Path, str]]:
    """Return the folders to write with what each holds: for "split" two, OUT without the draft and OUT-draft.

    Raises:
        UsageError: ``draft`` is none of ``DRAFT_MODES``.
    """
    check_choice("--draft", draft, DRAFT_MODES)
    if draft != SPLIT:
        return [(out, draft)]
    named = out if out.name else Path(os.path.abspath(out))
    return [(out, DROP), (named.with_name(named.name + DRAFT_SUFFIX), ONLY)]


def parts_of_one_model(plans: Sequence[Plan]) -> list[Plan]:
    """Return the plans of ``folders_of`` without listing as left out what another one of them writes."""
    if len(plans) == 1:
        return list(plans)
    reasons = {_reason(mode) for mode in (DROP, ONLY)}
    return [
        replace(plan, dropped=tuple(entry for entry in plan.dropped if entry.reason not in reasons)) for plan in plans
    ]


def folder_plans(plan: Callable[..., Plan], out: Path, draft: str) -> list[Plan]:
    """Return what ``plan`` (folder, draft=) makes for each of the ``folders_of`` a draft option.

    Raises:
        UsageError: ``draft`` is none of ``DRAFT_MODES``.
        Dsv4Error: as for ``plan``.
    """
    return parts_of_one_model([plan(folder, draft=mode) for folder, mode in folders_of(out, draft)])


def _reason(mode: str) -> str:
    return f"--draft {mode}"


def choose_draft(source: Source, draft: str) -> Chosen[Source]:
    """Return what a folder with ``draft`` "keep", "drop" or "only" is made of.

    Both config.json and the draft itself are those of the whole model with "only", so that the draft's reader finds
    the sizes that the two share.

    Raises:
        UsageError: another ``draft``, or "only" of a source without one.
    """
    check_choice("--draft", draft, (KEEP, DROP, ONLY))
    if draft == ONLY and source.draft is Draft.NONE:
        raise UsageError("--draft: the source has no draft to be written to a folder of its own", where=source.folder)
    left = {
        name: weight for name, weight in source.weights.items() if draft != KEEP and weight.is_draft != (draft == ONLY)
    }
    if not left:
        return source, true_config(source), ()
    stored = [part for weight in left.values() for part in _parts(weight)]
    count = sum(1 + (part.scale is not None) for part in stored)
    what = "mtp.*" if draft == DROP else "the model without its draft"
    left_out = (Dropped(what, _reason(draft), count, sum(part.nbytes for part in stored)),)
    weights = {name: weight for name, weight in source.weights.items() if name not in left}
    if draft == ONLY:
        return replace(source, weights=weights), true_config(source), left_out
    trunk = replace(source, weights=weights, draft=Draft.NONE, n_draft=0)
    return trunk, config_without_draft(true_config(trunk)), left_out


def open_with_draft_option(folder: Path, draft: str, *, strict: bool, index: str) -> Chosen[Checkpoint]:
    """Open and check a checkpoint folder as a target sees it; see ``choose_draft``.

    Raises:
        UsageError: as for ``choose_draft``.
        Dsv4Error: as for ``open_checked``.
    """
    return choose_draft(open_checked(folder, draft_wanted=draft != DROP, strict=strict, index=index), draft)


def _parts(weight: Weight | ShardedWeight) -> Iterator[Weight]:
    yield from (weight,) if isinstance(weight, Weight) else weight.parts
