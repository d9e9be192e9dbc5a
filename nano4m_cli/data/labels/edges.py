"""Edges of the picture by Canny's method (Canny 1986): gradient, thinning, hysteresis."""

from __future__ import annotations

import numpy as np

from nano4m_cli.data.labels import _base

LOW, HIGH = 0.05, 0.15  # of the steepest possible step, as gradient magnitude
BLUR = np.array([1.0, 4.0, 6.0, 4.0, 1.0]) / 16  # near a Gaussian of sigma 1


class Label(_base.Label):
    needs = ("rgb",)

    def make(self, raw: dict) -> np.ndarray:
        return canny(raw["rgb"])


def canny(picture: np.ndarray) -> np.ndarray:
    """Return uint8 (H, W), 255 on edges of brightness of a uint8 (H, W, 3) picture."""
    grey = picture.astype(np.float64) @ (0.299, 0.587, 0.114) / 255
    for axis in (0, 1):
        wide = np.pad(grey, [(2, 2) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        grey = sum(w * np.take(wide, np.arange(grey.shape[axis]) + i, axis) for i, w in enumerate(BLUR))
    p = np.pad(grey, 1, mode="edge")
    dx = (p[:-2, 2:] + 2 * p[1:-1, 2:] + p[2:, 2:] - p[:-2, :-2] - 2 * p[1:-1, :-2] - p[2:, :-2]) / 4  # Sobel
    dy = (p[2:, :-2] + 2 * p[2:, 1:-1] + p[2:, 2:] - p[:-2, :-2] - 2 * p[:-2, 1:-1] - p[:-2, 2:]) / 4
    size = np.hypot(dx, dy)
    # Thin: a pixel stays where neither neighbour across the edge is steeper (ties go to one side).
    turn = np.round(np.arctan2(dy, dx) / (np.pi / 4)).astype(int) % 4
    wide, thin = np.pad(size, 1), np.zeros(size.shape, dtype=bool)
    h, w = size.shape
    for t, (r, c) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        after, before = wide[1 + r : 1 + r + h, 1 + c : 1 + c + w], wide[1 - r : 1 - r + h, 1 - c : 1 - c + w]
        thin |= (turn == t) & (size >= after) & (size > before)
    weak = thin & (size >= LOW)
    edge = weak & (size >= HIGH)
    while True:  # hysteresis: weak pixels count where they touch an edge
        p = np.pad(edge, 1)
        near = np.any([p[1 + r : 1 + r + h, 1 + c : 1 + c + w] for r in (-1, 0, 1) for c in (-1, 0, 1)], axis=0)
        grown = near & weak
        if (grown == edge).all():
            return (edge * 255).astype(np.uint8)
        edge = grown
