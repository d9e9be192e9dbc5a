"""The plots of a result as pages show them: heat maps, curves with their intervals, tables. All text is escaped.

No meaning rests on colour alone: cells of a heat map hold their numbers where these fit, lines differ in dash and mark too,
and every plot comes with its numbers as a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

from nano4m_cli.report._frame import COLOURS, SHAPES, Frame, mark_path
from nano4m_cli.report._numbers import figure, finite
from nano4m_cli.report._read import Plot

STEPS = 9  # colours of a scale (classes q0 to q8 of style.css), and of each half of one with a zero in it (n1..n8, p1..p8)
MOST = 60  # rows or columns that are still drawn
LISTED = 2600  # cells of the table below a plot, at most
NAMED = 22  # characters of a label that are shown
CONFUSED = 6  # pairs told in words
FEW = 0.25  # shares that are all below this have a scale of their own; the others share one, so that heat maps can be compared
LINES = COLOURS * 3  # that can be told apart


@dataclass(frozen=True)
class Legend:
    """What a line of a chart stands for: its name and a small picture of it."""

    name: str
    svg: Markup


@dataclass(frozen=True)
class Table:
    """Rows of (label, cells as text); numbers stand to the right."""

    corner: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]
    numeric: bool = True


@dataclass
class Drawn:
    """A plot as a page shows it. words: what it says, for those who do not see it, and what its picture leaves out."""

    name: str
    title: str
    kind: str
    svg: Markup | None = None
    wide: bool = False
    legend: list[Legend] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    table: Table | None = None


def drawn(plot: Plot) -> Drawn:
    """Return a plot ready to be shown; one that does not hold together is told so in words, not drawn."""
    out = Drawn(plot.name, plot.title or plot.name, plot.kind)
    sizes = [len(r) for r in plot.values]
    if sizes != [len(plot.columns)] * len(plot.rows):
        out.words.append("It cannot be drawn: its values do not fit its rows and columns.")
        return out
    if not plot.rows or not plot.columns:
        out.words.append("It is empty.")
        return out
    if plot.kind == "table":
        out.table = _table(plot)
        return out
    values = [[finite(v) for v in row] for row in plot.values]
    if all(v is None for row in values for v in row):
        out.words.append("Nothing was measured.")
        return out
    {"matrix": _matrix, "curve": _curve}[plot.kind](plot, values, out)
    if len(plot.rows) * len(plot.columns) <= LISTED:
        out.table = _table(plot)
    elif out.svg is None:
        size = f"{len(plot.rows)} x {len(plot.columns)}"
        out.words.append(f"Its table of {size} numbers is left out here; the result's file has it.")
    return out


def _table(plot: Plot) -> Table:
    numeric = not any(isinstance(v, str) for row in plot.values for v in row)
    cell = lambda v: v if isinstance(v, str) else figure(v)  # noqa: E731
    low, high = plot.low, plot.high

    def text(r: int, c: int) -> str:
        out = cell(plot.values[r][c])
        ends = [finite(part[r][c]) if part and r < len(part) and c < len(part[r]) else None for part in (low, high)]
        return out if None in ends else f"{out} ({figure(ends[0])} to {figure(ends[1])})"

    rows = [(name, [text(r, c) for c in range(len(plot.columns))]) for r, name in enumerate(plot.rows)]
    corner = " / ".join(p for p in ((plot.y, plot.x) if plot.kind == "matrix" else ("", plot.x)) if p)
    columns = [c if isinstance(c, str) else (f"{c:g}" if finite(c) is not None else "-") for c in plot.columns]
    return Table(corner, columns, rows, numeric)


# -- heat maps --------------------------------------------------------------------------------------------------------


def scale(values: Sequence[float]) -> tuple[float, float, bool]:
    """Return (low, high, whether zero divides it): shares run from 0 to 1 or to their largest, signed values to both sides."""
    low, high = min(values), max(values)
    if low < 0 < high and min(-low, high) > 0.05 * max(-low, high):
        most = max(-low, high)
        return -most, most, True
    if low >= 0:
        return 0.0, (1.0 if FEW < high <= 1 else high or 1.0), False
    return (low, high, False) if high > low else (low, low + (abs(low) or 1.0), False)


def look(value: float, low: float, high: float, divided: bool) -> str:
    """Return the class of a value's colour."""
    at = (value - low) / (high - low)
    if not divided:
        return f"q{min(STEPS - 1, max(0, int(at * STEPS)))}"
    part = min(STEPS - 1, int(abs(2 * at - 1) * STEPS))
    return "q0" if part == 0 else f"{'p' if at > 0.5 else 'n'}{part}"


