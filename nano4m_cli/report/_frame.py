"""The axes of a small chart: values to places, grid, ticks, labels, marks; all text in it is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import escape

from nano4m_cli.report._curves import tick, ticks
from nano4m_cli.report._figures import interval

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 42, 10, 18, 32  # margins around the plot
COLOURS = 6  # that style.css has
SHAPES = ("circle", "square", "triangle", "diamond")  # of marks, so that lines are not told apart by colour alone


class Frame:
    """Axes around values.

    Args:
        x_names: ticks of the x axis, where they are not numbers of it. log: the x axis is logarithmic (all xs positive).
        size: width and height in pixels. bounds: (low, high) that both axes have, where they are shares of the same kind.
    """

    def __init__(self, xs: Sequence[float], ys: Sequence[Any], x_label: str, y_label: str, x_names: dict[float, str] | None = None,
                 log: bool = False, size: tuple[int, int] = (WIDTH, HEIGHT), bounds: tuple[float, float] | None = None):
        self.log, (self.width, self.height) = log, size
        self.xs = self._range([self._at(x) for x in xs])
        self.ys = self._range([y for y in ys if y is not None])
        if bounds is not None:
            self.xs = self.ys = bounds
        self.x_label, self.y_label, self.x_names = x_label, y_label, x_names

    def _at(self, x: float) -> float:
        return math.log10(x) if self.log else x

    @staticmethod
    def _range(values: Sequence[float]) -> tuple[float, float]:
        low, high = min(values, default=0.0), max(values, default=1.0)
        pad = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
        return low - pad, high + pad

    def x(self, v: float) -> float:
        return LEFT + (self.width - LEFT - RIGHT) * (self._at(v) - self.xs[0]) / (self.xs[1] - self.xs[0])

    def y(self, v: float) -> float:
        return self.height - BOTTOM - (self.height - TOP - BOTTOM) * (v - self.ys[0]) / (self.ys[1] - self.ys[0])

    def whisker(self, x: float, metric: Any, look: str) -> list[str]:
        """Return the metric's interval, if it has one, as a line at `x` pixels."""
        ends = interval(metric)
        if ends is None:
            return []
        return [f'<line class="whisker {look}" x1="{x:.1f}" x2="{x:.1f}" y1="{self.y(ends[0]):.1f}" y2="{self.y(ends[1]):.1f}"/>']

    def mark(self, x: float, value: float, look: str, radius: float, told: str, shape: str = "circle") -> list[str]:
        return [f'<path class="mark {look}" d="{mark_path(shape, x, self.y(value), radius)}"><title>{escape(told)}</title></path>']

    def begin(self, told: str) -> list[str]:
        bottom, right = self.height - BOTTOM, self.width - RIGHT
        out = [f'<svg class="chart" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(told)}">']
        for v in ticks(*self.ys):
            out.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{self.y(v):.1f}" y2="{self.y(v):.1f}"/>')
            out.append(f'<text class="tick" x="{LEFT - 6}" y="{self.y(v) + 3.5:.1f}" text-anchor="end">{tick(v)}</text>')
        for v, name in (self.x_names or self._x_ticks()).items():
            out.append(f'<line class="axis" x1="{self.x(v):.1f}" x2="{self.x(v):.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
            out.append(f'<text class="tick" x="{self.x(v):.1f}" y="{bottom + 15}" text-anchor="middle">{name}</text>')
        out.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        middle = (LEFT + right) / 2
        out.append(f'<text class="label" x="{middle}" y="{self.height - 3}" text-anchor="middle">{escape(self.x_label)}</text>')
        out.append(f'<text class="label" x="{LEFT}" y="10">{escape(self.y_label)}</text>')
        return out

    def _x_ticks(self) -> dict[float, str]:
        if not self.log:
            return {v: tick(v) for v in ticks(*self.xs)}
        low, high = self.xs
        powers = [10.0**p * m for p in range(math.floor(low), math.ceil(high) + 1) for m in (1, 3)]
        return {v: tick(v) for v in powers if low <= math.log10(v) <= high}


def mark_path(shape: str, x: float, y: float, r: float) -> str:
    """Return the SVG path of a mark of radius `r` around (x, y)."""
    if shape == "circle":
        return f"M{x - r:.1f} {y:.1f}a{r:.1f} {r:.1f} 0 1 0 {2 * r:.1f} 0a{r:.1f} {r:.1f} 0 1 0 {-2 * r:.1f} 0z"
    if shape == "square":
        return f"M{x - 0.9 * r:.1f} {y - 0.9 * r:.1f}h{1.8 * r:.1f}v{1.8 * r:.1f}h{-1.8 * r:.1f}z"
    if shape == "triangle":
        return f"M{x:.1f} {y - 1.2 * r:.1f}l{1.15 * r:.1f} {2 * r:.1f}h{-2.3 * r:.1f}z"
    return f"M{x:.1f} {y - 1.3 * r:.1f}l{1.3 * r:.1f} {1.3 * r:.1f}l{-1.3 * r:.1f} {1.3 * r:.1f}l{-1.3 * r:.1f} {-1.3 * r:.1f}z"
