"""Metrics to what the page shows of them: a scale, a bar with its interval and ticks, a verdict against chance."""

from __future__ import annotations

from dataclasses import dataclass, field

from nano4m_cli.report._numbers import figure, finite
from nano4m_cli.report._read import Inputs, Metric, Posed, Result

KEY = 8  # bars of a card; the tables have them all
SAME = 1e-9
MARKS = ("chance", "majority", "ceiling", "reference")


@dataclass(frozen=True)
class Bar:
    """Places on the track in percent; None where there is nothing to draw."""

    start: float
    width: float
    interval: tuple[float, float] | None
    ticks: dict[str, float]  # by name, of MARKS


@dataclass(frozen=True)
class Figure:
    """One metric as it is shown. verdict: better, level or worse than its baseline, bound (its source
    cannot tell), or none (no baseline)."""

    metric: Metric
    probe: str
    posed: Posed
    verdict: str
    bar: Bar | None

    @property
    def told(self) -> str:
        """The figure in words, for those who do not see the bar."""
        m = self.metric
        parts = [f"{m.name}: {figure(m.value)}{' ' + m.unit if m.unit else ''}"]
        if interval(m) is not None:
            parts.append(f"95 % interval {figure(interval(m)[0])} to {figure(interval(m)[1])}")
        for name in MARKS:
            if finite(getattr(m, name)) is not None:
                parts.append(f"{name} {figure(getattr(m, name))}")
        if not m.higher_is_better:
            parts.append("lower is better")
        return ", ".join(parts)

    @property
    def against(self) -> str:
        """Interval and baseline in words: "0.876 to 0.929, chance 0.333"."""
        m, ends, base = self.metric, interval(self.metric), baseline(self.metric)
        parts = [] if ends is None else [f"{figure(ends[0])} to {figure(ends[1])}"]
        if base is not None:
            parts.append(f"{'chance' if finite(m.chance) == base else 'majority'} {figure(base)}")
        return ", ".join(parts)


@dataclass
class Card:
    """All figures of one direction (or one modality)."""

    subject: str
    sources: tuple[str, ...]
    target: str
    posed: Posed
    figures: list[Figure] = field(default_factory=list)

    @property
    def shown(self) -> list[Figure]:
        """The key figures: those with something to compare to first, in their own order."""
        if len(self.figures) <= KEY:
            return self.figures
        ranked = sorted(self.figures, key=lambda f: (f.verdict == "none", not f.bar or not f.bar.ticks))[:KEY]
        return [f for f in self.figures if any(f is g for g in ranked)]


def interval(m: Metric) -> tuple[float, float] | None:
    ends = [finite(e) for e in m.ci95 or (None, None)]
    return None if None in ends else (min(ends), max(ends))


def baseline(m: Metric) -> float | None:
    """Return the better of chance and majority class: what needs no knowledge of the source."""
    known = [b for b in (finite(m.chance), finite(m.majority)) if b is not None]
    return None if not known else max(known) if m.higher_is_better else min(known)


def verdict(m: Metric) -> str:
    """Return how the whole interval lies to the baseline: "better", "level", "worse"; "bound" where the ceiling is no
    better than the baseline, so that nobody could do better; "none" without a baseline or a value."""
    base, value, ceiling = baseline(m), finite(m.value), finite(m.ceiling)
    if base is None or value is None:
        return "none"
    sign = 1 if m.higher_is_better else -1
    low, high = sorted(sign * e for e in interval(m) or (value, value))
    if low > sign * base + SAME:
        return "better"
    if ceiling is not None and sign * ceiling <= sign * base + SAME:
        return "bound"
    return "worse" if high < sign * base - SAME else "level"


def _numbers(m: Metric) -> list[float]:
    all_of = (m.value, *(m.ci95 or ()), *(getattr(m, name) for name in MARKS))
    return [v for x in all_of if (v := finite(x)) is not None]


def scales(metrics: list[Metric]) -> dict[tuple[str, str], tuple[float, float]]:
    """Return per (metric, unit) the ends of its track: 0 to 1 for shares, else zero to the largest number."""
    out = {}
    for m in metrics:
        low, high = out.get((m.short, m.unit), (0.0, 0.0))
        out[m.short, m.unit] = (min([low, *_numbers(m)]), max([high, *_numbers(m)]))
    shares = {(m.short, m.unit) for m in metrics if m.higher_is_better}
    return {k: (0.0, 1.0) if k in shares and lo >= 0 and hi <= 1 else (lo, hi) for k, (lo, hi) in out.items()}


def bar(m: Metric, scale: tuple[float, float]) -> Bar | None:
    """Return the bar of a metric on its scale; None where value or scale are nothing."""
    value, (low, high) = finite(m.value), scale
    if value is None or not high > low:
        return None

    def at(x: float) -> float:
        return round(100 * (x - low) / (high - low), 2)

    def span(a: float, b: float) -> tuple[float, float]:
        return at(a), round(at(b) - at(a), 2)

    ends = interval(m)
    ticks = {name: at(x) for name in MARKS if (x := finite(getattr(m, name))) is not None}
    return Bar(*span(min(0.0, value), max(0.0, value)), None if ends is None else span(*ends), ticks)


def figures(result: Result, scale: dict[tuple[str, str], tuple[float, float]]) -> list[Figure]:
    return [
        Figure(m, result.probe, result.posed(m), verdict(m), bar(m, scale[m.short, m.unit])) for m in result.metrics
    ]


def cards(run: Inputs) -> list[Card]:
    """Return a card per direction over all probes, by target, then by source, in the run's order of modalities; those
    of one modality alone come last."""
    scale = scales([m for r in run.results for m in r.metrics])
    out: dict[str, Card] = {}
    for result in run.results:
        for f in figures(result, scale):
            m = f.metric
            if m.setting is not None:  # laid out side by side in the probe's own section
                continue
            # What the result says of the direction itself: a figure may rest on other questions as well (fusion).
            posed = result.in_distribution.get(m.subject, f.posed)
            card = out.setdefault(m.subject, Card(m.subject, m.sources, m.target, posed))
            if card.posed.value is None or posed.value is False:
                card.posed = posed
            card.figures.append(f)
    order = {name: i for i, name in enumerate(run.modalities)}

    def rank(card: Card):
        place = [order.get(s, len(order)) for s in card.sources]
        return (not card.sources, order.get(card.target, len(order)), card.target, len(place), place, card.subject)

    return sorted(out.values(), key=rank)


def tally(all_cards: list[Card]) -> dict[str, list[Figure]]:
    """Return the figures by verdict."""
    out: dict[str, list[Figure]] = {v: [] for v in ("better", "level", "worse", "bound", "none")}
    for card in all_cards:
        for f in card.figures:
            out[f.verdict].append(f)
    return out
