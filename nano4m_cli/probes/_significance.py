"""Whether figures are more than chance: permutation tests, and the correction for having looked at many."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from nano4m_cli.rng import generator

MOST = 20_000  # permutations
ENOUGH = 50  # as extreme ones, after which a test ends (Besag and Clifford 1991)
CLEAR = 1e-7  # below this a bound says all that permutations could


def permutation_p(table_QN: np.ndarray, seed: int = 0) -> float:
    """Return the one-sided p of sum_q table[q, q] against sum_q table[q, pi(q)], pi a random permutation.

    Args:
        table_QN: (n, n) in [0, 1]: how well query q does if what is right for query j were right for it.

    Where Chatterjee's bound for such sums (2007, PTRF 138:305, Proposition 1.1: 2 exp(-t^2 / (4 E + 2 t)), t above the mean E)
    is below CLEAR, it is the answer; else permutations are drawn until ENOUGH reach the observed sum.
    """
    n = len(table_QN)
    observed, mean = float(np.trace(table_QN)), float(table_QN.sum() / n)
    above = observed - mean
    if above > 0 and (bound := 2 * np.exp(-above**2 / (4 * mean + 2 * above))) < CLEAR:
        return float(bound)
    extreme, drawn, flat = 0, 0, np.ascontiguousarray(table_QN, dtype=np.float64).ravel()
    while drawn < MOST:
        sums = flat[_permutations(n, seed, drawn // 1000) + np.arange(n) * n].sum(1)
        reached = np.flatnonzero(sums >= observed - 1e-9)
        if extreme + len(reached) >= ENOUGH:
            return ENOUGH / (drawn + int(reached[ENOUGH - extreme - 1]) + 1)
        extreme, drawn = extreme + len(reached), drawn + len(sums)
    return (extreme + 1) / (drawn + 1)


@lru_cache(maxsize=48)
def _permutations(n: int, seed: int, part: int) -> np.ndarray:
    """Return 1,000 permutations (1000, n)."""
    marks = generator(seed, f"permutation/{n}", part).random((1000, n))
    return np.argsort(marks, 1)


def holm(p_N: np.ndarray) -> np.ndarray:
    """Return p values corrected for being looked at together (Holm 1979): the k-th smallest times N - k + 1, never falling."""
    n = len(p_N)
    order = np.argsort(p_N, kind="stable")
    out = np.empty(n)
    out[order] = np.minimum(np.maximum.accumulate(p_N[order] * (n - np.arange(n))), 1.0)
    return out
