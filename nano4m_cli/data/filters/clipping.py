"""Clipped sound: too large a share of its samples stands at full scale."""

from __future__ import annotations

import numpy as np

from nano4m_cli.data.filters import _base


class Filter(_base.Filter):
    looks_at, threshold, unit, keeps_above = "audio", 0.01, "share of samples", False

    def score(self, raws: list[np.ndarray]) -> float:
        return float((np.abs(raws[0]) >= 0.999).mean())
