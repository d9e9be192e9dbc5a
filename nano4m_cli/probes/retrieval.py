"""Finding the partner among many: one modality ranks another by conditional likelihood and by PMI."""

from __future__ import annotations

from collections import Counter

import numpy as np

from nano4m_cli.probes._base import Probe as Base
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._result import Findings, mean_metric

KIND = "eval"
GALLERY = 200
TEXT_GALLERY = 50  # texts are scored one by one


class Probe(Base):
    def missing(self, context: Context) -> str | None:
        if len(context.names) == 1:
            return "the run has one modality only"
        return None if context.model.at_once else "a model that reads slot by slot cannot score all candidates at once"

    def measure(self, context: Context) -> Findings:
        metrics = []
        pairs = [(s, t) for t in context.names for s in context.names if s != t]
        for i, (source, target) in enumerate(pairs):
            context.progress(f"retrieval {source}->{target}", i, len(pairs))
            score = likelihoods(context, source, target)
            # PMI: what a candidate is likelier given this source than given the gallery's sources on average.
            top = score.max(0, keepdims=True)
            pmi = score - (top + np.log(np.exp(score - top).mean(0, keepdims=True)))
            relevant = relevance(context, len(score))
            name = context.direction([source], target)
            bounds = {k: {"chance": float(chance_at(relevant, k).mean()),
                          "ceiling": ceiling_at(context, source, target, len(score), k)} for k in (1, 5)}
            for kind, s in (("", pmi), ("likelihood_", score)):
                best = best_rank(s, relevant)
                metrics += [mean_metric(f"{name}/{kind}r{k}", best <= k, **bound) for k, bound in bounds.items()]
        what = "the sample itself" if context.info.pairing == "instance" else "any candidate of the same class"
        return Findings(metrics, [
            f"gallery: the first {min(GALLERY, context.n)} samples ({min(TEXT_GALLERY, context.n)} where text is ranked); "
            f"right is {what}; ties count against the model; r1, r5 by PMI, likelihood_r1, likelihood_r5 by likelihood",
            "ceiling: where source and target share labelled attributes only, samples alike in them cannot be told apart",
            "grids and codes are scored in one pass, slot by slot independent given the source",
        ])


def likelihoods(context: Context, source: str, target: str) -> np.ndarray:
    """Return (queries, candidates): log p of each candidate's target given each query's source."""
    spec = context.layout.specs[context.names.index(target)]
    if spec.kind == "sequence":
        n = min(TEXT_GALLERY, context.n)
        texts = context.ids(target)[:n]
        owner = np.repeat(np.arange(n), n)
        score = context.text_logp([source], target, texts * n, owner).reshape(n, n)
        return score * np.array([len(t) for t in texts])
    n = min(GALLERY, context.n)
    shown = (context.inside_NC & context.columns(source))[:n]
    return context.candidate_logp(shown, target, context.ids_NC[:n, context.layout.slice(target)])


def relevance(context: Context, n: int) -> np.ndarray:
    """Return bool (n, n): which candidates are right for which query; a class is the first attribute of all objects, in order."""
    if context.info.pairing == "instance":
        return np.eye(n, dtype=bool)
    first = next(iter(context.attributes))
    value = np.array(["\n".join(v) for v in context.values(first)[:n]])
    return value[:, None] == value


def best_rank(score: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Return per query the rank (from 1) of its best right candidate; equal scores (and all, where it is NaN) rank before it."""
    score = np.where(np.isnan(score), -np.inf, score)
    best = np.where(relevant, score, -np.inf).max(1)
    return 1 + ((score >= best[:, None]) & ~relevant).sum(1)


def chance_at(relevant: np.ndarray, k: int) -> np.ndarray:
    """Return per query the probability that one of k random candidates is right."""
    n, r = relevant.shape[1], relevant.sum(1)
    miss = np.ones(len(relevant))
    for i in range(min(k, n)):
        miss *= np.clip(n - r - i, 0, None) / (n - i)
    return 1 - miss


def ceiling_at(context: Context, source: str, target: str, n: int, k: int) -> float | None:
    """Return the best possible R@k among the first n samples, where source and target share labelled attributes only.

    Among m samples alike in every attribute that both determine, the right one is found in k tries with min(1, k / m).
    """
    info = context.info
    if info.pairing != "instance" or not {source, target} & set(info.through_labels):
        return None
    shared = [a for a in info.determined.get(source, []) if a in info.determined.get(target, [])]
    kinds = [tuple(tuple(thing[a] for a in shared) for thing in label["objects"]) for label in context.labels[:n]]
    alike = Counter(kinds)
    return float(np.mean([min(1.0, k / alike[kind]) for kind in kinds]))
