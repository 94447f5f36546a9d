"""Opens a folder of model-parallel shards: every weight under its official name, with its part on each rank.

Nothing of the weights is read. A set that is incomplete or mixed, and tensors that are missing, unknown
or misshapen on any rank, end here with one line that names rank and tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from ..containers.folder_names import CONFIG_NAME, SHARD_NAME, shard_name
from ..containers.presence import is_file, is_folder
from ..containers.safetensors import Stored, read_header
from ..containers.sources import prefetch_heads, shown, unlisted
from ..errors import InputMissingError, InventoryError, and_more
from ..model.config import ModelConfig, load_config
from ..model.parallel import SPLIT_AXIS, check_divides, expert_rank, local_shape
from ..model.tensors import Draft, Expected, Row, Split, checkpoint_tensors, is_draft_alone, scale_name
from .folder import draft_alone, draft_kind, vision_kind, with_draft_layers
from .weights import Encoding, Weight, pair


class ShardedWeight(NamedTuple):
    """A weight of the whole model with its parts: one per rank where it is split, else one.

    ``parts`` joined along ``axis`` are the weight; each is a weight of its own with shape, place and
    scales. ``copies`` are the same tensor on the other ranks, where every rank has it whole.
    """

    name: str
    row: Row
    shape: tuple[int, ...]
    parts: tuple[Weight, ...]
    copies: tuple[Weight, ...]

    @property
    def axis(self) -> int | None:
        """Return the dimension along which the parts are joined, None for a single part."""
        return SPLIT_AXIS[self.row.split]

    @property
    def encoding(self) -> Encoding:
        """Return how the bytes stand for numbers, the same in all parts."""
        return self.parts[0].encoding

    @property
    def block(self) -> tuple[int, int] | None:
        """Return the rows and columns that share a scale, None without scales."""
        return self.parts[0].block

    @property
    def layer(self) -> int | None:
        """Return the trunk layer or draft stage."""
        return self.parts[0].layer

    @property
    def expert(self) -> int | None:
        """Return the routed expert."""
        return self.parts[0].expert

    @property
    def is_draft(self) -> bool:
        """Return whether the weight belongs to a draft layer."""
        return self.parts[0].is_draft

    @property
    def nbytes(self) -> int:
        """Return the bytes of the weight and its scales, counted once."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class ShardCheckpoint:
    """A folder of shards, read from headers alone and checked against the name tables.

    ``weights`` holds every weight under its official name in the published order. ``n_tensors`` counts
    stored tensors of all ranks.
    """

    folder: Path
    config: ModelConfig
    mp: int
    weights: Mapping[str, ShardedWeight]
    draft: Draft
    n_draft: int
    files: tuple[Path, ...]
    n_tensors: int
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Return the payload bytes of all weights and scales, each counted once."""
        return sum(weight.nbytes for weight in self.weights.values())


def shard_files(folder: Path) -> tuple[int, dict[int, Path]]:
    """Return (number of ranks, file of each rank that is there) of a folder; (0, {}) where there is no shard.

    Raises:
        InputMissingError: the folder is not there.
        InventoryError: shards of several sets, or of ranks that the set does not have.
    """
    if is_file(folder):
        raise InputMissingError("a file, not a folder", where=folder, hint=f"pass its folder, {shown(folder.parent)}")
    if not is_folder(folder):
        raise InputMissingError("no such folder", where=folder, hint="pass the folder of the shards")
    found = {
        (int(match[2]), int(match[1])): path
        for path in sorted(folder.iterdir())
        if (match := SHARD_NAME.fullmatch(path.name)) is not None
    }
    sizes = sorted({mp for mp, _ in found})
    if len(sizes) > 1:
        raise InventoryError(
            "shards of several conversions in one folder",
            where=folder,
            expected=f"one set, e.g. {shard_name(0, sizes[0])}",
            got=", ".join(f"mp{mp}" for mp in sizes),
            hint="move each set to a folder of its own",
        )
    for (mp, rank), path in found.items():
        if rank >= mp:
            raise InventoryError(
                f"rank {rank} of {mp}: out of range", where=path, expected=f"ranks 0 to {mp - 1}", got=rank
            )
    return (sizes[0] if sizes else 0), {rank: path for (_, rank), path in sorted(found.items())}


def is_shard_folder(folder: Path) -> bool:
    """Return whether ``folder`` holds model-parallel shards."""
    return is_folder(folder) and any(SHARD_NAME.fullmatch(path.name) for path in folder.iterdir())


def open_shards(folder: Path, *, may_be_draft: bool = False) -> ShardCheckpoint:
    """Open the complete set of shards in ``folder``, with ``may_be_draft`` those of a draft without its model too.

    Raises:
        InputMissingError: the folder, ``config.json`` or a rank is not there.
        ConfigError, UnsupportedError: see ``load_config``.
        UsageError: the config cannot be divided among so many ranks.
        FileFormatError: a malformed safetensors file.
        InventoryError: a mixed set; missing, unknown or misshapen tensors.
    """
    mp, files = shard_files(folder)
    if not files:
        raise InputMissingError(
            "no model-parallel shards",
            where=folder,
            expected="model0-mpN.safetensors, model1-mpN.safetensors, …",
            hint=unlisted(folder),
        )
    absent = [rank for rank in range(mp) if rank not in files]
    if absent:
        raise InputMissingError(
            f"the shard of rank {absent[0]} of {mp} is missing{and_more(absent)}",
            where=folder,
            expected=shard_name(absent[0], mp),
            got=f"{len(files)} of {mp} ranks",
            hint="copy the shards of all ranks into one folder",
        )
    if not is_file(folder / CONFIG_NAME):
        raise InputMissingError(
            f"{CONFIG_NAME} is missing",
            where=folder,
            hint="copy config.json from the checkpoint that the shards were made from",
        )
    config = load_config(folder)
    check_divides(config, mp, folder / CONFIG_NAME)
    prefetch_heads(files.values())
    ranks = [read_header(files[rank]) for rank in range(mp)]
    if not may_be_draft and is_draft_alone(name for tensors in ranks for name in tensors):
        raise draft_alone(folder)
    return _resolve(folder, config, mp, [files[rank] for rank in range(mp)], ranks)


def _resolve(
    folder: Path, config: ModelConfig, mp: int, files: list[Path], ranks: list[dict[str, Stored]]
) -> ShardCheckpoint:
    """Check every rank against the tables and join what belongs together."""
    names = {name: stored for tensors in ranks for name, stored in tensors.items()}
    n_tensors = sum(map(len, ranks))
    draft, n_draft = draft_kind(names, folder)
    weights: dict[str, ShardedWeight] = {}
    config = with_draft_layers(config, draft, n_draft)
    has_vision, has_tower = vision_kind(names)
    of_draft = is_draft_alone(names)
    for expected in checkpoint_tensors(config, draft, n_draft, has_vision=has_vision, has_tower=has_tower):
        if of_draft and not expected.is_draft:
            continue
        split = expected.row.split
        holders = range(mp)
        if split is Split.EXPERT and expected.expert is not None:
            rank = expert_rank(expected.expert, config.n_experts(expected.is_draft), mp)
            holders = range(rank, rank + 1)
        local = expected._replace(shape=local_shape(expected.shape, split, mp))
        parts = tuple(_take(local, rank, ranks, files) for rank in holders)
        _check_same_storage(expected.name, holders, parts)
        copied = split is Split.COPY
        weights[expected.name] = ShardedWeight(
            expected.name, expected.row, expected.shape, parts[:1] if copied else parts, parts[1:] if copied else ()
        )
    for rank, left in enumerate(ranks):
        if left:
            name = next(iter(left))
            known = name in weights or name.removesuffix(".scale") + ".weight" in weights
            raise InventoryError(
                f"rank {rank}: tensor {name}: {'belongs to another rank' if known else 'unknown'}{and_more(left)}",
                where=files[rank],
                hint="are shards of two conversions mixed, or was a file renamed?",
            )
    return ShardCheckpoint(folder, config, mp, MappingProxyType(weights), draft, n_draft, tuple(files), n_tensors)


def _take(expected: Expected, rank: int, ranks: list[dict[str, Stored]], files: list[Path]) -> Weight:
    """Remove a rank's part of a weight, and its scale, from what is left of that rank's tensors."""
    tensors = ranks[rank]
    stored = tensors.pop(expected.name, None)
    if stored is None:
        elsewhere = next((number for number, others in enumerate(ranks) if expected.name in others), None)
        raise InventoryError(
            f"rank {rank}: tensor {expected.name} is missing",
            where=files[rank],
            got=None if elsewhere is None else f"a tensor of that name in {files[elsewhere].name}",
            hint="are shards of two conversions mixed, or does config.json belong to another model?",
        )
    scale = tensors.pop(scale_name(expected.name), None) if expected.name.endswith(".weight") else None
    return pair(expected, stored, scale)


def _check_same_storage(name: str, holders: range, parts: tuple[Weight, ...]) -> None:
    first = parts[0]
    for rank, part in zip(holders, parts, strict=True):
        if (part.stored.dtype, part.block) != (first.stored.dtype, first.block) or (
            part.scale is not None and first.scale is not None and part.scale.dtype != first.scale.dtype
        ):
            raise InventoryError(
                f"tensor {name}: stored differently on rank {rank} than on rank {holders[0]}",
                where=part.stored.file,
                expected=first.stored.dtype,
                got=part.stored.dtype,
                hint="are shards of two conversions mixed?",
            )
