"""How near a text is to another: BLEU and chrF, from counts per sample so that samples can be resampled."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from nano4m_cli.probes._result import resamples

WORDS, CHARACTERS = 4, 6  # longest n-grams
BETA = 2.0  # recall counts twice as much as precision


def words(text: str) -> list[str]:
    """Return words and punctuation marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _grams(items: Sequence[str], n: int) -> Counter:
    return Counter(tuple(items[i : i + n]) for i in range(len(items) - n + 1))


def bleu_counts(made: Sequence[str], truth: Sequence[str]) -> np.ndarray:
    """Return (N, 2 WORDS + 2): matches per n, n-grams made per n, words made, words of the truth."""
    rows = []
    for a, b in zip(map(words, made), map(words, truth), strict=True):
        mine, theirs = ([_grams(x, n) for n in range(1, WORDS + 1)] for x in (a, b))
        match = [(m & t).total() for m, t in zip(mine, theirs, strict=True)]
        rows.append([*match, *(m.total() for m in mine), len(a), len(b)])
    return np.array(rows, dtype=np.float64)


def bleu(counts_RK: np.ndarray) -> np.ndarray:
    """Return (R,): corpus BLEU (Papineni et al. 2002) of summed counts, one reference, not smoothed, in 0..1."""
    c = np.atleast_2d(counts_RK)
    match, total, made, truth = c[:, :WORDS], c[:, WORDS : 2 * WORDS], c[:, -2], c[:, -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(total > 0, match / np.maximum(total, 1), 0.0)
        short = np.where(made > 0, np.minimum(1.0 - truth / np.maximum(made, 1), 0.0), -np.inf)
        return np.exp(np.log(precision).mean(1) + short)


def bleu_interval(counts_NK: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Return (corpus BLEU, its 95 % bootstrap interval over samples)."""
    low, high = np.quantile(bleu(resamples(len(counts_NK)) @ counts_NK), [0.025, 0.975])
    return float(bleu(counts_NK.sum(0))[0]), (float(low), float(high))


def chrf(made: str, truth: str) -> float:
    """Return chrF (Popovic 2015) of one text, in 0..1: characters without spaces, n-grams up to 6, beta 2.

    Precision and recall are means over those n that both texts are long enough for; two empty texts are equal.
    """
    a, b = ("".join(x.split()) for x in (made, truth))
    if not a or not b:
        return float(a == b)
    parts = []
    for n in range(1, min(CHARACTERS, len(a), len(b)) + 1):
        mine, theirs = _grams(a, n), _grams(b, n)
        match = (mine & theirs).total()
        parts.append((match / mine.total(), match / theirs.total()))
    precision, recall = np.mean(parts, axis=0)
    return float((1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)) if precision > 0 else 0.0
