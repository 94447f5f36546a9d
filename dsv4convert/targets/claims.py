"""Every source weight is converted or dropped with a reason, and none is forgotten."""

from __future__ import annotations

from collections.abc import Iterable

from ..checkpoint.folder import Checkpoint
from ..checkpoint.weights import Weight
from ..errors import InventoryError, some
from ..plan import Dropped


def dropped_unused(checkpoint: Checkpoint) -> list[Dropped]:
    """Return what no reader of a checkpoint knows as left out."""
    return [
        Dropped(some(unused.names, 1), unused.reason, len(unused.names), unused.nbytes) for unused in checkpoint.unused
    ]


class Claims:
    """Keeps the rule that every source weight is converted or dropped with a reason, and none forgotten."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._open = dict(checkpoint.weights)
        self._dropped = dropped_unused(checkpoint)

    def take(self, weight: Weight) -> Weight:
        """Claim a weight for an output tensor.

        Raises:
            InventoryError: it was claimed before.
        """
        if self._open.pop(weight.name, None) is None:
            raise InventoryError(f"tensor {weight.name}: claimed twice by the layout")
        return weight

    def drop(self, what: str, reason: str, weights: Iterable[Weight]) -> None:
        """Leave weights out of the output, with a reason that the summary shows."""
        dropped = [self.take(weight) for weight in weights]
        if dropped:
            count = sum(1 + (weight.scale is not None) for weight in dropped)
            self._dropped.append(Dropped(what, reason, count, sum(weight.nbytes for weight in dropped)))

    def close(self) -> tuple[Dropped, ...]:
        """Return what was dropped.

        Raises:
            InventoryError: a weight is neither converted nor dropped.
        """
        if self._open:
            name = next(iter(self._open))
            raise InventoryError(f"tensor {name}: no output tensor takes it", got=f"{len(self._open)} such weights")
        return tuple(self._dropped)
