"""Any-to-any tasks: budgets over modalities drawn from Dirichlet(alpha), for input and for target.

alpha 1 spreads over all modalities, as 4M does (Mizrahi et al. 2023, arXiv:2312.06647); low alpha (0.01-0.1) gives
nearly single-source tasks. What exceeds a modality's length goes to the others, so budgets are met exactly.
"""

from __future__ import annotations

import numpy as np
from pydantic import field_validator

from nano4m_cli.config import Config
from nano4m_cli.masking._base import Component as Base
from nano4m_cli.masking._base import Key, share
from nano4m_cli.rng import log_gamma_variates, uniform


class Component(Base):
    class Options(Config):
        """input, target: smallest and largest budget in slots. alpha for both unless target_alpha is given."""

        weight: float = 1.0
        alpha: float = 1.0
        target_alpha: float | None = None
        input: tuple[int, int] = (16, 256)
        target: tuple[int, int] = (16, 256)

        @field_validator("input", "target")
        @classmethod
        def _range(cls, v):
            if not 1 <= v[0] <= v[1]:
                raise ValueError("a budget is [smallest, largest] with 1 <= smallest <= largest")
            return v

        @field_validator("alpha", "target_alpha")
        @classmethod
        def _alpha(cls, v):
            if v is not None and v <= 0:
                raise ValueError("alpha must be positive")
            return v

    def counts(self, length_BM: np.ndarray, key: Key) -> tuple[np.ndarray, np.ndarray]:
        o = self.options
        total = length_BM.sum(1)
        shown = self._draw(o.input, o.alpha, np.minimum(length_BM, total[:, None] - 1), total - 1, key.sub("in"))
        alpha = o.alpha if o.target_alpha is None else o.target_alpha
        asked = self._draw(o.target, alpha, length_BM - shown, total, key.sub("out"))
        return shown, asked

    @staticmethod
    def _draw(budget: tuple[int, int], alpha: float, room_BM: np.ndarray, most_B: np.ndarray, key: Key) -> np.ndarray:
        low, high = budget
        u = uniform(key.seed, key.stream + "/n", key.counter_B)
        total = np.minimum(low + np.floor(u * (high - low + 1)).astype(np.int64), most_B)
        m = np.arange(room_BM.shape[1])
        log_g = log_gamma_variates(np.float64(alpha), key.seed, key.stream + "/g", key.counter_B[:, None], m)
        log_g = np.where(room_BM > 0, log_g, -np.inf)
        top = log_g.max(1, keepdims=True)
        weight = np.exp(log_g - np.where(np.isfinite(top), top, 0.0))
        return share(total, weight, room_BM)
