"""Plots as SVG: lines, bars of parts, and grids of colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from .markup import Markup, element, fitting, scrolled

WIDTH, HEIGHT = 640.0, 320.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 12.0, 10.0, 40.0
# The colours of the style sheet, c0 and so on, in their order.
COLOURS = 8
TICKS = 5
# The height of a bar with the space around it, and of a row of a grid.
BAR_HEIGHT, ROW_HEIGHT = 22.0, 15.0
# The names at the left of bars and rows, and the figures at the right of bars.
NAME_WIDTH, FIGURE_WIDTH = 170.0, 80.0


class Axis(NamedTuple):
    """The values at an axis's ends and its label; ``is_log`` for powers of ten, ``is_whole`` for whole numbers."""

    low: float
    high: float
    label: str
    is_log: bool = False
    is_whole: bool = False

    def part(self, value: float) -> float:
        """Return where a value lies: 0 at the low end, 1 at the high one."""
        low, high = self._ends()
        place = math.log10(value) if self.is_log else value
        return (place - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[float]:
        """Return the values to mark."""
        low, high = self._ends()
        if self.is_log:
            step = max(1, math.ceil((high - low) / TICKS))
            return [10.0**power for power in range(math.ceil(low), math.floor(high) + 1, step)]
        if high <= low:
            return [low]
        rough = (high - low) / TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        spacing = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        if self.is_whole:
            spacing = max(1.0, spacing)
        return [number * spacing for number in range(math.ceil(low / spacing), math.floor(high / spacing) + 1)]

    def _ends(self) -> tuple[float, float]:
        return (math.log10(self.low), math.log10(self.high)) if self.is_log else (self.low, self.high)


def log_axis(values: Sequence[float], label: str) -> Axis:
    """Return an axis from one power of ten to another, around all values, which are above 0."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return Axis(10.0**low, 10.0 ** max(high, low + 1), label, True)


def lines(title: str, series: Mapping[str, Sequence[tuple[float, float]]], x: Axis, y: Axis) -> Markup:
    """Return series of points, each a line of its own with a point at every value."""
    marks: list[Markup] = []
    for number, (name, points) in enumerate(series.items()):
        colour = f"c{number % COLOURS}"
        placed = [(_x(x, a), _y(y, b)) for a, b in points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in placed)
        marks.append(element("polyline", points=path, class_=f"line {colour}"))
        marks += [
            element(
                "circle", element("title", f"{name}, {x.label} {p[0]:g}: {p[1]:.3g}"), cx=a, cy=b, r=3, class_=colour
            )
            for (a, b), p in zip(placed, points, strict=True)
        ]
    return _plot(title, list(series), marks, x, y)


def bars(
    title: str,
    rows: Sequence[tuple[str, Sequence[float]]],
    names: Sequence[str],
    written: Callable[[float], str],
    limit: float | None = None,
) -> Markup | None:
    """Return a bar for each row, of parts that ``names`` tell, with their sum as ``written``; None without any.

    A line across the bars stands at ``limit``.
    """
    most = max([sum(parts) for _, parts in rows] + ([] if limit is None else [limit]), default=0)
    if not rows or not most:
        return None
    scale = (WIDTH - NAME_WIDTH - FIGURE_WIDTH) / most
    marks: list[Markup] = []
    for number, (label, parts) in enumerate(rows):
        top, left = number * BAR_HEIGHT, NAME_WIDTH
        marks.append(element("text", fitting(label, NAME_WIDTH - 6), x=NAME_WIDTH - 6, y=top + 15, class_="tick end"))
        for place, (name, value) in enumerate(zip(names, parts, strict=True)):
            told = element("title", f"{label}, {name}: {written(value)}")
            marks.append(
                element(
                    "rect",
                    told,
                    x=left,
                    y=top + 3,
                    width=value * scale,
                    height=BAR_HEIGHT - 6,
                    class_=f"c{place % COLOURS}",
                )
            )
            left += value * scale
        marks.append(element("text", written(sum(parts)), x=left + 5, y=top + 15, class_="tick"))
    height = len(rows) * BAR_HEIGHT
    if limit is not None:
        at = NAME_WIDTH + limit * scale
        marks.append(element("line", element("title", written(limit)), x1=at, x2=at, y1=0, y2=height, class_="axis"))
    return section(title, names if names[1:] else (), _picture(title, marks, height))


def grid(
    title: str,
    rows: Sequence[tuple[str, Mapping[int, tuple[str, str]]]],
    kinds: Sequence[str],
    classes: Sequence[str],
    across: str,
) -> Markup | None:
    """Return rows of cells by whole number, each of a kind, which gives its colour, and with a note; None without."""
    numbers = sorted({number for _, cells in rows for number in cells})
    if not numbers:
        return None
    colour = dict(zip(kinds, classes, strict=True))
    cell_width = (WIDTH - NAME_WIDTH) / (numbers[-1] - numbers[0] + 1)
    marks: list[Markup] = []
    for place, (name, cells) in enumerate(rows):
        top = place * ROW_HEIGHT
        marks.append(element("text", fitting(name, NAME_WIDTH - 6), x=NAME_WIDTH - 6, y=top + 12, class_="tick end"))
        for number, (kind, note) in sorted(cells.items()):
            told = element("title", f"{name}, {across} {number}: {note}")
            left = NAME_WIDTH + (number - numbers[0]) * cell_width
            marks.append(
                element(
                    "rect", told, x=left, y=top, width=cell_width * 0.97, height=ROW_HEIGHT - 0.5, class_=colour[kind]
                )
            )
    step = max(1, math.ceil(len(numbers) / 16))
    bottom = len(rows) * ROW_HEIGHT
    marks += [
        element("text", str(n), x=NAME_WIDTH + (n - numbers[0] + 0.5) * cell_width, y=bottom + 12, class_="tick middle")
        for n in numbers[::step]
    ]
    marks.append(element("text", across, x=NAME_WIDTH - 6, y=bottom + 12, class_="tick end"))
    present = {kind for _, cells in rows for kind, _ in cells.values()}
    legend = [(kind, colour[kind]) for kind in kinds if kind in present]
    return section(title, legend, _picture(title, marks, bottom + 16))


def _plot(title: str, names: Sequence[str], marks: Sequence[Markup], x: Axis, y: Axis) -> Markup:
    """Return a plot with axes, grid, labels and legend."""
    frame: list[Markup] = []
    for value in y.ticks():
        height = _y(y, value)
        frame.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=height, y2=height, class_="grid"))
        frame.append(element("text", f"{value:.3g}", x=LEFT - 6, y=height + 4, class_="tick end"))
    frame += [
        element("text", f"{value:g}", x=_x(x, value), y=HEIGHT - BOTTOM + 16, class_="tick middle")
        for value in x.ticks()
    ]
    frame.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=_y(y, y.low), y2=_y(y, y.low), class_="axis"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    labels = [
        element("text", x.label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, class_="tick middle"),
        element("text", y.label, x=14, y=middle, transform=f"rotate(-90 14 {middle:.0f})", class_="tick middle"),
    ]
    return section(title, names, _picture(title, [*frame, *marks, *labels], HEIGHT))


def _picture(title: str, marks: Sequence[Markup], height: float) -> Markup:
    box = f"0 0 {WIDTH:.0f} {height:.0f}"
    return element("svg", *marks, class_="plot", viewBox=box, role="img", aria_label=title)


def section(title: str, legend: Sequence[str | tuple[str, str]], picture: Markup) -> Markup:
    """Return a picture under its title, with the legend of names in the order of colours, or with theirs."""
    keys = []
    for number, entry in enumerate(legend):
        name, colour = (entry, f"c{number % COLOURS}") if isinstance(entry, str) else entry
        keys.append(element("li", element("span", class_=f"key {colour}", aria_hidden="true"), name))
    listed = element("ul", *keys, class_="legend") if keys else None
    return element("section", element("h2", title), listed, element("div", picture, **scrolled(title)))


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.part(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - max(0.0, axis.part(value)) * (HEIGHT - TOP - BOTTOM)
