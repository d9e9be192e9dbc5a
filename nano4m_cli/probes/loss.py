"""Cross-entropy in nats and bits: by fixed masks, from nothing, from one whole source and from all others to every target."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from nano4m_cli.data.loader import TokenData
from nano4m_cli.dist import Work
from nano4m_cli.masking._base import Key
from nano4m_cli.probes._base import Probe as Base
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._pieces import nll_work
from nano4m_cli.probes._result import Findings, Metric, Plot, mean_metric
from nano4m_cli.spec import Layout

KIND = "eval"
FIT = 8192  # train samples that the marginals are counted on, at most
SHRINK = 32.0  # samples that a column's counts are worth which its vocabulary's frequencies bring in
NOTHING, OTHERS = "nothing", "all others"


class Marginals(NamedTuple):
    """(N, C): -log p of each id by frequencies of the train split, of its vocabulary and of its slot."""

    unigram: np.ndarray
    positional: np.ndarray


class Probe(Base):
    version = 2  # directions from nothing and from all others stand beside; the figures that were there are the same

    def measure(self, context: Context) -> Findings:
        layout, metrics = context.layout, []
        marginals = marginal_nll(context)
        shown, asked = context.run.mixture.draw(context.length_NM, Key(context.seed, "eval-mask", np.arange(context.n)))
        nll = context.slot_nll(shown, asked)
        for spec in layout.specs:
            name, columns = spec.modality, layout.slice(spec.modality)
            own, there = nll[:, columns], ~np.isnan(nll[:, columns])
            metrics.append(_metric(f"{name}/ce", own, marginals.unigram[:, columns], spec.vocab_size))
            metrics.append(_metric(f"{name}/bits", own, marginals.unigram[:, columns], spec.vocab_size, np.log(2)))
            positional = np.where(there, marginals.positional[:, columns], np.nan)
            metrics.append(_metric(f"{name}/positional_ce", positional, marginals.unigram[:, columns], spec.vocab_size))
            for q in range(spec.codebooks if spec.codebooks > 1 else 0):
                one = np.arange(columns.start + q, columns.stop, spec.codebooks)
                metrics.append(_metric(f"{name}/ce_codebook{q}", nll[:, one], marginals.unigram[:, one], spec.vocab_size))
        found = {}
        plans = [(s, t) for t in context.names for s in sources_of(context, t)]
        asks = [whole(context, sources, target) for sources, target in plans]
        works = [target_work(context, target, *ask) for (_, target), ask in zip(plans, asks, strict=True)]
        answers = context.answers("loss", works)
        for (sources, target), (_, asked), values in zip(plans, asks, answers, strict=True):
            name = context.direction(sources, target)
            spec = layout.specs[context.names.index(target)]
            one = _metric(f"{name}/ce", values, marginals.unigram[:, layout.slice(target)], spec.vocab_size)
            metrics.append(one.model_copy(update={"ceiling": ceiling(context, sources, target, asked)}))
            found[tuple(sources), target] = one.value
        plots = _plots(context, found, marginals, {m.name: m.value for m in metrics})
        return Findings(metrics, [
            "nats per token (bits: the same in bits); chance is the uniform guess over the modality's ids, majority the unigram "
            "distribution of the train split; positional_ce: its distribution slot by slot, a stronger baseline that knows no "
            "sample",
            "per modality: masks drawn as in training, with fixed seed; per direction: whole sources, the whole target; grids "
            "and codes in one pass, slot by slot independent, text from left to right",
            "ceiling: where the sources determine all that the target says, what its wording alone varies",
            "'->target' is from nothing: a model whose training posed no such question answers it by chance or worse",
            *context.model.notes,
        ], plots)


def sources_of(context: Context, target: str) -> list[list[str]]:
    """Return the sources of a target that are asked about: nothing, each other modality, all others."""
    rest = [n for n in context.names if n != target]
    plans = [[], *([s] for s in rest), *([rest] if len(rest) > 1 else [])]
    return [p for p in plans if context.model.reads(p, target)]


def whole(context: Context, sources: list[str], target: str) -> tuple[np.ndarray, np.ndarray]:
    """Return bool (shown_NC, asked_NC): sources shown whole, the target asked whole; samples that lack a source (or the target)
    are not asked."""
    has = np.ones(context.n, dtype=bool)
    for s in sources:
        has &= context.length_NM[:, context.names.index(s)] > 0
    return context.inside_NC & context.columns(*sources), context.inside_NC & context.columns(target) & has[:, None]


def ceiling(context: Context, sources: list[str], target: str, asked_NC: np.ndarray) -> float | None:
    """Return the lowest possible cross-entropy where the data set knows it and the sources determine all that the target says: 0
    for a label, for text the entropy of its wording."""
    info = context.info
    told = {a for s in sources for a in info.determined.get(s, [])}
    says = set(info.determined.get(target, []))
    if not says or not says <= told:
        return None
    if context.layout.specs[context.names.index(target)].slots == 1:
        return 0.0
    if (nats := info.wording.get(target)) is None:
        return None
    tokens_N = asked_NC.sum(1)
    own = [nats[len(label["objects"]) - 1] for label, n in zip(context.labels, tokens_N, strict=True) if n]
    return float(np.sum(own) / max(tokens_N.sum(), 1))


def marginal_nll(context: Context) -> Marginals:
    """Return what ids cost under the train split's frequencies: of their vocabulary (add one half), and of their slot, shrunk
    towards those."""
    layout: Layout = context.layout
    train = TokenData(context.dataset, context.run.config.data.train, context.names)
    ids, length = train.read(np.arange(min(len(train), FIT)))
    slot = np.concatenate([np.arange(s.slots) for s in layout.specs])
    inside = slot < length[:, layout.modality_C]
    unigram, positional = np.zeros(context.ids_NC.shape), np.zeros(context.ids_NC.shape)
    for g, (_, _, size) in enumerate(layout.groups):
        columns = np.flatnonzero(layout.group_C == g)
        counts = np.bincount(ids[:, columns][inside[:, columns]], minlength=size) + 0.5
        share = counts / counts.sum()
        unigram[:, columns] = -np.log(share)[context.ids_NC[:, columns]]
        for c in columns:
            own = np.bincount(ids[inside[:, c], c], minlength=size)
            p = (own + SHRINK * share) / (own.sum() + SHRINK)
            positional[:, c] = -np.log(p[context.ids_NC[:, c]])
    return Marginals(unigram, positional)


def unigram_nll(context: Context) -> np.ndarray:
    """Return (N, C): -log p of each id under its vocabulary's frequencies in the train split."""
    return marginal_nll(context).unigram


