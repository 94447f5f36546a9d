"""Draws the error by layer of a comparison."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ..engine.names import Identity
from ..engine.outputs import write_file
from ..errors import DeviceError, UsageError
from .compare import Comparison

# What is worth a line each: the input, what either sublayer adds, and the streams after the layer.
LINES = ("attn.q", "attn.output", "ffn.routed", "ffn.shared", "ffn.streams")


def new_figure(width: float) -> Any:
    """Return an empty figure of matplotlib, ``width`` inches wide.

    Raises:
        DeviceError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DeviceError("--plot needs the package matplotlib", hint="install dsv4convert[plot]") from None
    return Figure(figsize=(width, 4.5), layout="constrained")


def save_figure(figure: Any, path: Path, replaced: Identity | None) -> None:
    """Write a figure as the picture that the suffix of ``path`` says, in place of ``replaced``.

    Raises:
        UsageError: the suffix of the name is no picture format.
        OutputExistsError, InputOutputError, SpaceError: the picture cannot be written.
    """
    picture = io.BytesIO()
    try:
        figure.savefig(picture, format=path.suffix[1:] or "png")
    except ValueError as error:
        raise UsageError(f"not a picture format ({error})", where=path, hint="use a name that ends in .png") from None
    write_file(path, (picture.getvalue(),), replaced)


def plot_errors(comparison: Comparison, tolerance: float, path: Path, replaced: Identity | None = None) -> None:
    """Write a picture of the relative RMSE by layer, one line per sub-block, to ``path``, in place of ``replaced``.

    Raises:
        DeviceError: matplotlib is not installed.
        UsageError: the suffix of the name is no picture format.
        OutputExistsError, InputOutputError, SpaceError: the picture cannot be written.
    """
    figure = new_figure(8)
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    for block in LINES:
        points = [
            (d.layer, d.relative_rmse)
            for d in comparison.differences
            if d.layer is not None and d.relative_rmse and d.name.endswith(f".{block}")
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=block)
    axes.axhline(tolerance, color="black", linewidth=0.8, linestyle="--", label="tolerance")
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("relative RMSE")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    save_figure(figure, path, replaced)
