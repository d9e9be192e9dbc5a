"""The colour picture at a second, higher resolution: uint8 (H, W, 3), the same view as rgb."""

from __future__ import annotations

import numpy as np

from nano4m_cli.modalities._base import Modality
from nano4m_cli.modalities.rgb import RGB


class RGBHi(RGB):
    name, ext = "rgb_hi", "rgb_hi.png"

    def vary(self, raw: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A crop of its own would no longer show what rgb shows."""
        return Modality.vary(self, raw, rng)


MODALITY = RGBHi()
