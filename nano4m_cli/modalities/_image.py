"""Shared code of the image-like modalities: PNG in, PNG out, errors that name the place."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from nano4m_cli.errors import MediaError


def open_image(data: bytes, where: str) -> Image.Image:
    """Return the decoded picture; a truncated or foreign file is a MediaError."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return image
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as err:
        raise MediaError(f"{where} is no readable picture: {err}") from err


def png_bytes(array: np.ndarray) -> bytes:
    """Return uint8 (H, W, 3) or uint16 (H, W) as PNG bytes."""
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(out, format="PNG", compress_level=4)
    return out.getvalue()


def rgb_array(image: Image.Image, where: str) -> np.ndarray:
    """Return uint8 (H, W, 3); greyscale and palettes are converted, transparency is laid on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    elif image.mode in ("I", "I;16", "I;16B", "F"):
        raise MediaError(
            f"{where} has mode {image.mode} (16/32-bit single channel), not RGB",
            "give an 8-bit RGB or greyscale picture, or pass it as depth",
        )
    return np.asarray(image.convert("RGB"))


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise MediaError(f"cannot read '{path}': {err.strerror}") from err
