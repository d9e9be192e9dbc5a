"""Training curves: metrics.jsonl to small inline SVG charts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from nano4m_cli.report._numbers import figure, finite
from nano4m_cli.report._read import Inputs

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 42, 10, 18, 32  # margins around the plot
MOST = 400  # points of a line; more cannot be told apart at this size
NOT_CURVES = ("kind", "step", "time")
ASIDE = {
    "lr": ("Learning rate", "learning rate"),
    "grad_norm": ("Gradient norm", "norm before clipping"),
    "samples_per_s": ("Throughput", "samples per second"),
}

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """name: "train", "val" or "guess"; it is also the CSS class that gives the look."""

    name: str
    label: str
    points: Points

    @property
    def last(self) -> str:
        return figure(self.points[-1][1]) if self.points else "-"


@dataclass(frozen=True)
class Chart:
    name: str
    title: str
    lines: list[Line]
    svg: Markup


def charts(run: Inputs) -> tuple[list[Chart], list[Chart]]:
    """Return (the losses, the rest: learning rate, gradient norm, throughput)."""
    by_kind = {k: [r for r in run.records if r.get("kind") == k] for k in ("train", "val")}
    names = {n for records in by_kind.values() for r in records for n, v in r.items() if _is_curve(n, v)}
    order = ["loss", *(f"ce_{m}" for m in run.modalities)]
    ranked = sorted(names - set(ASIDE), key=lambda n: (order.index(n) if n in order else len(order), n))
    vocab = {str(s["modality"]): finite(s.get("vocab_size")) or 0 for s in run.specs}
    guess = {f"ce_{m}": math.log(v) for m, v in vocab.items() if v > 1}
    x_max = max((x for r in run.records if (x := finite(r.get("step"))) is not None), default=0.0) or 1.0

    def chart(name: str, title: str, unit: str) -> Chart:
        lines = [Line(k, k, p) for k in ("train", "val") if (p := _points(by_kind[k], name))]
        if name in guess:
            lines.append(Line("guess", "uniform", [(0.0, guess[name]), (x_max, guess[name])]))
        return Chart(name, title, lines, draw(title, unit, lines, x_max))

    main = []
    for name in ranked:
        if name == "loss":
            main.append(chart(name, "Total loss", "loss"))
        elif name.startswith("ce_"):
            main.append(chart(name, name.removeprefix("ce_"), "cross-entropy, nats per token"))
        else:
            main.append(chart(name, name, name))
    return main, [chart(n, *ASIDE[n]) for n in ASIDE if n in names]


def _is_curve(name: str, value: Any) -> bool:
    return name not in NOT_CURVES and isinstance(value, (int, float)) and not isinstance(value, bool)


def _points(records: list[dict[str, Any]], name: str) -> Points:
    """Return finite (step, value) by step; of records of one step the last counts."""
    found = {}
    for r in records:
        step, value = finite(r.get("step")), finite(r.get(name))
        if step is not None and value is not None:
            found[step] = value
    points = sorted(found.items())
    stride = -(-len(points) // MOST) or 1
    return points[::-1][::stride][::-1]  # thinned from the end, so that the last one stays


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Return round numbers from `low` to `high`, some `about` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def y_range(lines: list[Line]) -> tuple[float, float]:
    """Return the values to show. Zero is in where it is near; a guess line stretches the range by a third at most."""
    values = [v for line in lines if line.name != "guess" for _, v in line.points] or [0.0, 1.0]
    low, high = min(values), max(values)
    guesses = [v for line in lines if line.name == "guess" for _, v in line.points]
    high = max([high, *(v for v in guesses if v < high + (high - low) / 2)])
    if 0 <= low < 0.5 * high:
        low = 0.0
    pad = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    return (0.0 if low == 0 and high > 0 else low - pad), high + pad


def draw(title: str, unit: str, lines: list[Line], x_max: float) -> Markup:
    """Return an SVG of lines over steps; all text in it is escaped."""
    low, high = y_range(lines)

    def x(v: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * v / x_max

    def y(v: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (v - low) / (high - low)

    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    told = "; ".join(f"{li.label} from {figure(li.points[0][1])} to {li.last}" for li in lines if li.name != "guess")
    out = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)} over steps: {escape(told or "no finite values")}">'
    ]
    for v in ticks(low, high):
        out.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>')
        out.append(f'<text class="tick" x="{LEFT - 6}" y="{y(v) + 3.5:.1f}" text-anchor="end">{tick(v)}</text>')
    for v in ticks(0, x_max):
        anchor = "middle" if x(v) < right - 14 else "end"
        out.append(f'<line class="axis" x1="{x(v):.1f}" x2="{x(v):.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        out.append(f'<text class="tick" x="{x(v):.1f}" y="{bottom + 15}" text-anchor="{anchor}">{tick(v)}</text>')
    out.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    out.append(f'<text class="label" x="{(LEFT + right) / 2}" y="{HEIGHT - 3}" text-anchor="middle">step</text>')
    out.append(f'<text class="label" x="{LEFT}" y="10">{escape(unit)}</text>')
    for line in lines:
        inside = [(x(a), y(b)) for a, b in line.points if low <= b <= high]
        if not inside:
            continue
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in inside)
        out.append(f'<polyline class="line {line.name}" points="{path}"/>')
        if line.name == "val" and len(inside) <= 40 or len(inside) == 1:
            out += [f'<circle class="dot {line.name}" cx="{a:.1f}" cy="{b:.1f}" r="2.4"/>' for a, b in inside]
    out.append("</svg>")
    return Markup("".join(out))


def tick(v: float) -> str:
    if abs(v) >= 1e6:
        return f"{v / 1e6:g}M"
    if abs(v) >= 1e4:
        return f"{v / 1e3:g}k"
    if 0 < abs(v) < 0.01:
        return f"{v:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return f"{v:.3g}" if abs(v) < 1000 else f"{v:.0f}"
