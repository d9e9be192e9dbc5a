"""What the report of a run and the pages of a site share: the parts of a run as they are shown, the templates, the policy."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nano4m_cli.report import _numbers as numbers
from nano4m_cli.report._about import commands, facts, name_of, sentence, spec_row, versions
from nano4m_cli.report._curves import Chart, charts
from nano4m_cli.report._figures import Bar, Card, Figure, cards, figures, interval, scales, tally
from nano4m_cli.report._method import Method, method
from nano4m_cli.report._numbers import count, duration
from nano4m_cli.report._plots import Drawn, drawn
from nano4m_cli.report._read import Inputs, Plot, Result
from nano4m_cli.report._tradeoffs import Table, tables
from nano4m_cli.report._words import Verdict, reach, verdicts

HERE = Path(__file__).parent
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
EXAMPLE = {"better": Bar(0, 70, (58.0, 24.0), {}), "plain": Bar(0, 70, None, {})}  # of the key to the bars
MAPPED = 24  # modalities of a map of directions, at most


@dataclass(frozen=True)
class ShownProbe:
    """A result, its figures by subject, its figures under several settings, its plots."""

    result: Result
    groups: list[tuple[str, list[Figure]]]
    tables: list[Table]
    plots: list[Drawn]

    @property
    def title(self) -> str:
        return (self.result.title or self.result.probe).strip().removesuffix(".")

    @property
    def beat(self) -> int:
        return sum(f.verdict == "better" for _, found in self.groups for f in found)

    @property
    def judged(self) -> int:
        return sum(f.verdict in ("better", "level", "worse") for _, found in self.groups for f in found)

    @property
    def figures(self) -> int:
        return len(self.result.metrics)


@dataclass(frozen=True)
class View:
    """A run as pages show it."""

    run: Inputs
    name: str
    sentence: str
    facts: list[tuple[str, str]]
    cards: list[Card]
    tally: dict[str, list[Figure]]
    verdict: Verdict
    map: Drawn | None
    losses: list[Chart]
    rest: list[Chart]
    method: Method
    specs: list[dict[str, str]]
    probes: list[ShownProbe]
    commands: str
    versions: list[tuple[str, str]]


def view(run: Inputs) -> View:
    """Return a run's parts, everything but its gallery."""
    losses, rest = charts(run)
    all_cards = cards(run)
    scale = scales([m for r in run.results for m in r.metrics])
    probes = [
        ShownProbe(r, _by_subject([f for f in figures(r, scale) if f.metric.setting is None]), tables(r.metrics),
                   sorted((drawn(p) for p in r.plots), key=lambda p: p.wide or p.kind == "table"))
        for r in run.results
    ]
    return View(
        run, name_of(run), sentence(run), facts(run), all_cards, tally(all_cards), verdicts(all_cards), _map(run, all_cards),
        losses, rest, method(run), [spec_row(s) for s in run.specs], probes, commands(run), versions(run),
    )


def _by_subject(found: list[Figure]) -> list[tuple[str, list[Figure]]]:
    groups: dict[str, list[Figure]] = {}
    for f in found:
        groups.setdefault(f.metric.subject, []).append(f)
    return list(groups.items())


def _map(run: Inputs, all_cards: list[Card]) -> Drawn | None:
    """Return what every pair of modalities reaches as a heat map; None where there are fewer than two of them."""
    found: dict[tuple[str, str], float] = {}
    for card in all_cards:
        value = reach(card)
        if len(card.sources) == 1 and value is not None:
            found[card.sources[0], card.target] = max(0.0, value)
    known = [m for m in run.modalities if any(m in pair for pair in found)]
    known += sorted({m for pair in found for m in pair} - set(known))
    if len(found) < 2 or len(known) > MAPPED:
        return None
    values: list[list[Any]] = [[found.get((s, t)) for t in known] for s in known]
    out = drawn(Plot(name="directions", title="How far each direction gets", kind="matrix", rows=known, columns=known,
                     values=values, x="target", y="source"))
    out.words = ["Mean over the main figures of a direction: 0 is the baseline, 1 the best that is possible (the ceiling where it "
                 "is known, what real data reach, or a perfect score). A dot: no figure whose best is known."]
    return out


@cache
def _environment() -> Environment:
    env = Environment(
        loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(figure=numbers.figure, count=count, duration=duration, share=numbers.share)
    env.filters.update(arrow=_arrow, softly=_softly)
    env.globals.update(interval=interval, example=EXAMPLE)
    return env


def _arrow(text: str) -> str:
    return text.replace("->", "\N{RIGHTWARDS ARROW}")


def _softly(name: str) -> Markup:
    """Return a name that may be broken after its underscores."""
    return Markup("_<wbr>").join(name.split("_"))


@cache
def asset(name: str) -> str:
    """Return a file of this package that pages hold or link: style.css, filter.js."""
    return (HERE / name).read_text()


def page(template: str, inlined: bool, **values: Any) -> bytes:
    """Return a page as UTF-8.

    Args:
        inlined: style, script and media stand in the page itself; otherwise beside it, on its own host. Nothing else is allowed
            to load, and no other script to run, wherever the page is put.
    """
    style, script = asset("style.css"), asset("filter.js")
    if inlined:
        policy = (f"default-src 'none'; img-src data:; media-src data:; style-src 'sha256-{_hash(style)}'; "
                  f"script-src 'sha256-{_hash(script)}'; base-uri 'none'; form-action 'none'")
    else:
        policy = ("default-src 'none'; img-src 'self' data:; media-src 'self'; style-src 'self'; script-src 'self'; "
                  "base-uri 'none'; form-action 'none'")
    values = {"base": "", "nav_label": "Sections", "about": "A nano4m run", **values}
    # Both are files of this package, the only text that goes in as it is.
    text = _environment().get_template(template).render(
        inlined=inlined, policy=policy, style=Markup(style), script=Markup(script), **values
    )
    # Control characters are errors in HTML, and a lone surrogate cannot be encoded.
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text).encode("utf-8", "replace")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def parts(shown: View) -> dict[str, Any]:
    """Return a view's parts by the names that templates use."""
    return {k: getattr(shown, k) for k in (
        "name", "sentence", "facts", "cards", "tally", "verdict", "map", "losses", "rest", "method", "specs", "probes", "commands",
        "versions")}
