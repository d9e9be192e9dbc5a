"""The contract of a filter: a score of a clip, and which side of a threshold is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from nano4m_cli.data._settings import Configured, made
from nano4m_cli.registry import FILTERS


class Filter(Configured, ABC):
    """Scores clips; whoever applies it records every score, so that decisions can be made again with other thresholds.

    Class attributes:
        looks_at: "audio" (its sound, without what pads it), "rgb" (its key frames) or "video" (eight pictures over its
            length). A clip without that is neither scored nor left out.
        side: pixels that its pictures have along each side, read from the file; None: as in the data set.
        reads_caption: whether it is asked score(raws, caption); a clip without caption is neither scored nor left out.
        threshold: the usual one; unit: what scores are in.
        keeps_above: whether clips at or above the threshold are kept (else those at or below it).
    """

    looks_at: ClassVar[str]
    side: ClassVar[int | None] = None
    reads_caption: ClassVar[bool] = False
    threshold: ClassVar[float]
    unit: ClassVar[str]
    keeps_above: ClassVar[bool] = True

    @abstractmethod
    def score(self, raws: list[np.ndarray]) -> Any:
        """Return the score of a clip: of its one sound, or of its pictures (uint8 (H, W, 3), at least one).

        A number; or a mapping that is recorded whole, of which `keeps` knows what it decides by.
        """

    def keeps(self, score: Any, threshold: float | None = None) -> bool:
        """Return whether a clip of this score is kept: by what is recorded alone, no weights are needed."""
        limit = self.threshold if threshold is None else threshold
        return score >= limit if self.keeps_above else score <= limit


def dropped_by(scores: Mapping[str, Any], thresholds: Mapping[str, float], settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the filters that leave a clip out, by its recorded scores (in labels.json and left_out.json) alone."""
    return [f for f, score in scores.items() if not made(FILTERS, f, settings).keeps(score, thresholds.get(f))]
