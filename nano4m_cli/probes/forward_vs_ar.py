"""What answering all slots at once costs: one-pass likelihood against the chain rule, slots revealed one after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import numpy as np
from pydantic import Field

from nano4m_cli.config import Config
from nano4m_cli.dist import Work
from nano4m_cli.generate.likelihood import nll_work
from nano4m_cli.probes._base import Probe as Base
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._result import Findings, Metric, Plot, mean_metric
from nano4m_cli.rng import uniform

KIND = "eval"


class Probe(Base):
    class Options(Config):
        """samples: of the split. positions: of each sample's slots that are asked in their turn, where it has more."""

        samples: Annotated[int, Field(ge=2)] = 24
        positions: Annotated[int, Field(ge=1)] = 24

    def missing(self, context: Context) -> str | None:
        if not context.model.at_once:
            return "a model that reads slot by slot never answers at once"
        return None if _targets(context) else "text is read from left to right in any case: the run has no grid and no codes"

    def measure(self, context: Context) -> Findings:
        metrics: list[Metric] = []
        n = min(self.options.samples, context.n)
        plans = [(s, t) for t in _targets(context) for s in [[], *([o] for o in context.names if o != t)]
                 if context.model.reads(s, t)]
        cost: dict[tuple[str, str], float | None] = {}
        for i, (sources, target) in enumerate(plans):
            name = context.direction(sources, target)
            context.progress("one pass against chain rule", i, len(plans))
            has = np.flatnonzero((context.length_NM[:n, [context.names.index(m) for m in [*sources, target]]] > 0).all(1))
            if not len(has):
                continue
            picked = positions(context, target, has, self.options.positions)
            order = {what: orders(context, target, has, bool(what)) for what in ("", "_random")}
            works = [one_pass_work(context, sources, target, has),
                     *(sequential_work(context, sources, target, has, o, picked) for o in order.values())]
            whole, *turns = context.answers("", works)
            for what, given in zip(order, turns, strict=True):
                # The same slots of the same samples, answered at once: the difference is the order's, not the slots'.
                at_once = np.take_along_axis(whole, np.take_along_axis(order[what], picked, 1), 1)
                cost_N = (at_once - given).mean(1)
                metrics.append(_metric(f"{name}/sequential{what}_ce", given.mean(1), has))
                metrics.append(_metric(f"{name}/independence_cost{what}", cost_N, has))
                cost[name, what] = metrics[-1].value
            metrics.append(_metric(f"{name}/onepass_ce", whole.mean(1), has))
        names, targets = context.names, _targets(context)
        plots = [
            Plot(name=f"independence{what}", kind="matrix", rows=["nothing", *names], columns=targets, x="target", y="source",
                 title=f"What answering at once costs, against slots in {words} order (nats per token)",
                 values=[[cost.get((context.direction(s, t), what)) for t in targets] for s in ([], *([m] for m in names))])
            for what, words in (("", "reading"), ("_random", "random"))
        ]
        return Findings(metrics, [
            f"the first {n} samples; the whole target from whole sources, true tokens revealed in reading order (row by row, frame "
            f"by frame) or in a random one; at most {self.options.positions} slots a sample, evenly spread, are asked in turn",
            "independence_cost: nats per token by which the sum of slot-by-slot log-likelihoods in one pass lies above the chain "
            "rule's; how much of it generation pays depends on its steps; below 0 the model makes worse guesses with part of the "
            "target known than without",
            "each turn asks all slots that are still unknown, as training does, and counts one of them",
        ], plots)


def _targets(context: Context) -> list[str]:
    return [s.modality for s in context.layout.specs if s.kind != "sequence" and s.slots > 1]


def _metric(name: str, values: np.ndarray, has: np.ndarray) -> Metric:
    """Return the mean over the samples that have what is asked, with values in the split's order."""
    full, weight = np.zeros(has[-1] + 1), np.zeros(has[-1] + 1)
    full[has], weight[has] = values, 1.0
    return mean_metric(name, full, weight, higher_is_better=False, unit="nats")


def one_pass_work(context: Context, sources: list[str], target: str, rows: np.ndarray) -> Work[np.ndarray]:
    """Ask for (n, slots): -log p of each slot, all asked at once."""
    shown = (context.inside_NC & context.columns(*sources))[rows]
    asked = (context.inside_NC & context.columns(target))[rows]
    work = nll_work(context.model, context.ids_NC[rows], shown, asked, context.inside_NC[rows])
    return replace(work, join=lambda parts: work.join(parts)[:, context.layout.slice(target)])


def orders(context: Context, target: str, rows: np.ndarray, random: bool) -> np.ndarray:
    """Return (n, slots): the slots in the order in which they become known."""
    slots = context.layout.specs[context.names.index(target)].slots
    if not random:
        return np.tile(np.arange(slots), (len(rows), 1))
    return np.argsort(uniform(context.seed, f"forward/{target}", rows[:, None], np.arange(slots)), axis=1)


def positions(context: Context, target: str, rows: np.ndarray, most: int) -> np.ndarray:
    """Return (n, p): which turns are asked: all, or `most` evenly spread ones from a start of each sample's own, so that over
    samples every turn is as likely (their mean is the chain rule's mean, estimated)."""
    slots = context.layout.specs[context.names.index(target)].slots
    if slots <= most:
        return np.tile(np.arange(slots), (len(rows), 1))
    start = uniform(context.seed, f"forward/start/{target}", rows)[:, None]
    return np.floor((start + np.arange(most)) / most * slots).astype(np.int64)


def sequential_work(
    context: Context, sources: list[str], target: str, rows: np.ndarray, order_NL: np.ndarray, picked_NP: np.ndarray
) -> Work[np.ndarray]:
    """Ask for (n, p): -log p of the slot that is revealed at each picked turn, given the sources and all slots before it."""
    columns, (n, p) = context.layout.slice(target), picked_NP.shape
    place_NL = np.argsort(order_NL, axis=1)  # the turn at which each slot becomes known
    shown = np.repeat((context.inside_NC & context.columns(*sources))[rows], p, 0)
    known = np.repeat(place_NL, p, 0) < picked_NP.reshape(-1, 1)
    shown[:, columns] = known
    asked = np.zeros_like(shown)
    asked[:, columns] = ~known
    work = nll_work(context.model, np.repeat(context.ids_NC[rows], p, 0), shown, asked, np.repeat(context.inside_NC[rows], p, 0))
    slot = np.take_along_axis(order_NL, picked_NP, 1).reshape(-1)
    return replace(work, join=lambda parts: work.join(parts)[np.arange(n * p), columns.start + slot].reshape(n, p))
