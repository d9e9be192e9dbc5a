"""Metric depth along the viewing axis: float32 (H, W) in metres; 16-bit PNG in millimetres on disk, 0 = unknown."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nano4m_cli.errors import MediaError
from nano4m_cli.modalities._base import Modality
from nano4m_cli.modalities._image import open_image, png_bytes, read_bytes

MILLIMETRE = 1000.0


class Depth(Modality):
    name, ext, kind, suffix = "depth", "depth.png", "image", ".png"
    tokenizer, tokenizer_config = "fsq_image", {"levels": [8, 5, 5, 5]}

    def from_bytes(self, data: bytes, where: str) -> np.ndarray:
        image = open_image(data, where)
        if image.mode not in ("I", "I;16", "I;16B"):
            raise MediaError(f"{where} has mode {image.mode}; depth is a 16-bit single-channel PNG in millimetres")
        return np.asarray(image).astype(np.float32) / MILLIMETRE

    def to_bytes(self, raw: np.ndarray) -> bytes:
        assert raw.ndim == 2, raw.shape
        return png_bytes(np.clip(np.rint(raw.astype(np.float64) * MILLIMETRE), 0, 65535).astype(np.uint16))

    def read_file(self, path: Path) -> np.ndarray:
        return self.from_bytes(read_bytes(path), f"'{path}'")

    def show(self, raw: np.ndarray) -> np.ndarray:
        """Near is bright; scaled to the picture's own range of inverse depth."""
        inverse = np.where(raw > 0, 1.0 / np.maximum(raw, 1e-3), 0.0)
        low, high = inverse.min(), max(float(inverse.max()), float(inverse.min()) + 1e-9)
        t = (inverse - low) / (high - low)
        stops = np.array([[13, 8, 35], [84, 20, 110], [187, 55, 84], [249, 142, 8], [252, 255, 164]], dtype=np.float64)
        at = np.linspace(0, 1, len(stops))
        return np.stack([np.interp(t, at, stops[:, c]) for c in range(3)], -1).astype(np.uint8)


MODALITY = Depth()
