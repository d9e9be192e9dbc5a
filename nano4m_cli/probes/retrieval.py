"""Finding the partner among many: the sample itself or one of its class, by PMI, by likelihood and by pooled features."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from nano4m_cli.dist import Work
from nano4m_cli.probes._base import Probe as Base
from nano4m_cli.probes._classes import classes_of, rounded
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._pieces import candidate_work, chunks, text_work
from nano4m_cli.probes._result import Findings, Metric, Plot, mean_metric
from nano4m_cli.probes._significance import holm, permutation_p

KIND = "eval"
GALLERY = 200
TEXT_GALLERY = 50  # texts are scored one by one
DIGITS = 3  # log-likelihoods of whole targets that agree so far are ties: the rest is rounding
KS = (1, 5, 10)
WAYS = {"": "PMI", "likelihood_": "likelihood", "features_": "pooled features"}
ALPHA = 0.05


@dataclass
class Found:
    """Figures of one kind of score, and what their significance needs: hits[q, g] if query q's right candidates were group g."""

    metrics: list[Metric] = field(default_factory=list)
    p: dict[str, float] = field(default_factory=dict)


class Probe(Base):
    version = 2  # ties count at expectation (they counted against the model); r1 is of the sample itself only, class_r1 of a class

    def missing(self, context: Context) -> str | None:
        if len(context.names) == 1:
            return "the run has one modality only"
        if not context.model.at_once:
            return "a model that reads slot by slot cannot score all candidates at once"
        return None if context.n > 1 else "a gallery needs two samples at least"

    def measure(self, context: Context) -> Findings:
        found, notes = Found(), []
        pairs = [(s, t) for t in context.names for s in context.names if s != t]
        pooled = features(context) if _pools(context) else {}
        alike: dict[str, list[str]] = {}
        score = context.answers("retrieval", [likelihood_work(context, s, t) for s, t in pairs])
        ranked = context.spread("ranks", list(zip(pairs, score, strict=True)), lambda item: self._pair(context, *item, pooled))
        for (source, target), (one, what) in zip(pairs, ranked, strict=True):
            found.metrics += one.metrics
            found.p |= one.p
            if what is not None:
                alike.setdefault(what, []).append(context.direction([source], target))
        adjusted = dict(zip(found.p, holm(np.array(list(found.p.values()))), strict=True))
        beyond = sum(p < ALPHA for p in adjusted.values())
        n, few = min(GALLERY, context.n), min(TEXT_GALLERY, context.n)
        notes = [
            f"gallery: the first {n} samples ({few} where text is ranked), each both query and candidate; r1, r5, r10: share of "
            "queries with a right candidate among so many; mrr: mean of 1 / rank of the first right one; equal scores count at "
            "expectation, as if in random order",
            "r1 by PMI (what a candidate is likelier given this source than given the gallery's sources on average), "
            "likelihood_r1 by likelihood, features_r1 by the cosine of mean encoder tokens of source and target, each alone and "
            "whole, centred per modality over the gallery",
            "r1: right is the sample itself" if context.info.pairing == "instance" else
            f"instance retrieval is not defined on '{context.dataset.name}': its modalities are paired by class only, so the "
            "sample's own partner is no better than any other of its class",
            *(f"class_r1: right is any candidate alike in {what}"
              + (f" ({', '.join(names)})" if len(alike) > 1 else "") for what, names in alike.items()),
            "ceiling: where source and target share labelled attributes only, samples alike in them cannot be told apart",
            "grids and codes are scored in one pass, slot by slot independent given the source",
            f"{beyond} of {len(adjusted)} figures are above chance at {ALPHA:g} after Holm's correction over all of them "
            "(one-sided, by permuting which candidates are right for which query)",
            *([] if pooled else ["pooled features are read from models with an encoder of their own"]),
        ]
        return Findings(found.metrics, notes, _plots(context, found.metrics, adjusted, pairs))

    def _pair(
        self, context: Context, pair: tuple[str, str], score: np.ndarray, pooled: dict[str, np.ndarray]
    ) -> tuple[Found, str | None]:
        """Return a direction's figures, and what samples are alike in, where any are."""
        (source, target), n, found, alike = pair, len(score), Found(), None
        scores = {"": pmi_of(score), "likelihood_": score}
        if pooled:
            scores["features_"] = cosines(pooled[source][:n], pooled[target][:n])
        kinds = {}
        if context.info.pairing == "instance":
            kinds[""] = np.arange(n)
        if (known := classes_of(context, source, target, n)) is not None and len(np.unique(known[0])) > 1:
            kinds["class_"] = np.unique(known[0], return_inverse=True)[1]
            alike = known[1]
        for how, group in kinds.items():
            for way, s in scores.items():
                self._figures(context, found, source, target, way, how, s, group)
        return found, alike

    def _figures(
        self, context: Context, found: Found, source: str, target: str, way: str, how: str, score: np.ndarray, group: np.ndarray
    ) -> None:
        name, n = context.direction([source], target), len(score)
        hits = Hits(rounded(score, DIGITS if way != "features_" else 5), group)
        for k in (*KS, None):
            if k is not None and k >= n:
                continue
            table = hits.reciprocal() if k is None else hits.at(k)
            bound = None
            if k is not None:
                bound = ceiling_at(context, source, target, n, k) if not how else (
                    1.0 if context.info.determined else None)
            metric = mean_metric(
                f"{name}/{way}{how}{'mrr' if k is None else f'r{k}'}", table[np.arange(n), group], ceiling=bound,
                chance=float(hits.chance(k)[group].mean()),
            )
            found.metrics.append(metric)
            found.p[metric.name] = permutation_p(table[:, group])


