"""Paired differences: interval, effect size, p-value."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nano4m_cli.probes._result import resamples


@dataclass(frozen=True)
class Difference:
    """Of two (weighted) means over the same samples: other - base.

    n: samples that count in either. effect: Cohen's d of paired samples, the difference over the standard deviation of the
    samples' own differences (None: they do not vary). p: two-sided, of a paired t-test.
    """

    base: float
    other: float
    value: float
    ci95: tuple[float, float]
    effect: float | None
    p: float
    n: int


def paired(base: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], seed: int = 0) -> Difference | None:
    """Compare two figures, each (values (N,), weights (N,)), sample by sample; None where either counts nothing.

    The interval is a bootstrap over samples, drawn for both alike. The test is a t-test of the samples' influences on the two
    weighted means (equal weights: of their differences), since a bootstrap of a thousand cannot tell the small p-values that
    a correction for hundreds of figures asks for.
    """
    weight = np.stack([base[1], other[1]]).astype(np.float64)
    keep = (weight > 0).any(0)
    weight = weight[:, keep]
    if not keep.any() or (weight.sum(1) <= 0).any():
        return None
    value = np.where(weight > 0, np.stack([base[0], other[0]]).astype(np.float64)[:, keep], 0.0)
    n = weight.shape[1]
    mean = (value * weight).sum(1) / weight.sum(1)
    difference = float(mean[1] - mean[0])
    draws = resamples(n, seed)
    below = draws @ weight.T
    some = (below > 0).all(1)
    ratio = (draws @ (value * weight).T)[some] / below[some]
    low, high = np.quantile(ratio[:, 1] - ratio[:, 0], [0.025, 0.975])
    influence = weight * (value - mean[:, None]) / weight.mean(1, keepdims=True)
    spread = float(np.std(influence[1] - influence[0], ddof=1)) if n > 1 else 0.0
    if spread <= 1e-12 * max(1.0, float(np.abs(mean).max())):  # what rounding leaves of samples that all differ alike
        same = abs(difference) <= 1e-12 * max(1.0, float(np.abs(mean).max()))
        p, effect = (1.0, 0.0) if same or n < 2 else (0.0, None)
        return Difference(*map(float, mean), 0.0 if same else difference, (float(low), float(high)), effect, p, n)
    p = student_p(difference / (spread / math.sqrt(n)), n - 1)
    return Difference(*map(float, mean), difference, (float(low), float(high)), difference / spread, p, n)


def student_p(t: float, freedom: float) -> float:
    """Return the two-sided p-value of Student's t."""
    return beta_inc(freedom / 2, 0.5, freedom / (freedom + t * t))


def beta_inc(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22; Lentz's method)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges quickly
        return 1.0 - beta_inc(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    tiny, c, d, total = 1e-300, 1.0, 0.0, 1.0
    for k in range(1000):
        m = k // 2
        if k == 0:
            term = 1.0
        elif k % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1.0 + term * d
        d = 1.0 / (d if abs(d) > tiny else tiny)
        c = 1.0 + term / (c if abs(c) > tiny else tiny)
        total *= c * d
        if abs(1.0 - c * d) < 1e-14:
            break
    return front * (total - 1.0)
