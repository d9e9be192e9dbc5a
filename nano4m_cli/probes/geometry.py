"""Geometry of frozen features: modality gap, effective rank, alignment and uniformity, similarity of modalities, by layer.

Each modality of a sample is shown alone and whole, and its tokens are averaged; the means of one sample are paired. Figures:

    gap         distance between two modalities' centroids over their spread (Liang et al. 2022, arXiv:2203.02053, look at the
                distance), by an estimator of the squared distance that is 0 on average where modalities do not differ.
    rank        effective rank exp(H) of the normalised singular values of centred features (Roy and Vetterli 2007).
    alignment   mean squared distance of a sample's two modalities on the unit sphere; uniformity: log mean exp(-2 d^2) between
                samples of one modality (Wang and Isola 2020, arXiv:2005.10242).
    cka         linear centred kernel alignment between two modalities over the samples (Kornblith et al. 2019,
                arXiv:1905.00414), of unbiased terms (Song et al. 2012): 0 on average where they are independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

from nano4m_cli.probes._base import Probe as Base
from nano4m_cli.probes._context import Context
from nano4m_cli.probes._features import Features
from nano4m_cli.probes._result import Findings, Metric, Plot

KIND = "probe"
MOST = 500  # samples
GROUPS = 20  # of samples at most, left out one after the other for intervals
FEWEST = 8
SLOW = {"cka": 8.0, "uniformity": 4.0, "rank": 2.0}  # times that a figure costs as much as others

Statistic = Callable[..., float]


class Probe(Base):
    def missing(self, context: Context) -> str | None:
        return None if context.n >= FEWEST else f"split '{context.split}' gives {context.n} samples, {FEWEST} are needed"

    def measure(self, context: Context) -> Findings:
        features = Features.of(context)
        own, before = self._layers(features)
        layers = len(next(iter(own.values())))
        pairs = list(combinations(context.names, 2))
        metrics: list[Metric] = []
        curves: dict[str, dict[str, list]] = {}

        def measured(statistic: Statistic, members: Sequence[str]) -> tuple[list, list[float]]:
            found = [jackknife(statistic, [own[m][y] for m in members]) for y in range(layers)]
            return found, [statistic(*(before[m][y] for m in members)) for y in range(layers)]

        asked: list[tuple[str, Statistic, Sequence[str], dict]] = []
        for m in context.names:
            asked += [("rank", effective_rank, [m], {}), ("uniformity", uniformity, [m], {"higher_is_better": False})]
        for a, b in pairs:
            asked += [("gap", gap, [a, b], {"higher_is_better": False, "unit": "spreads"}),
                      ("alignment", alignment, [a, b], {"higher_is_better": False}), ("cka", cka, [a, b], {})]
        costs = [SLOW.get(what, 1.0) for what, *_ in asked]
        told = context.spread("geometry", asked, lambda item: measured(item[1], item[2]), costs)
        for (what, _, members, more), (found, base) in zip(asked, told, strict=True):
            (value, interval), row = found[-1], ", ".join(members)
            metrics.append(Metric(name=f"{'+'.join(members)}/{what}", value=value, ci95=interval, n=len(own[members[0]][0]),
                                  chance=base[-1], **more))
            curves.setdefault(what, {})[row] = found
            curves.setdefault(f"{what}-untrained", {})[row] = [(b, (None, None)) for b in base]
        plots = [_matrix(context.names, metrics, what) for what in ("gap", "cka") if pairs]
        plots += [_curve(what, of) for what, of in curves.items()]
        return Findings(metrics, [
            f"means over the tokens of the encoder's layers; figures are of the last layer, on {min(context.n, MOST)} samples; "
            f"intervals by leaving out one of {min(GROUPS, context.n)} groups of samples after the other",
            "chance: the same figure of the same model before any training (of another seed)",
            *(["the modalities of a sample share their class only: alignment and cka tell of classes"]
              if context.info.pairing == "class" else []),
        ], plots)

    def _layers(self, features: Features) -> list[dict[str, list[np.ndarray]]]:
        """Return per modality and layer (N, D) float64, of the run and of the same model before any training."""
        context = features.context
        n = min(context.n, MOST)
        asked = [(m, untrained) for untrained in (False, True) for m in context.names]
        costs = [float(context.columns(m).sum()) for m, _ in asked]
        found = context.spread("features", asked, lambda item: [x[:n] for x in features.scored(*item)], costs)
        own = dict(zip(asked, found, strict=True))
        return [{m: [x.astype(np.float64) for x in own[m, untrained]] for m in context.names} for untrained in (False, True)]


def jackknife(statistic: Statistic, x: Sequence[np.ndarray], groups: int = GROUPS) -> tuple[float, tuple[float, float]]:
    """Return (statistic of paired samples, its 95 % interval by leaving groups of samples out)."""
    whole, n = statistic(*x), len(x[0])
    groups = min(groups, n)
    left = np.array([statistic(*(a[np.arange(n) % groups != g] for a in x)) for g in range(groups)])
    error = float(np.sqrt((groups - 1) / groups * ((left - left.mean()) ** 2).sum()))
    return whole, (whole - 1.96 * error, whole + 1.96 * error)


def effective_rank(x_ND: np.ndarray) -> float:
    """Return exp of the entropy of the singular values' shares, between 1 and D; of features that do not vary, 0."""
    s = np.linalg.svd(x_ND - x_ND.mean(0), compute_uv=False)
    if s.sum() <= 1e-12 * max(np.abs(x_ND).max(), 1e-30) * len(x_ND):
        return 0.0
    p = s / s.sum()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def gap(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """Return the distance between centroids over the root mean squared distance of features from their own centroid.

    The squared distance is the mean over pairs of different samples i, j of (a_i - b_i) . (a_j - b_j), free of what two finite
    samples of one distribution lie apart; where it comes out negative, the distance is 0.
    """
    d, n = a_ND - b_ND, len(a_ND)
    squared = ((d.sum(0) ** 2).sum() - (d**2).sum()) / (n * (n - 1))
    within = (a_ND.var(0, ddof=1).sum() + b_ND.var(0, ddof=1).sum()) / 2
    return float(np.sqrt(max(squared, 0.0) / within)) if within > 0 else (0.0 if squared <= 0 else float("inf"))


def alignment(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """Return the mean squared distance of paired unit vectors, between 0 and 4."""
    return float(((_unit(a_ND) - _unit(b_ND)) ** 2).sum(1).mean())


def uniformity(x_ND: np.ndarray, t: float = 2.0) -> float:
    """Return log of the mean of exp(-t d^2) over pairs of different samples' unit vectors; 0 where all are alike."""
    x = _unit(x_ND)
    squared = (2 - 2 * x @ x.T)[np.triu_indices(len(x), 1)]
    return float(np.log(np.exp(-t * np.maximum(squared, 0)).mean()))


def cka(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """Return the linear CKA of paired samples, of unbiased HSIC terms."""
    k, l = ((x - x.mean(0)) @ (x - x.mean(0)).T for x in (a_ND, b_ND))
    scale = hsic(k, k) * hsic(l, l)
    return float(hsic(k, l) / np.sqrt(scale)) if scale > 0 else 0.0


def hsic(k_NN: np.ndarray, l_NN: np.ndarray) -> float:
    """Return the unbiased estimator of the Hilbert-Schmidt independence criterion (Song et al. 2012, equation 5)."""
    n = len(k_NN)
    k, l = (x - np.diag(np.diag(x)) for x in (k_NN, l_NN))
    total = (k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ l.sum(0))
    return float(total / (n * (n - 3)))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


TITLES = {"rank": "effective rank", "uniformity": "uniformity (lower: more spread out)", "gap": "modality gap, in spreads",
          "alignment": "squared distance of a sample's two modalities", "cka": "linear CKA"}


def _matrix(names: Sequence[str], metrics: Sequence[Metric], what: str) -> Plot:
    """Return a matrix of a figure of pairs at the last layer, each pair once."""
    found = {m.name: m.value for m in metrics}
    return Plot(name=f"{what}-last", title=f"{TITLES[what]} of two modalities, last layer", kind="matrix", rows=list(names[:-1]),
                columns=list(names[1:]), values=[[found.get(f"{a}+{b}/{what}") for b in names[1:]] for a in names[:-1]])


def _curve(name: str, of: dict[str, list]) -> Plot:
    what, _, untrained = name.partition("-")
    title = f"{TITLES[what]}, by layer" + (" of the model before any training" if untrained else "")
    ends = lambda i: [[interval[i] for _, interval in row] for row in of.values()]  # noqa: E731
    return Plot(
        name=name, title=title, kind="curve", rows=list(of), columns=list(range(len(next(iter(of.values()))))), x="layer",
        y=TITLES[what], values=[[v for v, _ in row] for row in of.values()], low=ends(0), high=ends(1),
    )
