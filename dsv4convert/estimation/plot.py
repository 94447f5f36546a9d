"""Draws an estimate: memory against context, and time against batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..engine.names import Identity
from ..reference.plot import new_figure, save_figure

GIGA = 1e9


class MemoryPoint(NamedTuple):
    """The bytes that one device needs for a context."""

    context: int
    weights: int
    caches: int
    activations: int


class TimePoint(NamedTuple):
    """What a token takes for a batch: seconds of a decoding step, and tokens a second of all sequences."""

    batch: int
    seconds: float
    tokens_per_second: float


def plot_estimate(
    memory: Sequence[MemoryPoint],
    times: Sequence[TimePoint],
    limit: int | None,
    title: str,
    path: Path,
    replaced: Identity | None,
) -> None:
    """Write a picture to ``path``: bytes of one device by context, and where there are ``times``, those by batch.

    It takes the place of ``replaced``; see ``check_picture``.

    Raises:
        OutputExistsError, InputOutputError, SpaceError: the picture cannot be written.
    """
    figure = new_figure(12 if times else 7)
    left, *rest = figure.subplots(1, 2 if times else 1, squeeze=False)[0]
    contexts = [point.context for point in memory]
    heights = [[getattr(point, name) / GIGA for point in memory] for name in ("weights", "caches", "activations")]
    left.stackplot(contexts, heights, labels=("weights", "caches", "activations"), alpha=0.8)
    if limit is not None:
        left.axhline(limit / GIGA, color="black", linewidth=0.8, linestyle="--", label="memory")
    left.set_xscale("log", base=2)
    left.set_xlabel("context, tokens a sequence")
    left.set_ylabel("GB of one device")
    left.legend(loc="lower right")
    for axes in rest:
        batches = [point.batch for point in times]
        axes.plot(batches, [point.seconds * 1000 for point in times], marker="o", label="step, ms")
        axes.plot(batches, [point.tokens_per_second for point in times], marker="s", label="tokens/s, all sequences")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("batch, sequences")
        axes.set_title("decoding")
        axes.legend()
    figure.suptitle(title)
    save_figure(figure, path, replaced)
