"""Refusing a run in which any value changed."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import LossyError
from .run import RunReport


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
