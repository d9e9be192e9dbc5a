"""Silent clips: the level of their loudest tenth of a second is too low."""

from __future__ import annotations

import numpy as np

from nano4m_cli.data.filters import _base
from nano4m_cli.modalities.audio import RATE


class Filter(_base.Filter):
    looks_at, threshold, unit = "audio", -60.0, "dB under full scale"

    def score(self, raws: list[np.ndarray]) -> float:
        power = np.concatenate([[0.0], np.cumsum(raws[0].astype(np.float64) ** 2)])
        width = min(RATE // 10, len(raws[0]))
        return float(10 * np.log10(max((power[width:] - power[:-width]).max() / width, 1e-12)))
