"""Runs side by side: one row per figure, one column per run, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nano4m_cli.report._figures import Bar, Figure, bar, interval, scales, verdict
from nano4m_cli.report._numbers import finite
from nano4m_cli.report._read import Inputs, Metric

MOST = 1500  # rows
NONE = "no source"  # of figures of one modality alone


@dataclass(frozen=True)
class Line:
    """One figure over all runs (None: that run does not have it). apart: of each run, whether its interval lies above those of
    all others (or below, where lower is better)."""

    metric: Metric
    probe: str
    cells: list[Figure | None]
    apart: list[bool]


@dataclass
class Comparison:
    """groups: rows by (probe, subject). sources, targets, probes: what there is to choose from. notes: what must be known before
    columns are compared. dropped: rows left out."""

    runs: list[str]
    groups: list[tuple[str, str, list[Line]]]
    sources: list[str]
    targets: list[str]
    probes: list[str]
    notes: list[str]
    dropped: int = 0


def compared(runs: Sequence[tuple[str, Inputs]]) -> Comparison:
    """Return the figures of several runs (by name) side by side, those that most runs have in common first come first."""
    scale = scales([m for _, run in runs for r in run.results for m in r.metrics])
    found: dict[tuple[str, str], list[Figure | None]] = {}
    for i, (_, run) in enumerate(runs):
        for r in run.results:
            for m in r.metrics:
                if m.setting is None:
                    cells = found.setdefault((r.probe, m.name), [None] * len(runs))
                    cells[i] = Figure(m, r.probe, r.posed(m), verdict(m), _bar(m, scale))
    rows = [(key, cells) for key, cells in found.items() if sum(c is not None for c in cells) > 1]
    alone = len(found) - len(rows)
    groups: dict[tuple[str, str], list[Line]] = {}
    for (probe, _), cells in rows[:MOST]:
        metric = next(c.metric for c in cells if c is not None)
        groups.setdefault((probe, metric.subject), []).append(Line(metric, probe, cells, _apart(cells)))
    lines = [li for part in groups.values() for li in part]
    return Comparison(
        [name for name, _ in runs], [(p, s, part) for (p, s), part in groups.items()],
        list(dict.fromkeys(" + ".join(li.metric.sources) or NONE for li in lines)),
        list(dict.fromkeys(li.metric.target for li in lines)), list(dict.fromkeys(li.probe for li in lines)),
        _notes(runs, alone), max(0, len(rows) - MOST),
    )


def _bar(m: Metric, scale: dict) -> Bar | None:
    return bar(m, scale[m.short, m.unit])


def _apart(cells: Sequence[Figure | None]) -> list[bool]:
    ends = []
    for c in cells:
        value = None if c is None else finite(c.metric.value)
        if value is None:
            ends.append(None)
            continue
        sign = 1 if c.metric.higher_is_better else -1
        ends.append(sorted(sign * e for e in interval(c.metric) or (value, value)))
    out = []
    for i, mine in enumerate(ends):
        others = [e for j, e in enumerate(ends) if j != i and e is not None]
        out.append(mine is not None and bool(others) and all(mine[0] > e[1] for e in others))
    return out


def _notes(runs: Sequence[tuple[str, Inputs]], alone: int) -> list[str]:
    """Return what makes columns hard to compare."""
    out = []
    data = {str(run.dataset) for _, run in runs}
    if len(data) > 1:
        out.append(f"The runs are of different data sets ({', '.join(sorted(data))}): their figures answer different questions.")
    versions: dict[str, set[str]] = {}
    for _, run in runs:
        for r in run.results:
            versions.setdefault(r.probe, set()).add(str(r.version))
    if mixed := sorted(p for p, v in versions.items() if len(v) > 1):
        out.append(f"Measured by different versions of the probe: {', '.join(mixed)}.")
    sizes = {m.n for _, run in runs for r in run.results for m in r.metrics if m.n is not None and r.probe == "class"}
    if len(sizes) > 1:
        out.append("The runs were evaluated on different numbers of samples.")
    if alone:
        out.append(f"{alone} figures that only one of the runs has are not shown here.")
    return out
