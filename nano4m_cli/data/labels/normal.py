"""Surface normals from depth: the plane through a pixel's neighbours in space, for a pinhole camera of 60 degrees.

x right, y up, z towards the camera, as modality `normal` states. The true field of view is rarely known; a wrong one tilts
normals that look sideways and leaves those that face the camera.
"""

from __future__ import annotations

import math

import numpy as np

from nano4m_cli.data.labels import _base

FIELD = math.radians(60.0)  # across the shorter side of the picture


class Label(_base.Label):
    needs = ("depth",)

    def make(self, raw: dict) -> np.ndarray:
        return normals(raw["depth"])


def normals(depth: np.ndarray, field: float = FIELD) -> np.ndarray:
    """Return float32 (H, W, 3) of depth (H, W) in metres along the viewing axis; where depth is unknown (0), towards the camera.

    Each of the two tangents is the shorter of the steps to either side, so that edges of things stay sharp.
    """
    h, w = depth.shape
    scale = 2 * math.tan(field / 2) / min(h, w)
    x = (np.arange(w) + 0.5 - w / 2)[None, :] * scale
    y = (h / 2 - np.arange(h) - 0.5)[:, None] * scale
    point = np.stack([x * depth, y * depth, -depth.astype(np.float64)], -1)  # (H, W, 3)

    def tangent(axis: int) -> np.ndarray:
        step = np.diff(point, axis=axis)
        known = np.diff((depth <= 0).cumsum(axis), axis=axis) == 0
        none = np.full_like(np.take(step, [0], axis), np.inf)
        step = np.where((known & (np.take(depth, range(depth.shape[axis] - 1), axis) > 0))[..., None], step, np.inf)
        ahead, behind = np.concatenate([step, none], axis), np.concatenate([none, step], axis)
        nearer = np.abs(ahead[..., 2:]) <= np.abs(behind[..., 2:])
        return np.where(nearer, ahead, behind)

    with np.errstate(invalid="ignore"):
        normal = np.cross(tangent(1), -tangent(0))
        length = np.linalg.norm(normal, axis=-1, keepdims=True)
        normal = normal / length
    normal = np.where(np.isfinite(normal).all(-1, keepdims=True), normal, (0.0, 0.0, 1.0))
    return normal.astype(np.float32)
