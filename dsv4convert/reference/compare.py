"""Compares two runs of the model, sub-block by sub-block, and their logits at the end."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from ..errors import VerifyError
from .weights.protocol import Array

LOGITS = "logits"

LAYER_NAME = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Difference:
    """How much an activation of run B differs from run A's.

    For values: errors over all elements, relative ones as a share of A's root mean square, and the
    relative RMSE of the median position (positions that took another expert do not move it). For choices
    (experts, compressed entries): the share of A's that B chose as well.
    """

    name: str
    rmse: float | None = None
    relative_rmse: float | None = None
    median_relative_rmse: float | None = None
    cosine: float | None = None
    largest: float | None = None
    agreement: float | None = None

    @property
    def layer(self) -> int | None:
        """Return the trunk layer, or None."""
        found = LAYER_NAME.match(self.name)
        return int(found[1]) if found is not None else None

    def error(self, by_median: bool) -> float:
        """Return the relative RMSE that a tolerance applies to; 0 for choices."""
        value = self.median_relative_rmse if by_median else self.relative_rmse
        return 0.0 if value is None else value


@dataclass(frozen=True)
class LogitsDifference:
    """What the difference means for the next token: KL(A‖B) is in nats."""

    positions: int
    argmax_agreement: float
    kl_mean: float
    kl_max: float
    cosine_median: float
    cosine_min: float


@dataclass(frozen=True)
class Comparison:
    """All differences in the order of computation, and those of the logits."""

    differences: tuple[Difference, ...]
    logits: LogitsDifference

    def worst(self, by_median: bool) -> Difference:
        """Return the sub-block with the largest relative error."""
        return max(self.differences, key=lambda d: d.error(by_median))

    def first_beyond(self, tolerance: float, by_median: bool) -> Difference | None:
        """Return the first sub-block whose relative error is not within ``tolerance``; NaN is not."""
        return next((d for d in self.differences if not d.error(by_median) <= tolerance), None)

    def as_json(self) -> dict[str, Any]:
        """Return the numbers as JSON types: what does not apply is left out, infinity and NaN are null."""
        blocks = [{k: _json(v) for k, v in asdict(d).items() if v is not None} for d in self.differences]
        return {"blocks": blocks, "logits": {k: _json(v) for k, v in asdict(self.logits).items()}}


def compare(a: Iterable[tuple[str, Array]], b: Iterable[tuple[str, Array]]) -> Comparison:
    """Compare two runs' activations in step, holding one layer of each.

    Raises:
        VerifyError: the runs do not consist of the same sub-blocks of the same shapes.
    """
    differences = []
    logits: LogitsDifference | None = None
    for x, y in _in_step(a, b):
        differences.append(difference(x[0], x[1], y[1]))
        if x[0] == LOGITS:
            logits = logits_difference(x[1], y[1])
    if logits is None:
        raise VerifyError("the runs hold no logits")
    return Comparison(tuple(differences), logits)


def _in_step(
    a: Iterable[tuple[str, Array]], b: Iterable[tuple[str, Array]]
) -> Iterator[tuple[tuple[str, Array], tuple[str, Array]]]:
    for x, y in zip_longest(a, b):
        if x is None or y is None or x[0] != y[0]:
            raise VerifyError(
                "the runs do not consist of the same sub-blocks",
                expected="the end of the run" if x is None else x[0],
                got="the end of the run" if y is None else y[0],
            )
        if x[1].shape != y[1].shape:
            raise VerifyError(
                f"{x[0]}: the runs have different shapes", expected=list(x[1].shape), got=list(y[1].shape)
            )
        yield x, y


def difference(name: str, a: Array, b: Array) -> Difference:
    """Return how ``b`` differs from ``a``, both of one shape [T, ...]."""
    if a.dtype == np.bool_:
        return Difference(name, agreement=_share(a & b, a))
    if a.dtype.kind in "iu":
        both = (a[:, :, None] == b[:, None, :]).any(axis=2)
        return Difference(name, agreement=_share(both, np.ones_like(both)))
    if not a.size:  # no compressed entries yet
        return Difference(name, 0.0, 0.0, 0.0, 1.0, 0.0)
    a, b = a.astype(np.float64), b.astype(np.float64)
    # Entries that a query cannot see yet score −∞ on both sides: equal, and nothing to measure.
    unseen = np.isneginf(a) & np.isneginf(b)
    a, b = np.where(unseen, 0, a), np.where(unseen, 0, b)
    error = b - a
    scale = _rms(a)
    return Difference(
        name,
        rmse=float(_rms(error)),
        relative_rmse=_relative(_rms(error), scale),
        median_relative_rmse=_relative(np.median(_rms(error.reshape(len(error), -1), axis=1)), scale),
        cosine=float(_cosine(a.reshape(1, -1), b.reshape(1, -1))[0]),
        largest=float(np.abs(error).max()),
    )


def logits_difference(a: Array, b: Array) -> LogitsDifference:
    """Return what the difference between logits [T, V] means for the next token."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):  # a NaN shows in the result, which is warning enough
        log_p, log_q = _log_softmax(a), _log_softmax(b)
        # A divergence is not negative; rounding may make it so.
        kl_T = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=1), 0)
    cosine_T = _cosine(a, b)
    return LogitsDifference(
        positions=len(a),
        argmax_agreement=float(np.mean(a.argmax(axis=1) == b.argmax(axis=1))),
        kl_mean=float(kl_T.mean()),
        kl_max=float(kl_T.max()),
        cosine_median=float(np.median(cosine_T)),
        cosine_min=float(cosine_T.min()),
    )


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _rms(x: Array, axis: int | None = None) -> Any:
    return np.sqrt(np.mean(np.square(x), axis=axis))


def _relative(error: Any, scale: Any) -> float:
    """Return error / scale; no error is none, whatever the scale."""
    if error == 0:
        return 0.0
    return float(error / scale) if 0 < scale < np.inf else float("inf")


def _cosine(a: Array, b: Array) -> Any:
    """Return the cosine of each row of ``a`` with that of ``b``; 1 between two zeros."""
    norms = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    same = (a == b).all(axis=1)
    with np.errstate(invalid="ignore"):
        return np.where(same, 1.0, (a * b).sum(axis=1) / np.where(norms > 0, norms, np.inf))


def _share(part: Array, whole: Array) -> float:
    total = int(whole.sum())
    return float(part.sum()) / total if total else 1.0


def _log_softmax(x: Array) -> Any:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))
