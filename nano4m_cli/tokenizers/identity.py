"""Pictures to ids without weights: each pixel's mean brightness in `levels` steps is its id.

The family's identity member: model and pipeline tests need no fitted weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nano4m_cli.config import Config
from nano4m_cli.errors import MediaError
from nano4m_cli.spec import TokenSpec
from nano4m_cli.tokenizers._base import Tokenizer as Base
from nano4m_cli.tokenizers._base import check_ids


class Tokenizer(Base):
    class Options(Config):
        levels: int = 16

    name, fitted = "identity", False

    def __init__(self, modality: str, options: Config, size: dict[str, Any]):
        super().__init__(modality, options, size)
        self.shape = tuple(size["size"])
        self.sha256 = ""

    def spec(self) -> TokenSpec:
        return TokenSpec(
            modality=self.modality, kind="grid", shape=self.shape, vocab_size=self.options.levels,
            tokenizer=self.ref(""), preprocess={"scale": "mean of channels / 256 * levels"},
        )

    def adapt(self, raw: np.ndarray) -> tuple[np.ndarray, str | None]:
        return raw, None

    def encode(self, raws: Sequence[np.ndarray], where: Sequence[str] | None = None) -> list[np.ndarray]:
        out = []
        for i, raw in enumerate(raws):
            if raw.shape[:2] != self.shape or raw.dtype != np.uint8:
                raise MediaError(f"{where[i] if where else i}: {raw.dtype} {raw.shape}, uint8 {self.shape} expected")
            grey = raw.reshape(*self.shape, -1).mean(-1)
            out.append((grey * self.options.levels // 256).astype(np.int64).reshape(-1))
        return out

    def decode(self, ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        spec, n = self.spec(), self.options.levels
        grids = [check_ids(np.asarray(i), self.shape, spec, "decode") for i in ids]
        return [np.repeat(((g + 0.5) * 256 / n).astype(np.uint8)[..., None], 3, axis=-1) for g in grids]

    def comparable(self, raw: np.ndarray) -> np.ndarray:
        return self.decode(self.encode([raw]))[0]

    def save(self, folder: Path) -> None:
        pass

    def load(self, folder: Path) -> None:
        pass
