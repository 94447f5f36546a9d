"""Markup, the layout of the map, and axes, without a browser."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dsv4convert.errors import escape_control
from dsv4convert.html_report.charts import Axis, log_axis
from dsv4convert.html_report.markup import element
from dsv4convert.html_report.treemap import Rectangle, squarified


class Reader(HTMLParser):
    """What a parser of HTML finds: tags, attributes and text."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = st.one_of(
    st.text(),
    st.text(alphabet="<>&\"'/= !-\0\n\x1b\u202e`scriptx"),
    st.sampled_from(["</title><script>x()</script>", '" onload="x()', "<!--", "]]>", "&lt;b&gt;", "\ud800"]),
)


@given(HOSTILE, HOSTILE)
def test_no_text_becomes_markup(text: str, value: str) -> None:
    found = Reader(element("p", text, title=value))
    assert found.tags == ["p"]
    assert found.attributes == [("title", escape_control(value))]
    assert found.text == escape_control(text)


@example(
    [
        *(895687429616.2866, 556886814350.6296, 556886814346.8159, 556886814346.6952, 556886805048.9441),
        *(525983856533.0, 232431156537.0, 190651625868.0, 190651625868.0, 135093568588.71227, 1721539229.0),
        *(1.3236541748046875, 0.3333333333333333, 0.001),
    ],
    1.0,
    1.0,
)
@given(st.lists(st.floats(1e-3, 1e12), min_size=1, max_size=60), st.floats(1, 1e3), st.floats(1, 1e3))
def test_areas_of_the_map_are_the_bytes_and_fill_it(sizes: list[float], width: float, height: float) -> None:
    sizes.sort(reverse=True)
    placed = squarified(sizes, Rectangle(0, 0, width, height))
    assert len(placed) == len(sizes)
    for size, place in zip(sizes, placed, strict=True):
        expected = size / sum(sizes) * width * height
        assert place.width * place.height == pytest.approx(expected, rel=1e-6, abs=1e-9 * width * height)
        assert place.x >= -1e-9
        assert place.y >= -1e-9
        assert place.x + place.width <= width * (1 + 1e-6)
        assert place.y + place.height <= height * (1 + 1e-6)


def test_rectangles_of_the_map_do_not_overlap() -> None:
    placed = squarified([50.0, 20, 20, 7, 2, 1], Rectangle(0, 0, 30, 20))
    for number, a in enumerate(placed):
        for b in placed[number + 1 :]:
            across = min(a.x + a.width, b.x + b.width) - max(a.x, b.x)
            down = min(a.y + a.height, b.y + b.height) - max(a.y, b.y)
            assert min(across, down) < 1e-9


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e12))
def test_marks_of_an_axis_lie_on_it(low: float, length: float) -> None:
    axis = Axis(low, low + length, "")
    marks = axis.ticks()
    assert len(marks) <= 7
    assert all(-1e-6 <= axis.part(mark) <= 1 + 1e-6 for mark in marks)


@given(st.lists(st.floats(1e-30, 1e30), min_size=1))
def test_an_axis_of_powers_of_ten_holds_all_values(values: list[float]) -> None:
    axis = log_axis(values, "")
    assert all(-1e-9 <= axis.part(value) <= 1 + 1e-9 for value in values)
    assert axis.ticks()