def short(value: float, shares: bool, whole: bool) -> str:
    """Return a number as it stands in a cell."""
    if whole:
        return f"{value:.0f}" if abs(value) < 1e4 else f"{value:.2g}".replace("e+0", "e")
    if shares:
        text = f"{value:.2f}"
        return {"0.00": "0" if value == 0 else ".00", "1.00": "1" if value == 1 else "1.0"}.get(text, text.removeprefix("0"))
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.3g}"


def _matrix(plot: Plot, values: list[list[float | None]], out: Drawn) -> None:
    known = [v for row in values for v in row if v is not None]
    low, high, divided = scale(known)
    top = max((v, -r, -c) for r, row in enumerate(values) for c, v in enumerate(row) if v is not None)
    columns = [str(c) if isinstance(c, str) else f"{c:g}" for c in plot.columns]
    peak = f"{plot.rows[-top[1]]} / {columns[-top[2]]}"
    out.words += _confusions(plot.rows, columns, values)
    size = f"{len(plot.rows)} rows, {len(columns)} columns"
    told = f"Heat map of {out.title}: {size}, {figure(min(known))} to {figure(max(known))}, highest at {peak}"
    if max(len(plot.rows), len(columns)) > MOST:
        out.words.insert(0, f"{told}. It is too large to draw.")
        return
    shares = min(known) >= 0 and max(known) <= 1
    whole = all(v == round(v) for v in known) and not (shares and len(set(known)) > 2)
    texts = [[None if v is None else short(v, shares, whole) for v in row] for row in values]
    need = 6.6 * max((len(t) for row in texts for t in row if t), default=1) + 8
    few = len(columns) <= 14 and len(plot.rows) <= 24
    cell = (min(max(need, 40.0), 64.0), 30.0) if few else (26.0, 20.0) if len(columns) <= 26 else (14.0, 14.0)
    fits = need <= cell[0] + (0 if few else 4)
    size = 12 if few else 10
    widest = max(len(_named(r)) for r in plot.rows)
    left = 10 + 6.3 * widest + (18 if plot.y else 0)
    level = all(6.3 * len(_named(c)) <= cell[0] - 2 for c in columns)
    turn = 90 if cell[0] < 20 else 50  # so that labels this near to each other do not touch
    head = 20 if level else 12 + 6.3 * max(len(_named(c)) for c in columns) * (1.0 if turn == 90 else 0.8)
    right = 8 if level or turn == 90 else 10 + 4.1 * len(_named(columns[-1]))
    above = head + (18 if plot.x else 0)
    wide, tall = cell[0] * len(columns), cell[1] * len(plot.rows)
    legend = max(180.0, 20.0 * STEPS)
    width, height = left + max(wide + right, legend + 24), above + tall + 46
    parts = [
        f'<svg class="heat" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" role="img" '
        f'aria-label="{escape(told)}">'
    ]
    if plot.x:
        parts.append(f'<text class="axis-name" x="{left + wide / 2:.1f}" y="12" text-anchor="middle">{escape(plot.x)}</text>')
    if plot.y:
        y = above + tall / 2
        parts.append(f'<text class="axis-name" x="11" y="{y:.1f}" text-anchor="middle" transform="rotate(-90 11 {y:.1f})">'
                     f"{escape(plot.y)}</text>")
    for c, name in enumerate(columns):
        x = left + cell[0] * (c + 0.5)
        x += 4 if turn == 90 and not level else 0
        turned = "" if level else f' transform="rotate(-{turn} {x:.1f} {above - 6:.1f})"'
        anchor = "middle" if level else "start"
        parts.append(f'<text x="{x:.1f}" y="{above - 6:.1f}" text-anchor="{anchor}"{turned}>{_label(name)}</text>')
    for r, name in enumerate(plot.rows):
        y = above + cell[1] * (r + 0.5)
        parts.append(f'<text x="{left - 7:.1f}" y="{y + 4:.1f}" text-anchor="end">{_label(name)}</text>')
        for c, v in enumerate(values[r]):
            x = left + cell[0] * c
            what = f"{name} / {columns[c]}: {'not measured' if v is None else figure(v)}"
            css = "void" if v is None else look(v, low, high, divided)
            parts.append(f'<g class="{css}{"" if few else " small"}"><rect x="{x:.1f}" y="{above + cell[1] * r:.1f}" '
                         f'width="{cell[0] - 1:.1f}" height="{cell[1] - 1:.1f}"/><title>{escape(what)}</title>')
            if v is None or fits:
                text = "&#183;" if v is None else texts[r][c]
                parts.append(f'<text x="{x + cell[0] / 2 - 0.5:.1f}" y="{y + size * 0.34:.1f}" text-anchor="middle">'
                             f"{text}</text>")
            parts.append("</g>")
    parts += _key(left, above + tall + 14, low, high, divided)
    out.svg, out.wide = Markup("".join([*parts, "</svg>"])), width > 400
    if any(v is None for row in values for v in row):
        out.words.append("A dot: not measured.")


