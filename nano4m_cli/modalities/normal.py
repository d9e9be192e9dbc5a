"""Surface normals in camera axes (x right, y up, z towards the camera): float32 (H, W, 3), unit length.

On disk an 8-bit PNG, channel = round((n + 1) / 2 * 255).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nano4m_cli.modalities._base import Modality
from nano4m_cli.modalities._image import open_image, png_bytes, read_bytes, rgb_array


class Normal(Modality):
    name, ext, kind, suffix = "normal", "normal.png", "image", ".png"
    tokenizer, tokenizer_config = "fsq_image", {"levels": [8, 5, 5, 5]}

    def from_bytes(self, data: bytes, where: str) -> np.ndarray:
        n = rgb_array(open_image(data, where), where).astype(np.float32) / 255.0 * 2.0 - 1.0
        return n / np.maximum(np.linalg.norm(n, axis=-1, keepdims=True), 1e-6)

    def to_bytes(self, raw: np.ndarray) -> bytes:
        return png_bytes(self.show(raw))

    def read_file(self, path: Path) -> np.ndarray:
        return self.from_bytes(read_bytes(path), f"'{path}'")

    def show(self, raw: np.ndarray) -> np.ndarray:
        assert raw.ndim == 3 and raw.shape[2] == 3, raw.shape
        return np.clip(np.rint((raw + 1.0) / 2.0 * 255.0), 0, 255).astype(np.uint8)


MODALITY = Normal()