def target_work(context: Context, target: str, shown_NC: np.ndarray, asked_NC: np.ndarray) -> Work[np.ndarray]:
    """Ask for (N, slots): -log p of the target's slots. The answers of all directions are held at once, so no other slots are."""
    work = nll_work(context, shown_NC, asked_NC)
    return replace(work, join=lambda parts: work.join(parts)[:, context.layout.slice(target)].copy())


def _metric(name: str, nll: np.ndarray, marginal: np.ndarray, vocab: int, unit: float = 1.0) -> Metric:
    there = ~np.isnan(nll)
    counts = there.sum(1)
    means = np.where(there, nll, 0).sum(1) / np.maximum(counts, 1)
    return mean_metric(
        name, means / unit, counts, higher_is_better=False, unit="nats" if unit == 1 else "bits",
        chance=float(np.log(vocab) / unit),
        majority=float(marginal[there].mean() / unit) if there.any() else None,
    )


def _plots(context: Context, found: dict, marginals: Marginals, by_name: dict[str, float | None]) -> list[Plot]:
    """Return the direction matrices, and the baselines of every target in bits."""
    names = context.names
    rows = [NOTHING, *names, *([OTHERS] if len(names) > 2 else [])]

    def of(row: str, target: str) -> tuple[str, ...]:
        return {NOTHING: (), OTHERS: tuple(n for n in names if n != target)}.get(row, (row,))

    values = [[found.get((of(r, t), t)) for t in names] for r in rows]
    base = {}
    for t in names:
        columns = context.layout.slice(t)
        there = context.inside_NC[:, columns]
        base[t] = [float(m[:, columns][there].mean()) if there.any() else None for m in marginals]
    gain = [[None if v is None or not base[t][1] else 1 - v / base[t][1] for t, v in zip(names, row, strict=True)]
            for row in values]
    bits = lambda v: None if v is None else v / np.log(2)  # noqa: E731
    table = []
    for t, spec in zip(names, context.layout.specs, strict=True):
        direct = [found.get(((s,), t)) for s in names if s != t]
        direct = [v for v in direct if v is not None]
        table.append([bits(v) for v in (
            float(np.log(spec.vocab_size)), *base[t], by_name[f"{t}/ce"], found.get(((), t)), min(direct, default=None),
            found.get((of(OTHERS, t), t)) if len(names) > 2 else None,
        )])
    return [
        Plot(name="directions", title="Cross-entropy of the whole target given the whole source (nats per token)", kind="matrix",
             rows=rows, columns=names, values=values, x="target", y="source"),
        Plot(name="gains", title="Share of the positional marginal's cross-entropy that the source takes away", kind="matrix",
             rows=rows, columns=names, values=gain, x="target", y="source"),
        Plot(name="bits", title="Bits per token, from knowing nothing to knowing all others", kind="table", rows=names,
             columns=["uniform", "unigram", "positional marginal", "training masks", "from nothing", "best single source", OTHERS],
             values=table, x="bits per token", y="target"),
    ]
