"""Figures measured under several settings, side by side: a table of settings, and plots of what one gains and pays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from nano4m_cli.report._figures import interval
from nano4m_cli.report._frame import COLOURS, Frame
from nano4m_cli.report._numbers import figure, finite

PLOTTED = ("vendi_judge", "distinct", "seconds", "calls")  # columns that the first is plotted over; of each two the first there


@dataclass(frozen=True)
class Row:
    """One setting's values and its metric per column (None: not measured)."""

    setting: tuple[Any, ...]
    cells: tuple[Any, ...]


@dataclass
class Table:
    """All metrics of one subject whose settings have the same keys. best: per column the row that is best (None: one row)."""

    subject: str
    keys: tuple[str, ...]
    columns: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    @property
    def best(self) -> list[int | None]:
        out: list[int | None] = []
        for c in range(len(self.columns)):
            found = [(v if m.higher_is_better else -v, -i) for i, r in enumerate(self.rows)
                     if (m := r.cells[c]) is not None and (v := finite(m.value)) is not None]
            out.append(-max(found)[1] if len(found) > 1 and min(found)[0] < max(found)[0] else None)
        return out

    @property
    def plots(self) -> list[Plot]:
        if "best of" in self.keys:
            return [_lines(self)]
        return [_scatter(self, x) for pair in (PLOTTED[:2], PLOTTED[2:]) for x in [p for p in pair if p in self.columns][:1]]


@dataclass(frozen=True)
class Plot:
    """legend: (name, CSS class) of what is told apart by colour; note: of what else."""

    title: str
    legend: list[tuple[str, str]]
    note: str
    svg: Markup


def tables(metrics: Sequence[Any]) -> list[Table]:
    """Return a table per subject and kind of setting, rows and columns in the order of the metrics."""
    out: dict[tuple, Table] = {}
    found: dict[tuple, dict[tuple, dict[str, Any]]] = {}
    for m in metrics:
        if m.setting is None:
            continue
        subject, _, short = m.name.rpartition("/")
        key, column = (subject, tuple(m.setting)), short.partition("[")[0]
        table = out.setdefault(key, Table(subject, tuple(m.setting)))
        if column not in table.columns:
            table.columns.append(column)
        found.setdefault(key, {}).setdefault(tuple(m.setting.values()), {})[column] = m
    for key, table in out.items():
        table.rows = [Row(s, tuple(cells.get(c) for c in table.columns)) for s, cells in found[key].items()]
    return list(out.values())


# -- plots ------------------------------------------------------------------------------------------------------------


def _scatter(table: Table, over: str) -> Plot:
    """Return the first column over another; colour tells the first key, size the second, hollow the lowest of the last."""
    c, what, keys = table.columns.index(over), table.columns[0], table.keys
    names = list(dict.fromkeys(r.setting[0] for r in table.rows))
    sizes = sorted({s for r in table.rows for s in r.setting[1:2] if finite(s) is not None})
    last = {r.setting[-1] for r in table.rows}
    hollow = min(last) if len(keys) > 2 and len(last) > 1 and all(finite(x) is not None for x in last) else None
    found = [(r, x, y) for r in table.rows if (x := _value(r.cells[c])) is not None and (y := _value(r.cells[0])) is not None]
    unit = next((m.unit for r in table.rows if (m := r.cells[c]) is not None and m.unit), "")
    ys = [v for r, _, y in found for v in (y, *(interval(r.cells[0]) or ()))]
    frame = Frame([x for _, x, _ in found], ys, f"{over}, {unit}" if unit else over, what)
    out, marks = frame.begin(f"{what} over {over} of {len(found)} settings of {table.subject}"), []
    for r, x, y in found:
        look = f"c{names.index(r.setting[0]) % COLOURS}" + (" hollow" if r.setting[-1] == hollow else "")
        radius = 2.6 + (1.6 * sizes.index(r.setting[1]) / (len(sizes) - 1) if len(sizes) > 1 and r.setting[1] in sizes else 0)
        told = ", ".join(f"{k} {v}" for k, v in zip(keys, r.setting, strict=True))
        out += frame.whisker(frame.x(x), r.cells[0], look)
        marks += frame.mark(frame.x(x), y, look, radius, f"{told}: {what} {figure(y)}, {over} {figure(x)}")
    notes = [f"larger: more {keys[1]}"] if len(sizes) > 1 else []
    notes += [f"hollow: {keys[-1]} {hollow:g}"] if hollow is not None else []
    legend = [(str(n), f"c{i % COLOURS}") for i, n in enumerate(names)]
    svg = Markup("".join([*out, *marks, "</svg>"]))
    return Plot(f"{what} over {over}", legend, "; ".join([*notes, "lines: 95 % intervals"]), svg)


def _lines(table: Table) -> Plot:
    """Return the first column over how many there were to choose from (log2), a line per value of the other keys."""
    at, what = table.keys.index("best of"), table.columns[0]
    groups: dict[str, list[tuple[float, Any]]] = {}
    for r in table.rows:
        n = finite(r.setting[at])
        if n is not None and n >= 1 and _value(r.cells[0]) is not None:
            name = " ".join(str(v) for i, v in enumerate(r.setting) if i != at)
            groups.setdefault(name, []).append((math.log2(n), r.cells[0]))
    xs = sorted({x for points in groups.values() for x, _ in points})
    ys = [v for points in groups.values() for _, m in points for v in (m.value, *(interval(m) or ()))]
    frame = Frame(xs, ys, "candidates", what, {x: f"{2**x:.0f}" for x in xs})
    out = frame.begin(f"{what} of {table.subject} over the number of candidates")
    for g, (name, points) in enumerate(groups.items()):
        look, shift = f"c{g % COLOURS}", 3.0 * (g - (len(groups) - 1) / 2)  # so that intervals do not cover each other
        points.sort(key=lambda point: point[0])
        path = " ".join(f"{frame.x(x) + shift:.1f},{frame.y(m.value):.1f}" for x, m in points)
        out.append(f'<polyline class="through {look}" points="{path}"/>')
        for x, m in points:
            out += frame.whisker(frame.x(x) + shift, m, look)
            out += frame.mark(frame.x(x) + shift, m.value, look, 2.8, f"{name}, best of {2**x:.0f}: {figure(m.value)}")
    legend = [(n, f"c{i % COLOURS}") for i, n in enumerate(groups)]
    return Plot(f"{what} of the best of n", legend, "lines: 95 % intervals", Markup("".join([*out, "</svg>"])))


def _value(metric: Any) -> float | None:
    return None if metric is None else finite(metric.value)
