"""Edges: uint8 (H, W), 255 where an edge runs, 0 elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nano4m_cli.errors import MediaError
from nano4m_cli.modalities._base import Modality
from nano4m_cli.modalities._image import open_image, png_bytes, read_bytes


class Edges(Modality):
    name, ext, kind, suffix = "edges", "edges.png", "image", ".png"
    tokenizer, tokenizer_config = "fsq_image", {"levels": [8, 5, 5, 5]}

    def from_bytes(self, data: bytes, where: str) -> np.ndarray:
        image = open_image(data, where)
        if image.mode not in ("L", "1", "P", "RGB", "RGBA", "LA"):
            raise MediaError(f"{where} has mode {image.mode}; edges are an 8-bit picture, white on black")
        return np.asarray(image.convert("L"))

    def to_bytes(self, raw: np.ndarray) -> bytes:
        assert raw.dtype == np.uint8 and raw.ndim == 2, (raw.dtype, raw.shape)
        return png_bytes(raw)

    def read_file(self, path: Path) -> np.ndarray:
        return self.from_bytes(read_bytes(path), f"'{path}'")

    def show(self, raw: np.ndarray) -> np.ndarray:
        return np.repeat(raw[:, :, None], 3, axis=2)


MODALITY = Edges()
