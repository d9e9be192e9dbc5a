"""Black pictures: even the brightest key frame of the clip is dark all over."""

from __future__ import annotations

import numpy as np

from nano4m_cli.data.filters import _base


class Filter(_base.Filter):
    looks_at, threshold, unit = "rgb", 24.0, "brightness of the brightest hundredth of the pixels, 0 to 255"

    def score(self, raws: list[np.ndarray]) -> float:
        return float(max(np.quantile(raw.mean(-1), 0.99) for raw in raws))
