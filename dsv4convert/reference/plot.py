"""Draws the error by layer of a comparison."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..engine.conversion import check_result
from ..engine.names import Identity
from ..engine.outputs import write_file
from ..errors import UsageError, missing_package
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
        raise missing_package("--plot", "matplotlib", "plot") from None
    return Figure(figsize=(width, 4.5), layout="constrained")


def check_picture(path: Path, inputs: Iterable[Path], *, overwrite: bool) -> Identity | None:
    """Return what a picture replaces, having checked, before anything else is done, that it can be drawn and written.

    Raises:
        DeviceError: matplotlib is not installed.
        UsageError: the suffix of the name is no picture format, or the picture would replace one of the inputs.
        OutputExistsError: something is there and ``overwrite`` is false, or it can never be replaced.
    """
    replaced = check_result(path, inputs, overwrite=overwrite)
    if _format_of(path) not in new_figure(1).canvas.get_supported_filetypes():
        raise UsageError("--plot: not a picture format", where=path, hint="use a name that ends in .png")
    return replaced


def save_figure(figure: Any, path: Path, replaced: Identity | None) -> None:
    """Write a figure as the picture that the suffix of ``path`` says, in place of ``replaced``; see ``check_picture``.

    Raises:
        OutputExistsError, InputOutputError, SpaceError: the picture cannot be written.
    """
    picture = io.BytesIO()
    figure.savefig(picture, format=_format_of(path))
    write_file(path, (picture.getvalue(),), replaced)


def _format_of(path: Path) -> str:
    return path.suffix[1:].lower() or "png"


def plot_errors(comparison: Comparison, tolerance: float, path: Path, replaced: Identity | None = None) -> None:
    """Write a picture of the relative RMSE by layer, one line per sub-block, to ``path``, in place of ``replaced``.

    Raises:
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
