"""What a run can do, in words: only what beats its baseline with the whole 95 % interval is claimed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from nano4m_cli.report._figures import Card, Figure, baseline, tally
from nano4m_cli.report._numbers import finite

ROOM = 0.1  # a share whose best lies nearer to its baseline than this ranks nothing: noise would
BEST, WEAKEST = 6, 3  # directions told as the best (at most half of all), and as the weakest
BARS = 5  # figures shown of each
ASIDE = ("r10", "mrr")  # said already by r1 and r5
LUCK = 0.025  # of figures that are at their baseline, beat it by their 95 % interval


@dataclass(frozen=True)
class Claim:
    """A direction in a sentence, with the figures that bear it. skill: see `skill`."""

    card: Card
    skill: float
    sentence: str
    figures: list[Figure] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """beat of judged figures are better than their baseline, of which `luck` would be by chance if nothing had been learned."""

    beat: int
    judged: int
    luck: float
    best: list[Claim]
    weakest: list[Claim]
    untrained: list[Card]
    nothing: list[Figure]  # not to be told from the baseline, or worse


def skill(f: Figure) -> float | None:
    """Return how far a figure gets from its baseline (0) to the best that is possible (1): its ceiling, where known, else
    what real data reach, else 1 of a share; None where the best is not known, or hardly better than the baseline."""
    m, base, value = f.metric, baseline(f.metric), finite(f.metric.value)
    if base is None or value is None:
        return None
    best = finite(m.ceiling)
    if best is None:
        best = finite(m.reference) if not m.higher_is_better or m.unit else 1.0
    share = m.higher_is_better and not m.unit and max(base, value) <= 1
    if best is None or (m.higher_is_better and not m.unit and not share):
        return None
    room = (best - base) * (1 if m.higher_is_better else -1)
    if room <= 0 or (share and room < ROOM):
        return None
    return max(-1.0, min(1.0, (value - base) / (best - base)))


def main_figures(card: Card) -> list[Figure]:
    """Return the figures of a direction that are no variants of another one there ("acc_pmi" of "acc", "likelihood_r1" of "r1")."""
    names = {f.metric.short for f in card.figures}

    def variant(short: str) -> bool:
        rank = re.fullmatch(r".+_(r\d+|mrr)", short)
        return any(short.startswith(n + "_") for n in names) or (rank is not None and rank[1] in names)

    return [f for f in card.figures if not variant(f.metric.short)]


def reach(card: Card) -> float | None:
    """Return the mean skill of a direction's main figures; None where no figure has one."""
    skills = [s for f in main_figures(card) if f.verdict in ("better", "level", "worse") and (s := skill(f)) is not None]
    return sum(skills) / len(skills) if skills else None


def verdicts(cards: list[Card]) -> Verdict:
    """Return what a run can do, over all its directions."""
    found = tally(cards)
    judged = [f for v in ("better", "level", "worse") for f in found[v]]
    ranked = []
    for card in cards:
        value = reach(card)
        if card.sources and value is not None and card.posed.value is not False:
            ranked.append((value, card))
    ranked.sort(key=lambda one: -one[0])
    best = [c for s, c in ranked if any(f.verdict == "better" for f in c.figures)][: min(BEST, -(-len(ranked) // 2))]
    rest = [(s, c) for s, c in ranked if c not in best]
    return Verdict(
        len(found["better"]), len(judged), LUCK * len(judged),
        [_claim(c, s) for s, c in ranked if c in best],
        [_claim(c, s, weak=True) for s, c in rest[::-1][:WEAKEST]],
        [c for c in cards if c.posed.value is False],
        [*found["level"], *found["worse"]],
    )


def _claim(card: Card, value: float, weak: bool = False) -> Claim:
    known = [f for f in main_figures(card) if f.verdict != "none" and skill(f) is not None]
    known = [f for f in known if f.metric.short not in ASIDE] or known
    better = sorted((f for f in known if f.verdict == "better"), key=lambda f: -(skill(f) or 0))
    shown = sorted(known, key=lambda f: skill(f) or 0)[:BARS] if weak else better[:BARS]
    return Claim(card, value, sentence(card, better), [f for f in card.figures if any(f is s for s in shown)])


def sentence(card: Card, better: list[Figure]) -> str:
    """Return what the figures that beat their baseline say of a direction; nothing else is claimed."""
    given = f"Given {_joined(list(card.sources))}{' alone' if len(card.sources) == 1 else ''}"
    known, made, found, rest = [], [], "", []
    for f in sorted(better, key=lambda f: [g is f for g in card.figures].index(True)):
        short = f.metric.short
        if m := re.fullmatch(r"([a-z]+)_acc", short):
            (known if f.probe == "class" else made).append(m[1])
        elif m := re.fullmatch(r"r(\d+)", short):
            found = found or f"finds the right {card.target} among others more often than chance"
        elif short not in ("ce", "bits", *ASIDE):
            rest.append(short.replace("_", " "))
    known, made = list(dict.fromkeys(known)), [a for a in dict.fromkeys(made) if a not in known]
    parts = []
    if known:
        parts.append(f"knows {_joined(known)}" + (f" of the {card.target}" if card.target != "caption" else ""))
    if made:
        parts.append(f"makes {card.target} with the right {_joined(made)}")
    if found:
        parts.append(found)
    if rest:
        parts.insert(0, f"beats its baseline in {_joined(list(dict.fromkeys(rest))[:3])} of {card.target}")
    if not parts:
        return f"{given}, no figure of {card.target} beats its baseline." if not better else \
            f"{given}, it predicts {card.target} better than its baseline does."
    return f"{given}, it {', and '.join(parts)}."


def _joined(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1] if names else "nothing"
