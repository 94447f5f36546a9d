"""Which form of a model fits a machine: shards for so many devices, or a GGUF of some recipe on one of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoint.folder import Checkpoint
from ..checkpoint.weights import Encoding, Weight
from ..errors import UsageError
from ..model.cache_bytes import BF16_BYTES
from ..model.parallel import DIVIDED_KEYS, OUTPUT_GROUPS, expert_rank, run_length
from ..model.tensors import BF16_IN_SHARDS, OUTPUT_PROJECTIONS, Split
from .hardware import Hardware
from .memory import Load, Need, default_ubatch, need
from .weights import GgufSize

# Numbers of devices that are tried; larger ones are asked for with --mp.
MAX_DEVICES = 16
UNIFIED = ("unified", "cpu")


@dataclass(frozen=True)
class Option:
    """A form of the model, and what each device needs for it: ``mp`` devices, or a GGUF of ``recipe`` on one.

    ``o_proj_tp`` is how many of them share the output projections.
    """

    mp: int
    o_proj_tp: int
    is_gguf: bool
    recipe: str | None
    need: Need

    @property
    def name(self) -> str:
        """Return how the form is asked for."""
        if self.is_gguf:
            return "--gguf" if self.recipe is None else f"--recipe {self.recipe}"
        shared = f" --o-proj-tp {self.o_proj_tp}" if self.o_proj_tp != self.mp else ""
        return f"--mp {self.mp}{shared}"

    def as_json(self) -> dict[str, Any]:
        """Return the form as plain JSON values."""
        said = {key: getattr(self, key) for key in ("name", "mp", "o_proj_tp", "is_gguf", "recipe")}
        return {**said, "device": self.need.as_json()}


def options(
    checkpoint: Checkpoint, sizes: tuple[GgufSize, ...], memory: int, context: int, batch: int, n_draft: int
) -> tuple[Option, ...]:
    """Return the forms of a model with what each needs of a device's ``memory``: ranks, then GGUFs of a device.

    GGUFs that are larger than the default one are left out: nothing is gained by them.
    """
    config = checkpoint.config
    found: list[Option] = []
    for mp, o_proj_tp, weights in _divisions(checkpoint):
        load = Load(batch, "published", mp, n_draft, default_ubatch("published"))
        found.append(Option(mp, o_proj_tp, False, None, need(config, weights, context, load, memory)))
    default = next(size for size in sizes if size.recipe is None)
    load = Load(batch, "f16", 1, 0, default_ubatch("f16"))
    for size in sizes:
        if size.nbytes <= default.nbytes:
            found.append(Option(1, 1, True, size.recipe, need(config, size.nbytes, context, load, memory)))
    return tuple(found)


def choice(found: tuple[Option, ...], hardware: Hardware) -> Option | None:
    """Return the form to take: the fewest devices, or on a machine of one the largest GGUF; None if nothing fits."""
    fitting = [option for option in found if option.need.fits]
    ranks = [option for option in fitting if not option.is_gguf]
    ggufs = [option for option in fitting if option.is_gguf]
    best_ranks = min(ranks, key=lambda option: option.mp, default=None)
    best_gguf = max(ggufs, key=lambda option: option.need.weights, default=None)
    if hardware.kind in UNIFIED:
        return best_gguf or best_ranks
    return best_ranks or best_gguf


def without_draft(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint without its draft layers."""
    return replace(checkpoint, weights={n: weight for n, weight in checkpoint.weights.items() if not weight.is_draft})


def _divisions(checkpoint: Checkpoint) -> Iterator[tuple[int, int, int]]:
    """Yield the powers of two that divide the model, who shares the output projections, and a rank's bytes."""
    config = checkpoint.config
    mp = 1
    while mp <= MAX_DEVICES:
        output = min(mp, config.o_groups)
        divided = [(field, output if key == OUTPUT_GROUPS else mp) for field, key in DIVIDED_KEYS]
        if all(getattr(config, field) % ranks == 0 for field, ranks in divided) and config.o_groups % output == 0:
            try:
                yield mp, output, rank_bytes(checkpoint, mp, output)
            except UsageError:  # blocks that share a scale would be cut
                return
        mp *= 2


def rank_bytes(checkpoint: Checkpoint, mp: int, o_proj_tp: int) -> int:
    """Return the bytes of the tensors of rank 0, the same that ``shard`` writes, without planning any file.

    Raises:
        UsageError: a dimension that the ranks cannot share.
    """
    config = checkpoint.config
    total = 0
    for weight in checkpoint.weights.values():
        ranks = o_proj_tp if weight.row.name in OUTPUT_PROJECTIONS else mp
        if weight.expert is not None and weight.row.split is Split.EXPERT:
            total += weight.nbytes if expert_rank(weight.expert, config.n_experts(weight.is_draft), ranks) == 0 else 0
        elif weight.row.split is Split.RUNS:
            rows = weight.shape[0]
            total += run_length(rows, ranks) * (weight.nbytes // rows)
        else:
            total += _split_bytes(weight, ranks)
    return total


def _split_bytes(weight: Weight, ranks: int) -> int:
    nbytes = weight.nbytes
    if weight.row.name in BF16_IN_SHARDS and weight.encoding is Encoding.FP8:
        nbytes = math.prod(weight.shape) * BF16_BYTES
    if weight.row.split is Split.COPY:
        return nbytes
    axis = 0 if weight.row.split is Split.ROWS else 1
    block = 1 if weight.block is None or weight.row.name in BF16_IN_SHARDS else weight.block[axis]
    if ranks > 1 and weight.shape[axis] % (block * ranks):
        raise UsageError(f"tensor {weight.name} cannot be divided among {ranks} ranks")
    return nbytes // ranks
