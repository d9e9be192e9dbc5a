"""Distances between sets of features, and what is known of their error from the samples alone.

Both need features of some network: a figure carries its name (here: the data set's own judge), and figures of different
networks do not compare.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

BLOCKS = 20
Distance = Callable[[np.ndarray, np.ndarray], float]


def frechet(x_ND: np.ndarray, y_MD: np.ndarray) -> float:
    """Return the Frechet distance of two normal distributions fitted to features.

    FID (Heusel et al. 2017) and FAD (Kilgour et al. 2019) are this distance in features of a network of pictures or sound:
    |mean x - mean y|^2 + tr(Cx) + tr(Cy) - 2 tr((Cx Cy)^(1/2)); the last trace is the sum of singular values of X Y', of centred
    features over the root of their number less one, so no root of an ill-conditioned product is taken. It is biased upwards
    at small n: only distances at equal n compare.
    """
    x, y = (a - a.mean(0) for a in (x_ND, y_MD))
    x, y = x / np.sqrt(len(x) - 1), y / np.sqrt(len(y) - 1)
    spread = float((x**2).sum() + (y**2).sum())
    x, y = (np.linalg.qr(a, mode="r") if len(a) > a.shape[1] else a for a in (x, y))
    shared = float(np.linalg.svd(x @ y.T, compute_uv=False).sum())
    return max(float(((x_ND.mean(0) - y_MD.mean(0)) ** 2).sum()) + spread - 2 * shared, 0.0)


def kernel_mmd(x_ND: np.ndarray, y_MD: np.ndarray) -> float:
    """Return the squared maximum mean discrepancy with kernel (x.y / D + 1)^3, unbiased (KID: Binkowski et al. 2018)."""
    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1.0) ** 3

    def within(a: np.ndarray) -> float:
        k = kernel(a, a)
        return (k.sum() - np.trace(k)) / (len(a) * (len(a) - 1))

    return float(within(x_ND) + within(y_MD) - 2 * kernel(x_ND, y_MD).mean())


def across_halves(distance: Distance, made_ND: np.ndarray, real_ND: np.ndarray) -> float:
    """Return the mean of both distances from one half of what was made to the other half of what is real.

    Rows belong together, so the two sides of a distance never share a scene: what was made from a scene is near to it.
    """
    (a, b), (c, d) = ((x[::2], x[1::2]) for x in (made_ND, real_ND))
    return (distance(a, d) + distance(b, c)) / 2


def jackknifed(statistic: Callable[[np.ndarray], float], n: int, blocks: int = BLOCKS) -> tuple[float, tuple[float, float] | None]:
    """Return (value, 95 % interval) of a statistic of rows (indices) by the delete-a-block jackknife (Kuensch 1989).

    Bootstrap samples repeat rows, which such distances take for something shared; leaving rows out does not. Rows fall to
    blocks in pairs of neighbours, so that halves by even and odd keep their sizes. Fewer than four rows a block: no interval.
    """
    rows = np.arange(n)
    value = statistic(rows)
    blocks = min(blocks, n // 4)
    if blocks < 5:
        return value, None
    part = np.array([statistic(rows[rows // 2 % blocks != b]) for b in range(blocks)])
    error = 1.96 * float(np.sqrt((blocks - 1) / blocks * ((part - part.mean()) ** 2).sum()))
    return value, (value - error, value + error)
