"""Plots as SVG: lines, bars and stacked areas."""

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


def areas(title: str, series: Mapping[str, Sequence[float]], at: Sequence[float], x: Axis, y: Axis) -> Markup:
    """Return series as areas on top of one another, in steps: value N holds from ``at[N]`` to ``at[N + 1]``."""
    marks: list[Markup] = []
    floor = [0.0] * (len(at) - 1)
    for number, (name, values) in enumerate(series.items()):
        top = [low + value for low, value in zip(floor, values, strict=True)]
        upper = [(at[n + end], height) for n, height in enumerate(top) for end in (0, 1)]
        lower = [(at[n + end], height) for n, height in enumerate(floor) for end in (0, 1)]
        path = " ".join(f"{_x(x, a):.1f},{_y(y, b):.1f}" for a, b in (*upper, *reversed(lower)))
        marks.append(element("polygon", element("title", name), points=path, class_=f"area c{number % COLOURS}"))
        floor = top
    return _plot(title, list(series), marks, x, y)


def bars(title: str, groups: Sequence[tuple[str, Sequence[float]]], series: Sequence[str], x: str, y: Axis) -> Markup:
    """Return upright bars: for each group of a name one bar for each of ``series``."""
    room = (WIDTH - LEFT - RIGHT) / max(1, len(groups))
    width = room * 0.8 / max(1, len(series))
    marks: list[Markup] = []
    # Names that would overlap are left out.
    step = max(1, math.ceil(max((len(name) for name, _ in groups), default=1) * 7 / room))
    for place, (name, values) in enumerate(groups):
        for number, value in enumerate(values):
            top = _y(y, value)
            told = name if len(series) == 1 else f"{name}, {series[number]}"
            marks.append(
                element(
                    "rect",
                    element("title", f"{told}: {value:,.6g}"),
                    x=LEFT + place * room + room * 0.1 + number * width,
                    y=top,
                    width=width,
                    height=max(0.0, _y(y, y.low) - top),
                    class_=f"c{number % COLOURS}",
                )
            )
        if place % step == 0:
            marks.append(_tick_x(LEFT + (place + 0.5) * room, name))
    return _plot(title, series if len(series) > 1 else [], marks, Axis(0, 1, x), y, ticks_x=False)


def level_bars(title: str, rows: Sequence[tuple[str, Sequence[float]]], series: Sequence[str], unit: str) -> Markup:
    """Return level bars, their names beside them and their values behind them: for each name one of each series."""
    thickness, gap, left, right = 14.0, 10.0, 150.0, 90.0
    most = max((value for _, values in rows for value in values), default=0.0) or 1.0
    marks: list[Markup] = []
    y = 4.0
    for name, values in rows:
        middle = y + thickness * len(values) / 2 + 4
        marks.append(element("text", name[:24], x=left - 6, y=middle, class_="tick end"))
        for number, value in enumerate(values):
            length = (WIDTH - left - right) * value / most
            told = f"{name}, {series[number]}: {value:,.4g} {unit}"
            marks.append(
                element(
                    "rect",
                    element("title", told),
                    x=left,
                    y=y,
                    width=max(0.5, length),
                    height=thickness - 2,
                    class_=f"c{number % COLOURS}",
                )
            )
            shown = f"{value:,.3g} {unit}"
            marks.append(element("text", shown, x=left + max(0.5, length) + 4, y=y + thickness - 4, class_="tick"))
            y += thickness
        y += gap
    return _framed(title, list(series) if len(series) > 1 else [], marks, y)


def _plot(
    title: str, names: Sequence[str], marks: Sequence[Markup], x: Axis, y: Axis, *, ticks_x: bool = True
) -> Markup:
    """Return a plot with axes, grid, labels and legend."""
    grid: list[Markup] = []
    for value in y.ticks():
        height = _y(y, value)
        grid.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=height, y2=height, class_="grid"))
        grid.append(element("text", f"{value:.3g}", x=LEFT - 6, y=height + 4, class_="tick end"))
    if ticks_x:
        grid += [_tick_x(_x(x, value), f"{value:g}") for value in x.ticks()]
    grid.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=_y(y, y.low), y2=_y(y, y.low), class_="axis"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    labels = [
        element("text", x.label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, class_="tick middle"),
        element("text", y.label, x=14, y=middle, transform=f"rotate(-90 14 {middle:.0f})", class_="tick middle"),
    ]
    return _framed(title, names, [*grid, *marks, *labels], HEIGHT)


def _framed(title: str, names: Sequence[str], marks: Sequence[Markup], height: float) -> Markup:
    legend = [
        element("li", element("span", class_=f"key c{number % COLOURS}", aria_hidden="true"), name)
        for number, name in enumerate(names)
    ]
    picture = element(
        "svg", *marks, class_="plot", viewBox=f"0 0 {WIDTH:.0f} {height:.0f}", role="img", aria_label=title
    )
    listed = element("ul", *legend, class_="legend") if legend else None
    return element("section", element("h2", title), joined([listed]), element("div", picture, **scrolled(title)))


def _tick_x(x: float, text: str) -> Markup:
    return element("text", text, x=x, y=HEIGHT - BOTTOM + 16, class_="tick middle")


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.part(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - max(0.0, axis.part(value)) * (HEIGHT - TOP - BOTTOM)