class Hits:
    """How well each query's ranking would do if a group of candidates were the right ones; ties at expectation.

    Args:
        score_QN: rounded scores. group_N: the group of each candidate (of as many as there are queries).
    """

    def __init__(self, score_QN: np.ndarray, group_N: np.ndarray):
        n, groups = score_QN.shape[1], int(group_N.max()) + 1
        self.n, self.size_G = n, np.bincount(group_N, minlength=groups)
        best_QG = np.full((len(score_QN), groups), -np.inf)
        np.maximum.at(best_QG.T, group_N, score_QN.T)
        ordered = np.sort(score_QN, 1)
        self.above_QG, self.tied_QG, self.right_QG = (np.zeros(best_QG.shape, dtype=np.int64) for _ in range(3))
        for q in range(len(score_QN)):
            self.above_QG[q] = n - np.searchsorted(ordered[q], best_QG[q], side="right")
            self.tied_QG[q] = n - np.searchsorted(ordered[q], best_QG[q], side="left") - self.above_QG[q]
            self.right_QG[q] = np.bincount(group_N, score_QN[q] == best_QG[q][group_N], minlength=groups)

    def at(self, k: int) -> np.ndarray:
        """Return (Q, G): the probability that one of the first k is right, equal scores in random order."""
        return 1 - missed(self.tied_QG, self.right_QG, np.clip(k - self.above_QG, 0, None))

    def reciprocal(self) -> np.ndarray:
        """Return (Q, G): the expected reciprocal rank of the first right candidate."""
        return _reciprocal(self.above_QG, self.tied_QG, self.right_QG)

    def chance(self, k: int | None) -> np.ndarray:
        """Return (G,): the same of a ranking at random (k None: the reciprocal rank)."""
        if k is None:
            return _reciprocal(np.zeros_like(self.size_G), np.full_like(self.size_G, self.n), self.size_G)
        return 1 - missed(np.full_like(self.size_G, self.n), self.size_G, np.full_like(self.size_G, k))


