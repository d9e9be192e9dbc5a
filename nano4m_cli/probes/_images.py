"""Errors of depth, normals and pictures: per-sample arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nano4m_cli.media_compat import ensure_torchaudio

DELTA = 1.25  # a depth counts as right where neither is larger than the other by more than this factor (Eigen et al. 2014)
ANGLES = (11.25, 22.5, 30.0)  # degrees: what the field counts normals as right under (Fouhey et al. 2013)


def absrel(guess: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> np.ndarray:
    """Return (N,): mean |guess - truth| / truth over pixels of known depth."""
    return np.array([float((np.abs(g - t) / np.maximum(t, 1e-3))[t > 0].mean()) for g, t in zip(guess, truth, strict=True)])


def rmse(guess: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> np.ndarray:
    """Return (N,): root of the mean squared error over a sample's pixels of known depth, metres."""
    return np.array([float(np.sqrt(((g - t)[t > 0].astype(np.float64) ** 2).mean())) for g, t in zip(guess, truth, strict=True)])


def delta1(guess: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> np.ndarray:
    """Return (N,): share of pixels of known depth with max(guess / truth, truth / guess) < `DELTA`; none at or below 0 is."""
    def one(g: np.ndarray, t: np.ndarray) -> float:
        g, t = g[t > 0], t[t > 0]
        ratio = np.where(g > 0, np.maximum(g / t, t / np.where(g > 0, g, 1.0)), np.inf)
        return float((ratio < DELTA).mean())

    return np.array([one(g, t) for g, t in zip(guess, truth, strict=True)])


def angles(guess: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return (H, W): the angle between unit normals (H, W, 3), degrees."""
    return np.degrees(np.arccos(np.clip((guess * truth).sum(-1), -1, 1)))


def angle(guess: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> np.ndarray:
    """Return (N,): mean angle between unit normals, degrees."""
    return np.array([float(angles(g, t).mean()) for g, t in zip(guess, truth, strict=True)])


def angle_figures(guess: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return {figure: (N,)}: angle_median of each sample's pixels (degrees), angle_under_A their share below each of `ANGLES`."""
    off = [angles(g, t) for g, t in zip(guess, truth, strict=True)]
    shares = {f"angle_under_{a:g}": np.array([float((o < a).mean()) for o in off]) for a in ANGLES}
    return {"angle_median": np.array([float(np.median(o)) for o in off]), **shares}


def psnr(guess: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> np.ndarray:
    """Return (N,): peak signal-to-noise ratio of uint8 pictures, dB (99 where equal)."""
    error = np.array([float(((g.astype(np.float64) - t) ** 2).mean()) for g, t in zip(guess, truth, strict=True)])
    return np.where(error > 0, 10 * np.log10(255.0**2 / np.maximum(error, 1e-9)), 99.0)


def ssim(guess: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> np.ndarray:
    """Return (N,): structural similarity (Wang et al. 2004) of uint8 pictures or videos, a window of 7 pixels and sigma 1."""
    ensure_torchaudio()
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = (torch.from_numpy(np.stack(x)).float() / 255 for x in (guess, truth))
    a, b = (x.flatten(0, 1) if x.ndim == 5 else x for x in (a, b))  # of a video: the mean over its frames
    a, b = (x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2) for x in (a, b))
    each = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none", sigma=1.0, kernel_size=7)
    return each.reshape(len(guess), -1).mean(1).numpy()
