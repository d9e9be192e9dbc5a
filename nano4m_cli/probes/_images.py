"""Errors of depth, normals and pictures: per-sample arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def absrel(guess: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> np.ndarray:
    """Return (N,): mean |guess - truth| / truth over pixels of known depth."""
    return np.array([float((np.abs(g - t) / np.maximum(t, 1e-3))[t > 0].mean()) for g, t in zip(guess, truth, strict=True)])


def angle(guess: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> np.ndarray:
    """Return (N,): mean angle between unit normals, degrees."""
    return np.array([float(np.degrees(np.arccos(np.clip((g * t).sum(-1), -1, 1))).mean())
                     for g, t in zip(guess, truth, strict=True)])


def psnr(guess: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> np.ndarray:
    """Return (N,): peak signal-to-noise ratio of uint8 pictures, dB (99 where equal)."""
    error = np.array([float(((g.astype(np.float64) - t) ** 2).mean()) for g, t in zip(guess, truth, strict=True)])
    return np.where(error > 0, 10 * np.log10(255.0**2 / np.maximum(error, 1e-9)), 99.0)
