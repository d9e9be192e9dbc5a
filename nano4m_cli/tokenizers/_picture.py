"""What the tokenizers of pictures share: which form a raw picture has, whether it fits, and bringing it to size.

What a picture is, its raw form tells: uint8 (H, W, 3) colour, uint8 (H, W) grey, float32 (H, W, 3) vectors, float32
(H, W) metres.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from nano4m_cli.errors import MediaError


def form_of(raw: np.ndarray) -> str:
    """Return the form of a raw picture."""
    return ("grey", "colour")[raw.ndim - 2] if raw.dtype == np.uint8 else ("metres", "vectors")[raw.ndim - 2]


def check_picture(raw: np.ndarray, size: tuple[int, int], form: str, modality: str, where: str, hint: str) -> None:
    """Raise MediaError, with its place, for a picture of another size (height, width) or form, or that is not finite."""
    if raw.shape[:2] != tuple(size):
        raise MediaError(
            f"{where}: {modality} is {raw.shape[1]} x {raw.shape[0]} pixels, this tokenizer takes {size[1]} x {size[0]}", hint
        )
    if form_of(raw) != form:
        raise MediaError(f"{where}: {modality} is a picture of {form_of(raw)}, this tokenizer takes {form}")
    if not np.isfinite(raw).all():
        raise MediaError(f"{where}: {modality} has values that are not finite")


def adapted(raw: np.ndarray, size: tuple[int, int], modality: str) -> tuple[np.ndarray, str | None]:
    """Return the picture's middle at `size` (height, width), and what was done to it (None: nothing)."""
    height, width = size
    h, w = raw.shape[:2]
    if (h, w) == (height, width):
        return raw, None
    scale = min(h / height, w / width)
    ch, cw = round(height * scale), round(width * scale)
    top, left = (h - ch) // 2, (w - cw) // 2
    if raw.dtype == np.uint8:
        how = Image.Resampling.BOX if scale > 1 else Image.Resampling.BICUBIC
        out = np.asarray(Image.fromarray(raw).resize((width, height), how, box=(left, top, left + cw, top + ch)))
    else:  # depth and normals are never averaged across an edge
        rows = top + ((np.arange(height) + 0.5) * ch / height).astype(int)
        cols = left + ((np.arange(width) + 0.5) * cw / width).astype(int)
        out = raw[rows][:, cols]
    return out, f"{modality} of {w} x {h} was cropped to its centre and resized to {width} x {height}"


def adapted_video(raw: np.ndarray, extent: tuple[int, ...], modality: str) -> tuple[np.ndarray, str | None]:
    """Return a video (T, H, W, 3) at `extent` (frames, height, width), and what was done to it (None: nothing).

    A longer one is cut after its first frames, a shorter one stands still at its end.
    """
    if raw.shape[:3] == tuple(extent):
        return raw, None
    picked = raw[np.minimum(np.arange(extent[0]), len(raw) - 1)]
    out = np.stack([adapted(frame, extent[1:], modality)[0] for frame in picked])
    did = ["cut" if len(raw) > len(out) else "continued by its last frame"] if len(raw) != len(out) else []
    did += ["cropped to its centre and resized"] if raw.shape[1:3] != tuple(extent[1:]) else []
    return out, f"{modality} of {told(raw.shape[:3])} was {' and '.join(did)} to {told(extent)}"


def told(extent: tuple[int, ...]) -> str:
    """Return (frames, height, width) as text."""
    frames, height, width = extent
    return f"{frames} frames of {width} x {height}"
