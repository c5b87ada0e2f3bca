"""A bar chart as SVG, for `millicent plan --plot`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_ROW_PX, _LABEL_PX, _BAR_PX, _VALUE_PX, _TOP_PX = 22, 300, 460, 200, 64


@dataclass(frozen=True, slots=True)
class Bar:
    """From 0 to `low`, and on to `high`, paler, where there is a range. marked: in the strong color. told: behind the bar."""

    label: str
    low: float
    high: float
    told: str
    marked: bool = False


def draw_bars(title: str, subtitle: str, bars: Sequence[Bar]) -> str:
    """One SVG picture, the bars from top to bottom."""
    assert bars
    longest = max(bar.high for bar in bars) or 1.0
    width, height = _LABEL_PX + _BAR_PX + _VALUE_PX, _TOP_PX + _ROW_PX * len(bars) + 16
    rows = "\n".join(_draw_row(bar, _TOP_PX + _ROW_PX * number, _BAR_PX / longest) for number, bar in enumerate(bars))
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="13">
<rect width="{width}" height="{height}" fill="white"/>
<text x="16" y="26" font-size="17" font-weight="bold">{escape(title)}</text>
<text x="16" y="46" fill="#555">{escape(subtitle)}</text>
{rows}
</svg>
"""


def _draw_row(bar: Bar, top: int, px_per_unit: float) -> str:
    color = "#1f5fa8" if bar.marked else "#7aa6d6"
    low, high = (max(1.0, value * px_per_unit) for value in (bar.low, bar.high))
    return f"""<text x="{_LABEL_PX - 10}" y="{top + 13}" text-anchor="end">{escape(bar.label)}</text>
<rect x="{_LABEL_PX}" y="{top + 2}" width="{high:.1f}" height="14" fill="{color}" opacity="0.35"/>
<rect x="{_LABEL_PX}" y="{top + 2}" width="{low:.1f}" height="14" fill="{color}"/>
<text x="{_LABEL_PX + high + 8:.1f}" y="{top + 13}" fill="#333">{escape(bar.told)}</text>"""
