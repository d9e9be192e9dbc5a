"""Black-and-white pictures to ids without weights: each small patch's pixels, on or off, are the bits of its id.

Preprocessing (one place: `_bits`): mean of the channels, bilinear to `size` x `size`, on where above `threshold` of full
brightness; a patch's first pixel is the most significant bit. The usual one for MNIST: 14 x 14 pixels, 2 x 2 patches,
49 ids of 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from nano4m_cli.config import Config
from nano4m_cli.errors import ConfigError, MediaError
from nano4m_cli.spec import TokenSpec
from nano4m_cli.tokenizers._base import Tokenizer as Base
from nano4m_cli.tokenizers._base import check_ids
from nano4m_cli.tokenizers._picture import adapted, check_picture, form_of


class Tokenizer(Base):
    class Options(Config):
        """size: pixels each way that pictures are brought to. patch: pixels of a patch each way. threshold: of full brightness.
        variants: of each sample of the train split, the first as it is and the others varied (`Modality.vary`)."""

        size: int = Field(14, ge=1)
        patch: int = Field(2, ge=1, le=4)
        threshold: float = Field(0.5, ge=0, lt=1)
        variants: int = Field(1, ge=1)

        @model_validator(mode="after")
        def _divides(self):
            if self.size % self.patch:
                raise ValueError(f"size {self.size} does not divide into patches of {self.patch}")
            return self

    name, fitted = "bits", False

    def __init__(self, modality: str, options: Config, size: dict[str, Any]):
        super().__init__(modality, options, size)
        if "size" not in size:
            raise ConfigError(f"bits serves pictures, and the data set gives no size of '{modality}'")
        self.shown = tuple(size["size"])
        self.grid = (options.size // options.patch,) * 2
        self.sha256 = ""

    def spec(self) -> TokenSpec:
        o = self.options
        return TokenSpec(
            modality=self.modality, kind="grid", shape=self.grid, vocab_size=2 ** (o.patch**2), tokenizer=self.ref(""),
            preprocess={"size": [o.size, o.size], "scale": f"mean of channels, bilinear, above {o.threshold}"},
            variants=o.variants,
        )

    def adapt(self, raw: np.ndarray) -> tuple[np.ndarray, str | None]:
        return adapted(raw, self.shown, self.modality)

    def _bits(self, raw: np.ndarray) -> np.ndarray:
        """Return bool (size, size)."""
        grey = raw.reshape(*raw.shape[:2], -1).mean(-1).round().astype(np.uint8)
        small = Image.fromarray(grey).resize((self.options.size,) * 2, Image.Resampling.BILINEAR)
        return np.asarray(small) / 255.0 > self.options.threshold

    def encode(self, raws: Sequence[np.ndarray], where: Sequence[str] | None = None) -> list[np.ndarray]:
        out, (h, w), p = [], self.grid, self.options.patch
        weight = 2 ** np.arange(p * p - 1, -1, -1)
        for i, raw in enumerate(raws):
            place = where[i] if where else f"picture {i}"
            if raw.dtype != np.uint8:
                raise MediaError(f"{place}: {self.modality} is a picture of {form_of(raw)}, this tokenizer takes 8-bit ones")
            check_picture(raw, self.shown, form_of(raw), self.modality, place, "fetch all pictures with one size")
            patches = self._bits(raw).reshape(h, p, w, p).transpose(0, 2, 1, 3).reshape(h * w, p * p)
            out.append((patches @ weight).astype(np.int64))
        return out

    def decode(self, ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        spec, (h, w), p, out = self.spec(), self.grid, self.options.patch, []
        shift = np.arange(p * p - 1, -1, -1)
        for row in ids:
            bits = check_ids(np.asarray(row), self.grid, spec, "decode")[..., None] >> shift & 1
            pixels = bits.reshape(h, w, p, p).transpose(0, 2, 1, 3).reshape(h * p, w * p).astype(np.uint8) * 255
            large = Image.fromarray(pixels).resize(self.shown[::-1], Image.Resampling.NEAREST)
            out.append(np.repeat(np.asarray(large)[..., None], 3, axis=-1))
        return out

    def comparable(self, raw: np.ndarray) -> np.ndarray:
        return self.decode(self.encode([raw]))[0]

    def save(self, folder: Path) -> None:
        pass

    def load(self, folder: Path) -> None:
        pass
