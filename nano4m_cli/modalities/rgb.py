"""Colour pictures: uint8 (H, W, 3)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from nano4m_cli.modalities._base import Modality
from nano4m_cli.modalities._image import open_image, png_bytes, read_bytes, rgb_array


class RGB(Modality):
    name, ext, kind, suffix = "rgb", "rgb.png", "image", ".png"
    tokenizer = "fsq_image"

    def from_bytes(self, data: bytes, where: str) -> np.ndarray:
        return rgb_array(open_image(data, where), where)

    def to_bytes(self, raw: np.ndarray) -> bytes:
        assert raw.dtype == np.uint8 and raw.ndim == 3 and raw.shape[2] == 3, (raw.dtype, raw.shape)
        return png_bytes(raw)

    def read_file(self, path: Path) -> np.ndarray:
        where = f"'{path}'"
        return rgb_array(ImageOps.exif_transpose(open_image(read_bytes(path), where)), where)

    def conversion(self, path: Path) -> str | None:
        mode = open_image(read_bytes(path), f"'{path}'").mode
        return None if mode == "RGB" else f"'{path}' has mode {mode} and was converted to RGB"

    def vary(self, raw: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return a random crop of 90 to 100 % of the area and aspect 0.9 to 1.1, brought to the picture's size: for pictures
        whose other modalities say nothing of places."""
        h, w = raw.shape[:2]
        area, aspect = rng.uniform(0.9, 1.0), np.exp(rng.uniform(np.log(0.9), np.log(1.1)))
        ch, cw = min(h * np.sqrt(area / aspect), h), min(w * np.sqrt(area * aspect), w)
        top, left = rng.uniform(0, h - ch), rng.uniform(0, w - cw)
        box = (left, top, left + cw, top + ch)
        return np.asarray(Image.fromarray(raw).resize((w, h), Image.Resampling.BILINEAR, box=box))

    def show(self, raw: np.ndarray) -> np.ndarray:
        return raw


MODALITY = RGB()
