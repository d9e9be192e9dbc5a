"""The contract of a filter: a score of a clip, and which side of a threshold is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np


class Filter(ABC):
    """Scores clips; whoever applies it records every score, so that decisions can be made again with other thresholds.

    Class attributes:
        looks_at: "audio" (its sound), "rgb" (its key frames) or "video" (eight pictures over its length). A clip without
            that is neither scored nor left out.
        threshold: the usual one; unit: what scores are in.
        keeps_above: whether clips at or above the threshold are kept (else those at or below it).
    """

    looks_at: ClassVar[str]
    threshold: ClassVar[float]
    unit: ClassVar[str]
    keeps_above: ClassVar[bool] = True

    @abstractmethod
    def score(self, raws: list[np.ndarray]) -> float:
        """Return the score of a clip: of its one sound, or of its pictures (uint8 (H, W, 3), at least one)."""

    def keeps(self, score: float, threshold: float | None = None) -> bool:
        limit = self.threshold if threshold is None else threshold
        return score >= limit if self.keeps_above else score <= limit