def missed(total: np.ndarray, right: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Return the probability that none of so many draws (without replacement) among `total` is one of the `right`."""
    out = np.ones(np.broadcast(total, right, draws).shape)
    for i in range(int(draws.max(initial=0))):
        here = i < np.minimum(draws, total)
        if not here.any():
            break
        out *= np.where(here, np.clip(total - right - i, 0, None) / np.maximum(total - i, 1), 1.0)
    return out


def _reciprocal(above: np.ndarray, tied: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return E[1 / (above + position of the first right one among the tied, in random order)]."""
    out, left = np.zeros(np.shape(above)), np.ones(np.shape(above))  # left: none was right so far
    for j in range(int((tied - right).max(initial=0)) + 1):
        hit = left * right / np.maximum(tied - j, 1)
        out += np.where(j <= tied - right, hit / (above + j + 1), 0.0)
        left = np.where(j < tied - right, left - hit, 0.0)
    return out


# -- scores -------------------------------------------------------------------------------------------------------


def likelihood_work(context: Context, source: str, target: str) -> Work[np.ndarray]:
    """Ask for (queries, candidates): log p of each candidate's target given each query's source."""
    spec = context.layout.specs[context.names.index(target)]
    if spec.kind == "sequence":
        n = min(TEXT_GALLERY, context.n)
        texts = context.ids(target)[:n]
        # Equal texts are scored once: their scores are then equal to the last bit.
        first = {t.tobytes(): i for i, t in reversed(list(enumerate(texts)))}
        place = {key: j for j, key in enumerate(first)}
        some = [texts[i] for i in first.values()]
        work = text_work(context, [source], target, some * n, np.repeat(np.arange(n), len(some)))

        def join(parts: list[np.ndarray]) -> np.ndarray:
            score = work.join(parts).reshape(n, -1)
            return (score * np.array([len(t) for t in some]))[:, [place[t.tobytes()] for t in texts]]

        return replace(work, join=join)
    n = min(GALLERY, context.n)
    shown = (context.inside_NC & context.columns(source))[:n]
    return candidate_work(context, shown, target, context.ids_NC[:n, context.layout.slice(target)])


def pmi_of(score: np.ndarray) -> np.ndarray:
    """Return log p(candidate | source) less the log of its mean over the gallery's sources."""
    top = score.max(0, keepdims=True)
    return score - (top + np.log(np.exp(score - top).mean(0, keepdims=True)))


def _pools(context: Context) -> bool:
    return context.model.encodes and hasattr(context.model, "encode")


def features(context: Context) -> dict[str, np.ndarray]:
    """Return per modality (n, D): the mean of the encoder's tokens of each gallery sample with it alone shown, whole."""
    n = min(GALLERY, context.n)

    def part(name: str, rows: np.ndarray) -> np.ndarray:
        shown = context.inside_NC[rows] & context.columns(name)
        packed = context.pack(context.ids_NC[rows], shown, np.zeros_like(shown))
        with torch.inference_mode():
            x = context.model.encode(packed).float().cpu()
        row = torch.repeat_interleave(torch.arange(packed.samples), packed.enc.lengths.cpu())
        own = packed.enc_col.cpu() >= 0  # a register is no token of the sample
        total = torch.zeros(packed.samples, x.shape[1]).index_add(0, row[own], x[own])
        count = torch.bincount(row[own], minlength=packed.samples).clamp_min(1)
        return (total / count[:, None]).double().numpy()

    parts = [(name, rows) for name in context.names for rows in chunks(n)]
    costs = [float((context.inside_NC[rows] & context.columns(name)).sum()) for name, rows in parts]
    found = context.spread("pooled features", parts, lambda item: part(*item), costs)
    return {name: np.concatenate([x for (m, _), x in zip(parts, found, strict=True) if m == name]) for name in context.names}


def cosines(query_ND: np.ndarray, candidate_ND: np.ndarray) -> np.ndarray:
    """Return (n, n) cosines of features, each modality centred by its mean over the gallery (which takes the gap between
    modalities away); 0 where nothing is left of one."""
    def unit(x: np.ndarray) -> np.ndarray:
        x = x - x.mean(0)
        length = np.linalg.norm(x, axis=1, keepdims=True)
        return np.where(length > 1e-9, x / np.maximum(length, 1e-9), 0.0)

    return unit(query_ND) @ unit(candidate_ND).T


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


# -- what is drawn ------------------------------------------------------------------------------------------------


def _plots(context: Context, metrics: list[Metric], adjusted: dict[str, float], pairs: list[tuple[str, str]]) -> list[Plot]:
    by_name = {m.name: m for m in metrics}
    names, plots = context.names, []
    value = lambda s, t, what: m.value if (m := by_name.get(f"{context.direction([s], t)}/{what}")) else None  # noqa: E731
    for how, text in (("", "the sample itself"), ("class_", "any sample alike")):
        for way, by in WAYS.items():
            values = [[None if s == t else value(s, t, f"{way}{how}r1") for t in names] for s in names]
            if any(v is not None for row in values for v in row):
                plots.append(Plot(name=f"{way}{how}r1", title=f"R@1 of {text}, by {by}", kind="matrix", rows=names, columns=names,
                                  values=values, x="target (candidates)", y="source (queries)"))
    figures = list(dict.fromkeys(m.name.split("/")[1] for m in metrics))
    if figures:
        rows = [context.direction([s], t) for s, t in pairs]
        plots.append(Plot(
            name="significance", title="p that chance does as well (Holm-corrected over all figures of this table)", kind="table",
            rows=rows, columns=figures, values=[[adjusted.get(f"{r}/{f}") for f in figures] for r in rows], y="direction",
        ))
    return plots