def _key(x: float, y: float, low: float, high: float, divided: bool) -> list[str]:
    """Return the legend of a scale: its colours in a row, with the numbers at both ends."""
    names = [f"q{i}" for i in range(STEPS)]
    if divided:
        names = [f"n{i}" for i in (8, 6, 4, 2)] + ["q0"] + [f"p{i}" for i in (2, 4, 6, 8)]
    out = [f'<g class="{n}"><rect x="{x + 20 * i:.1f}" y="{y:.1f}" width="20" height="10"/></g>' for i, n in enumerate(names)]
    ends = [(x, _end(low), "start"), (x + 20 * STEPS, _end(high), "end")] + ([(x + 10 * STEPS, "0", "middle")] if divided else [])
    out += [f'<text x="{a:.1f}" y="{y + 23:.1f}" text-anchor="{anchor}">{t}</text>' for a, t, anchor in ends]
    return out


def _end(value: float) -> str:
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e4 else figure(value)


def _named(text: str) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= NAMED else text[: NAMED - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _label(text: str) -> Markup:
    cut = _named(text)
    whole = "" if cut == str(text) else Markup("<title>{}</title>").format(text)
    return Markup("{}{}").format(cut, whole)


def _confusions(rows: list[str], columns: list[str], values: list[list[float | None]]) -> list[str]:
    """Return what a matrix over the same names on both axes takes for what, in words (nothing for other matrices): its rows
    are shares of one true class each, or counts."""
    sums = [sum(v or 0 for v in row) for row in values]
    counts = all(v is None or (v >= 0 and v == round(v)) for row in values for v in row)
    if rows != columns or len(rows) < 3 or not (counts or all(abs(s - 1) < 0.02 or s == 0 for s in sums)):
        return []
    found = sorted((-v, r, c) for r, row in enumerate(values) for c, v in enumerate(row) if v and r != c)
    right = [v for r, row in enumerate(values) if (v := row[r]) is not None]
    if not found or not right or sum(right) <= 0:
        return []
    told = (lambda v: f"{v:.0f}") if counts else figure
    pairs = ", ".join(f"{rows[r]} as {columns[c]} ({told(-v)})" for v, r, c in found[:CONFUSED])
    return [f"Largest off the diagonal: {pairs}."]


# -- curves -----------------------------------------------------------------------------------------------------------


def _curve(plot: Plot, values: list[list[float | None]], out: Drawn) -> None:
    xs = [finite(c) for c in plot.columns]
    if None in xs:
        out.words.append("It cannot be drawn: its columns are not numbers.")
        return

    def band(part: Any, r: int) -> list[float | None] | None:
        return [finite(v) for v in part[r]] if part and r < len(part) and len(part[r]) == len(xs) else None

    count = min(len(plot.rows), LINES)
    ends = [(band(plot.low, r), band(plot.high, r)) for r in range(count)]
    ys = [v for row in values[:count] for v in row] + [v for pair in ends for part in pair if part for v in part]
    seen = [v for v in ys if v is not None]
    if not seen:
        out.words.append("Nothing was measured in the lines that are shown.")
        return
    shares = plot.diagonal and min([*seen, *xs]) >= 0 and max([*seen, *xs]) <= 1
    log = min(xs) > 0 and max(xs) / min(xs) >= 30 and not plot.diagonal
    frame = Frame(xs, seen, plot.x + (" (log scale)" if log else ""), plot.y, log=log, size=(360, 240),
                  bounds=(-0.02, 1.02) if shares else None)
    names = [_told_line(plot.rows[r], xs, values[r]) for r in range(count)]
    perfect = "; dashed: what a perfect model would give" if plot.diagonal else ""
    body = frame.begin(f"Curve of {out.title}: {'; '.join(names[:8])}{perfect}")
    bands, lines = [], []
    if plot.diagonal:
        a, b = max(frame.xs[0], frame.ys[0]), min(frame.xs[1], frame.ys[1])
        a, b = (max(a, 0), min(b, 1)) if shares else (a, b)
        if b > a:
            x1, x2, y1, y2 = frame.x(a), frame.x(b), frame.y(a), frame.y(b)
            body.append(f'<line class="diagonal" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')
    order = sorted(range(len(xs)), key=lambda c: xs[c])
    for r in range(count):
        css = f"c{r % COLOURS} d{r // COLOURS}"
        shape = SHAPES[r % len(SHAPES)]
        low, high = ends[r]
        if low and high:
            bands += [f'<path class="band {css}" d="{d}"/>' for d in _band(frame, xs, low, high, order)]
        for piece in _pieces(order, values[r]):
            path = " ".join(f"{frame.x(xs[c]):.1f},{frame.y(values[r][c]):.1f}" for c in piece)
            lines.append(f'<polyline class="through {css}" points="{path}"/>')
            for c in piece:
                told = f"{plot.rows[r]}, {plot.x or 'x'} {figure(xs[c])}: {figure(values[r][c])}"
                lines += frame.mark(frame.x(xs[c]), values[r][c], css, 3.2, told, shape)
        key = (f'<svg class="key-line" viewBox="0 0 26 12" width="26" height="12" aria-hidden="true"><line class="through {css}" '
               f'x1="0" x2="26" y1="6" y2="6"/><path class="mark {css}" d="{mark_path(shape, 13, 6, 3.2)}"/></svg>')
        out.legend.append(Legend(plot.rows[r], Markup(key)))
    out.svg = Markup("".join([*body, *bands, *lines, "</svg>"]))
    if any(low and high for low, high in ends):
        out.words.append("Bands: 95 % intervals.")
    if count < len(plot.rows):
        out.words.append(f"The first {count} of {len(plot.rows)} lines are drawn.")


def _told_line(name: str, xs: Sequence[float], row: Sequence[float | None]) -> str:
    there = [(x, v) for x, v in sorted(zip(xs, row, strict=True)) if v is not None]
    if not there:
        return f"{name} not measured"
    return f"{name} from {figure(there[0][1])} at {figure(there[0][0])} to {figure(there[-1][1])} at {figure(there[-1][0])}"


def _pieces(order: Sequence[int], row: Sequence[Any]) -> list[list[int]]:
    """Return the stretches of a line that were measured."""
    out: list[list[int]] = [[]]
    for c in order:
        if row[c] is None:
            out.append([])
        else:
            out[-1].append(c)
    return [p for p in out if p]


def _band(frame: Frame, xs: Sequence[float], low: list, high: list, order: Sequence[int]) -> list[str]:
    both = [None if low[c] is None or high[c] is None else 1 for c in range(len(xs))]
    paths = []
    for piece in _pieces(order, both):
        there = [f"{frame.x(xs[c]):.1f} {frame.y(high[c]):.1f}" for c in piece]
        back = [f"{frame.x(xs[c]):.1f} {frame.y(low[c]):.1f}" for c in reversed(piece)]
        paths.append(f"M{'L'.join(there + back)}z")
    return paths
