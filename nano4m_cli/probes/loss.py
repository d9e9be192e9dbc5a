"""Cross-entropy in nats per token, per modality by fixed masks and per direction from a whole source."""

from __future__ import annotations

import numpy as np

from nano4m_cli.data.loader import TokenData
from nano4m_cli.masking._base import Key
from nano4m_cli.probes._base import Probe as Base
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._result import Findings, Metric, mean_metric

KIND = "eval"


class Probe(Base):
    def measure(self, context: Context) -> Findings:
        layout, metrics = context.layout, []
        shown, asked = context.run.mixture.draw(context.length_NM, Key(context.seed, "eval-mask", np.arange(context.n)))
        nll = context.slot_nll(shown, asked)
        marginal = unigram_nll(context)
        for spec in layout.specs:
            columns = layout.slice(spec.modality)
            metrics.append(_metric(f"{spec.modality}/ce", nll[:, columns], marginal[:, columns], spec.vocab_size))
        for target in context.names:
            for source in context.names:
                if source == target or not context.model.reads([source], target):
                    continue
                shown = context.inside_NC & context.columns(source)
                asked = context.inside_NC & context.columns(target)
                columns = layout.slice(target)
                values = context.slot_nll(shown, asked)[:, columns]
                spec = layout.specs[context.names.index(target)]
                name = f"{context.direction([source], target)}/ce"
                metrics.append(_metric(name, values, marginal[:, columns], spec.vocab_size))
        return Findings(metrics, [
            "chance is the uniform guess over the modality's ids, majority the unigram distribution of the train split",
            "per modality: masks drawn as in training, with fixed seed; per direction: one whole source, the whole target",
            *context.model.notes,
        ])


def unigram_nll(context: Context) -> np.ndarray:
    """Return (N, C): -log p of each id under its column's vocabulary frequencies in the train split (add one half)."""
    layout = context.layout
    train = TokenData(context.dataset, context.run.config.data.train, context.names)
    out = np.zeros(context.ids_NC.shape)
    ids, length = train.read(np.arange(min(len(train), 8192)))
    slot = np.concatenate([np.arange(s.slots) for s in layout.specs])
    inside = slot < length[:, layout.modality_C]
    for g, (_, _, size) in enumerate(layout.groups):
        columns = np.flatnonzero(layout.group_C == g)
        counts = np.bincount(ids[:, columns][inside[:, columns]], minlength=size) + 0.5
        out[:, columns] = -np.log(counts / counts.sum())[context.ids_NC[:, columns]]
    return out


def _metric(name: str, nll: np.ndarray, marginal: np.ndarray, vocab: int) -> Metric:
    there = ~np.isnan(nll)
    counts = there.sum(1)
    means = np.where(there, nll, 0).sum(1) / np.maximum(counts, 1)
    return mean_metric(
        name, means, counts, higher_is_better=False, unit="nats", chance=float(np.log(vocab)),
        majority=float(marginal[there].mean()) if there.any() else None,
    )
