"""Refusing a run in which any value changed, or is not finite."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import InventoryError, LossyError
from .run import RunReport


def refuse_not_finite(option: str) -> Callable[[RunReport], None]:
    """Return a ``before_finish`` hook that refuses a run in which any value is NaN or infinite.

    The hook raises InventoryError, which names the worst tensor, while the output still has its temporary name.
    """

    def check(report: RunReport) -> None:
        found = [tensor for tensor in report.tensors if tensor.tally.nan]
        if not found:
            return
        worst = max(found, key=lambda tensor: tensor.tally.nan)
        more = f" (and {len(found) - 1} more tensors)" if found[1:] else ""
        raise InventoryError(
            f"tensor {worst.name}: {worst.tally.nan} values are NaN or infinite{more}",
            where=worst.file,
            hint=f"without {option} they are counted and listed",
        )

    return check


def refuse_loss(option: str) -> Callable[[RunReport], None]:
    """Return a ``before_finish`` hook that refuses a run in which any value changed.

    A NaN that stays a NaN is counted and does not count as a change. The hook raises LossyError, which
    names the worst tensor, while the output still has its temporary name.
    """

    def check(report: RunReport) -> None:
        lossy = [tensor for tensor in report.tensors if not tensor.tally.lossless]
        if not lossy:
            return
        worst = max(lossy, key=lambda t: t.tally.changed + t.tally.overflow + t.tally.underflow)
        counts = worst.tally
        kinds = {"overflow": counts.overflow, "underflow": counts.underflow, "changed": counts.changed}
        more = f" (and {len(lossy) - 1} more tensors)" if lossy[1:] else ""
        raise LossyError(
            f"tensor {worst.name}: not exact{more}",
            where=worst.file,
            expected="every element as in the source",
            got=", ".join(f"{count} {kind}" for kind, count in kinds.items() if count),
            hint=f"without {option} such elements are counted and listed",
        )

    return check
