"""Bars beside each other, for what a benchmark measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from tests.pictures.svg import FONT, Element, element, picture

WIDTH: Final = 860.0
_LABELS: Final = 270.0
_VALUES: Final = 90.0
_ROW: Final = 24.0
_TITLE: Final = 34.0
_MARGIN: Final = 16.0
_STYLE: Final = f"""
text {{ font: 13px {FONT}; fill: #24292f; }}
.title {{ font-weight: 600; }}
.note {{ font-size: 12px; fill: #57606a; }}
.ground {{ fill: #fff; }}
.ours {{ fill: #2f6fb3; }}
.others {{ fill: #9aa4b0; }}
@media (prefers-color-scheme: dark) {{
text {{ fill: #e6edf3; }}
.note {{ fill: #9aa4b0; }}
.ground {{ fill: #161b22; }}
.ours {{ fill: #5a9bdc; }}
.others {{ fill: #6b7580; }}
}}
"""


class Bar(NamedTuple):
    """One bar.

    Attributes:
        text: Its value, as it is written beside it.
        is_ours: vchan's, not what it is compared with.
    """

    label: str
    value: float
    text: str
    is_ours: bool


class Chart(NamedTuple):
    """Bars of one unit, from 0; the longest is as long as there is room."""

    title: str
    bars: Sequence[Bar]


def draw(charts: Sequence[Chart], title: str, note: str) -> str:
    """Charts below each other.

    Args:
        title: What it shows, for those who cannot see it.
        note: What stands below: where the numbers are from.
    """
    parts: list[Element] = []
    y = _MARGIN
    for chart in charts:
        y += 18.0
        parts.append(element("text", chart.title, x=_MARGIN, y=y, class_="title"))
        y += _TITLE - 24.0
        longest = max(bar.value for bar in chart.bars)
        assert longest > 0, chart.title
        room = WIDTH - 2 * _MARGIN - _LABELS - _VALUES
        for bar in chart.bars:
            length = max(1.0, room * bar.value / longest)
            kind = "ours" if bar.is_ours else "others"
            start = _MARGIN + _LABELS
            parts += [
                element("text", bar.label, x=start - 8, y=y + 15, text_anchor="end"),
                element("rect", x=start, y=y + 3, width=length, height=16.0, rx=2.0, class_=kind),
                element("text", bar.text, x=start + length + 6, y=y + 15),
            ]
            y += _ROW
        y += 10.0
    y += 8.0
    parts.append(element("text", note, x=_MARGIN, y=y, class_="note"))
    height = y + _MARGIN
    ground = element("rect", width=WIDTH, height=height, rx=6.0, class_="ground")
    return picture(WIDTH, height, title, _STYLE, ground, *parts)
