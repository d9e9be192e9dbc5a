"""Everything is asked and nothing shown: what a model that reads left to right (gpt) is trained on."""

from __future__ import annotations

import numpy as np

from nano4m_cli.masking._base import Component as Base
from nano4m_cli.masking._base import Key


class Component(Base):
    def counts(self, length_BM: np.ndarray, key: Key) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros_like(length_BM), length_BM.copy()
