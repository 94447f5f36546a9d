"""Plots as SVG: lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .markup import Markup, element, joined
from .treemap import scrolled

WIDTH, HEIGHT = 640.0, 320.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 12.0, 10.0, 40.0
# The colours of the style sheet, c0 and so on, in their order.
COLOURS = 8
TICKS = 5


class Axis(NamedTuple):
    """The values at an axis's ends and its label; ``is_log`` for one of powers of ten."""

    low: float
    high: float
    label: str
    is_log: bool = False

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
        wide = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        return [number * wide for number in range(math.ceil(low / wide), math.floor(high / wide) + 1)]

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


def _plot(title: str, names: Sequence[str], marks: Sequence[Markup], x: Axis, y: Axis) -> Markup:
    """Return a plot with axes, grid, labels and legend."""
    grid: list[Markup] = []
    for value in y.ticks():
        height = _y(y, value)
        grid.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=height, y2=height, class_="grid"))
        grid.append(element("text", f"{value:.3g}", x=LEFT - 6, y=height + 4, class_="tick end"))
    grid += [
        element("text", f"{value:g}", x=_x(x, value), y=HEIGHT - BOTTOM + 16, class_="tick middle")
        for value in x.ticks()
    ]
    grid.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=_y(y, y.low), y2=_y(y, y.low), class_="axis"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    labels = [
        element("text", x.label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, class_="tick middle"),
        element("text", y.label, x=14, y=middle, transform=f"rotate(-90 14 {middle:.0f})", class_="tick middle"),
    ]
    legend = [
        element("li", element("span", class_=f"key c{number % COLOURS}", aria_hidden="true"), name)
        for number, name in enumerate(names)
    ]
    picture = element(
        "svg",
        *(*grid, *marks, *labels),
        class_="plot",
        viewBox=f"0 0 {WIDTH:.0f} {HEIGHT:.0f}",
        role="img",
        aria_label=title,
    )
    listed = element("ul", *legend, class_="legend") if legend else None
    return element("section", element("h2", title), joined([listed]), element("div", picture, **scrolled(title)))


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.part(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - max(0.0, axis.part(value)) * (HEIGHT - TOP - BOTTOM)
