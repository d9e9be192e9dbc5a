"""What each modality gives to each other one: gain in likelihood by adding a source to none, to the rest, and on average."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np

from nano4m_cli.dist import Work
from nano4m_cli.probes._base import Probe as Base
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._pieces import nll_work
from nano4m_cli.probes._result import Findings, Metric, Plot, mean_metric
from nano4m_cli.probes._shapley import Subset, orders, shapley, subsets

KIND = "eval"
SAMPLES = 200  # likelihoods are asked once for every set of sources


class Probe(Base):
    def missing(self, context: Context) -> str | None:
        if len(context.names) < 2:
            return "the run has one modality only"
        return None if any(_sources(context, t) for t in context.names) else \
            "the model reads in one order and cannot be asked with and without a source"

    def measure(self, context: Context) -> Findings:
        metrics: list[Metric] = []
        grids = {kind: {} for kind in PLOTS}
        never: list[str] = []
        todo = [t for t in context.names if _sources(context, t)]
        values = [Likelihoods(context, target, _sources(context, target)) for target in todo]
        asked = [(value, given) for value in values for given in _sets(value.sources, context.seed)]
        answers = context.answers("sets of sources", [value.work(given) for value, given in asked])
        for (value, given), mean in zip(asked, answers, strict=True):
            value.known[given] = mean
        for value in values:
            metrics += _figures(context, value, grids)
            never += [d for d in value.directions() if not context.posed(d).value]
        plots = [
            Plot(name=kind, title=title, kind="matrix", rows=context.names, columns=todo, x="target", y="source",
                 values=[[grids[kind].get((s, t)) for t in todo] for s in context.names])
            for kind, title in PLOTS.items()
        ]
        return Findings(metrics, [
            f"nats per token of the whole target, of the first {min(SAMPLES, context.n)} samples: cross-entropy without a source "
            "less that with it; grids and codes in one pass, text from left to right; below 0: the source misleads",
            "gain: over nothing shown; gain_last: over all other sources (leave one out); gain_shapley: mean over all orders in "
            "which the sources may come; of two sources together gain, and synergy: what they give beyond the sum of both alone "
            "(below 0: they say the same)",
            "a figure counts as trained if training posed every set of sources that it is made of; by the masking of training, "
            + (f"never or hardly ever posed: {', '.join(never)}" if never else "all were posed"),
        ], plots)


PLOTS = {
    "gain": "Gain of a source over nothing, nats per token",
    "gain_last": "Gain of a source over all others, nats per token",
    "gain_shapley": "Gain of a source on average over all orders (Shapley), nats per token",
}


def _sources(context: Context, target: str) -> list[str]:
    """Return the sources of a target, where the model can be asked with any of them and with none."""
    others = [n for n in context.names if n != target]
    readable = all(context.model.reads(sorted(s, key=others.index), target) for s in _sets(others, context.seed))
    return others if readable else []


def _sets(members: list[str], seed: int) -> list[Subset]:
    """Return the sets of sources that are asked: all, or those on the way of drawn orders, beside singles and pairs."""
    drawn = orders(members, seed)
    if drawn is None:
        return list(subsets(members))
    ways = [frozenset(o[:k]) for o in drawn for k in range(len(o) + 1)]
    small = [frozenset(c) for size in (1, 2) for c in combinations(members, size)]
    rest = [frozenset(members) - {m} for m in members]
    return sorted(set([*ways, *small, *rest]), key=lambda s: (len(s), sorted(s)))


class Likelihoods:
    """Mean log-likelihood per token (N,) of a target given every set of sources, in samples that have them all."""

    def __init__(self, context: Context, target: str, sources: list[str]):
        self.context, self.target, self.sources, n = context, target, sources, min(SAMPLES, context.n)
        inside, own = context.inside_NC[:n], context.columns(target)
        self.asked = inside & own
        self.count = np.zeros(context.n)
        whole = [inside[:, context.layout.slice(s)].any(1) for s in (target, *sources)]
        self.count[:n] = self.asked.sum(1) * np.all(whole, 0)
        self.known: dict[Subset, np.ndarray] = {}

    def work(self, given: Subset) -> Work[np.ndarray]:
        """Ask for what is known of a set of sources."""
        some = slice(len(self.asked))
        work = nll_work(self.context, self.context.inside_NC[some] & self.context.columns(*given), self.asked, some)

        def join(parts: list[np.ndarray]) -> np.ndarray:
            out = np.zeros(self.context.n)
            total = np.where(self.asked, np.nan_to_num(work.join(parts)), 0.0).sum(1)
            out[some] = -total / np.maximum(self.asked.sum(1), 1)
            return out

        return replace(work, join=join)

    def __call__(self, given: Subset) -> np.ndarray:
        return self.known[given]

    def name(self, given: Subset) -> str:
        return self.context.direction(sorted(given), self.target)

    def directions(self) -> list[str]:
        return [self.name(s) for s in _sets(self.sources, self.context.seed)]


def _figures(context: Context, value: Likelihoods, grids: dict[str, dict]) -> list[Metric]:
    target, sources, none, everything = value.target, value.sources, frozenset(), frozenset(value.sources)
    metrics: list[Metric] = []

    def add(name: str, values: np.ndarray, made_of: list[Subset], grid: str = "", source: str = "") -> None:
        trained = all(context.posed(value.name(s)).value for s in made_of)
        metrics.append(mean_metric(name, values, value.count, unit="nats", in_distribution=trained))
        if grid:
            grids[grid][source, target] = metrics[-1].value

    one = {s: frozenset([s]) for s in sources}
    for s in sources:
        add(f"{s}->{target}/gain", value(one[s]) - value(none), [none, one[s]], "gain", s)
    if len(sources) > 1:
        every = _sets(sources, context.seed)
        average = shapley(sources, value, orders(sources, context.seed))
        for s in sources:
            rest = everything - one[s]
            add(f"{s}->{target}/gain_last", value(everything) - value(rest), [everything, rest], "gain_last", s)
            add(f"{s}->{target}/gain_shapley", average[s], every, "gain_shapley", s)
        for a, b in combinations(sources, 2):
            both, name = one[a] | one[b], value.name(one[a] | one[b])
            add(f"{name}/gain", value(both) - value(none), [none, both])
            add(f"{name}/synergy", value(both) - value(one[a]) - value(one[b]) + value(none), [none, one[a], one[b], both])
    if len(sources) > 2:
        add(f"{value.name(everything)}/gain", value(everything) - value(none), [none, everything])
    return metrics
