"""Frozen video: nothing moves over the whole clip."""

from __future__ import annotations

import numpy as np

from nano4m_cli.data.filters import _base


class Filter(_base.Filter):
    looks_at, side, threshold, unit = "video", 32, 0.5, "greatest mean change between pictures, of 255"

    def score(self, raws: list[np.ndarray]) -> float:
        stack = np.stack(raws).astype(np.float32)
        return float(np.abs(np.diff(stack, axis=0)).mean((1, 2, 3)).max(initial=0.0))
