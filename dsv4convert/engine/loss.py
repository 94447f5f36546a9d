"""Refusing a run in which any value changed, or is not finite: what ``--strict`` has looked at before names are given.

The errors name the worst tensor, while the output still has its temporary name.
"""

from __future__ import annotations

from ..errors import InventoryError, LossyError, and_more, counted
from .run import RunReport


def refuse_not_finite(report: RunReport) -> None:
    """Refuse a run in which any value is NaN or infinite.

    Raises:
        InventoryError: one is.
    """
    found = [tensor for tensor in report.tensors if tensor.tally.nan]
    if not found:
        return
    worst = max(found, key=lambda tensor: tensor.tally.nan)
    raise InventoryError(
        f"tensor {worst.name}: {counted(worst.tally.nan, 'NaN or infinite value')}{and_more(found, 'tensor')}",
        where=worst.file,
        hint="without --strict they are counted and listed",
    )


def refuse_loss(report: RunReport) -> None:
    """Refuse a run in which any value changed; a NaN that stays a NaN is counted and does not count as a change.

    Raises:
        LossyError: one did.
    """
    lossy = [tensor for tensor in report.tensors if not tensor.tally.lossless]
    if not lossy:
        return
    worst = max(lossy, key=lambda t: t.tally.changed + t.tally.overflow + t.tally.underflow)
    counts = worst.tally
    kinds = {"overflow": counts.overflow, "underflow": counts.underflow, "changed": counts.changed}
    raise LossyError(
        f"tensor {worst.name}: not exact{and_more(lossy, 'tensor')}",
        where=worst.file,
        expected="every element as in the source",
        got=", ".join(f"{count} {kind}" for kind, count in kinds.items() if count),
        hint="without --strict such elements are counted and listed",
    )
