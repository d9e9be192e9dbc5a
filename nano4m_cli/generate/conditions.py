"""Which slots of a modality are kept: named regions, the first part, a span of seconds, a picture whose white is kept.

A slot is kept only where all that it stands for is kept: every pixel of its patch, the whole of its time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nano4m_cli.errors import MediaError, UsageError
from nano4m_cli.modalities._image import open_image, read_bytes, rgb_array
from nano4m_cli.spec import TokenSpec

# Top, left, bottom, right, in quarters of height and width.
BOXES = {
    "left-half": (0, 0, 4, 2), "right-half": (0, 2, 4, 4), "top-half": (0, 0, 2, 4), "bottom-half": (2, 0, 4, 4),
    "centre": (1, 1, 3, 3),
}
REGIONS = (*BOXES, "border")
_SPAN = re.compile(r"(?:(\d+(?:\.\d+)?)-)?(\d+(?:\.\d+)?)s")
_SHARE = re.compile(r"\d*\.?\d+")
SLACK = 1e-6  # of a slot, by which rounding may miss an edge


def box_slots(shape: Sequence[int], region: str) -> np.ndarray:
    """Return bool (slots,) of a grid (H, W) or (T, H, W): slots that lie inside a named region of every picture."""
    h, w = shape[-2:]
    y, x = 4 * np.arange(h)[:, None], 4 * np.arange(w)[None]
    top, left, bottom, right = BOXES["centre" if region == "border" else region]
    if region == "border":
        inside = (y + 4 <= top * h) | (y >= bottom * h) | (x + 4 <= left * w) | (x >= right * w)
    else:
        inside = (y >= top * h) & (y + 4 <= bottom * h) & (x >= left * w) & (x + 4 <= right * w)
    return np.broadcast_to(inside, shape).reshape(-1)


def white_slots(shape: Sequence[int], white_HW: np.ndarray) -> np.ndarray:
    """Return bool (slots,) of a grid: slots every pixel of which (also those they share with others) is white (bool)."""
    (h, w), (ph, pw) = shape[-2:], white_HW.shape
    black = np.zeros((ph + 1, pw + 1), dtype=np.int64)
    black[1:, 1:] = (~white_HW).cumsum(0).cumsum(1)
    y0, y1 = (np.arange(h) * ph // h)[:, None], (-(-(np.arange(h) + 1) * ph // h))[:, None]
    x0, x1 = np.arange(w) * pw // w, -(-(np.arange(w) + 1) * pw // w)
    return np.broadcast_to(black[y1, x1] - black[y0, x1] - black[y1, x0] + black[y0, x0] == 0, shape).reshape(-1)


def first_slots(spec: TokenSpec, share: float, length: int) -> np.ndarray:
    """Return bool (length,): the first part in reading order; of sound and video whole frames, of the others whole slots."""
    frames = spec.shape[0] if spec.kind == "codes" or len(spec.shape) == 3 else length
    return np.arange(length) < int(share * frames + SLACK) * (length // frames)


def span_slots(spec: TokenSpec, start: float, end: float, seconds: float) -> np.ndarray:
    """Return bool (slots,): the frames that lie wholly in [start, end] seconds; each stands for an equal part of `seconds`."""
    edge = np.arange(spec.shape[0] + 1) * seconds / spec.shape[0]
    slack = SLACK * seconds
    return np.repeat((edge[:-1] >= start - slack) & (edge[1:] <= end + slack), spec.slots // spec.shape[0])


def seconds_of(spec: TokenSpec) -> float | None:
    """Return how long what the ids stand for takes, by what its tokenizer says (None: it does not)."""
    said = spec.preprocess
    if said.get("samples") and said.get("rate"):
        return said["samples"] / said["rate"]
    return said["frames"] / said["fps"] if said.get("frames") and said.get("fps") else None


def read_mask(path: Path) -> np.ndarray:
    """Return bool (H, W): where a picture is lighter than half."""
    return rgb_array(open_image(read_bytes(path), f"'{path}'"), f"'{path}'").mean(-1) > 127


def kept_slots(
    spec: TokenSpec, regions: Sequence[str], length: int, fit: Callable[[np.ndarray, str], np.ndarray] | None = None
) -> np.ndarray:
    """Return bool (length,) of the slots inside all of the regions; a UsageError says what is wrong with them.

    Args:
        regions: REGIONS; "0.5", the first half; "0-0.5s" or "0.5s", seconds; or the path of a mask.
        length: slots that there are (of a text without its end).
        fit: brings a mask (bool (H, W), its path) to the picture that is encoded; it may have none to fit.
    """
    name, kept = spec.modality, np.ones(length, dtype=bool)
    for region in regions:
        where, span = f"keep {name}:{region}", _SPAN.fullmatch(region)
        if region in REGIONS:
            if spec.kind != "grid":
                raise UsageError(f"{where}: {name} is no picture", f"keep its beginning, e.g. {name}:0.5")
            mine = box_slots(spec.shape, region)
        elif span:
            start, end, seconds = float(span[1] or 0), float(span[2]), seconds_of(spec)
            if seconds is None or spec.kind == "sequence" or len(spec.shape) == 2 and spec.kind == "grid":
                raise UsageError(f"{where}: {name} is not counted in seconds", f"keep its beginning, e.g. {name}:0.5")
            if not start < end:
                raise UsageError(f"{where}: the span ends before it begins", f"e.g. {name}:0-{seconds / 2:g}s")
            if start >= seconds:
                raise UsageError(f"{where}: {name} ends at {seconds:g} s")
            mine = span_slots(spec, start, end, seconds)
        elif _SHARE.fullmatch(region):
            if not 0 < float(region) <= 1:
                raise UsageError(f"{where}: a share lies between 0 and 1", f"e.g. {name}:0.5, its first half")
            mine = first_slots(spec, float(region), length)
        else:
            if spec.kind != "grid":
                raise UsageError(f"{where} is no part of {name}", f"its beginning: {name}:0.5, and of sound {name}:0-0.5s")
            if not Path(region).is_file():
                known = f"{', '.join(REGIONS)}, 0.5 (the first half), or a picture whose white is kept"
                raise UsageError(f"{where}: no such region or file", known)
            white = read_mask(Path(region))
            mine = white_slots(spec.shape, white if fit is None else fit(white, region))
        if not mine.any():
            raise UsageError(f"{where} holds no whole slot of {name} ({' x '.join(map(str, spec.shape))})", "keep more of it")
        kept &= mine
    if not kept.any():
        raise UsageError(
            f"what is to be kept of {name} contradicts itself: {' and '.join(regions)} have no slot in common",
            "what stands in all of them is kept",
        )
    return kept


def fitted(white_HW: np.ndarray, path: str, raw: Any, adapt: Callable[[Any], tuple[Any, str | None]]) -> np.ndarray:
    """Return a mask as a tokenizer's `adapt` leaves the picture (or video) `raw` that it belongs to."""
    size = raw.shape[raw.ndim - 3 :][:2] if raw.ndim > 2 else raw.shape
    if white_HW.shape != tuple(size):
        (h, w), (mh, mw) = size, white_HW.shape
        raise MediaError(f"the mask '{path}' is of {mw} x {mh}, its picture of {w} x {h}", "give a mask of the picture's size")
    shape = (*white_HW.shape, 3) if raw.ndim < 4 else raw.shape
    painted = np.ascontiguousarray(np.broadcast_to(white_HW[..., None], shape)).astype(np.uint8) * 255
    out = adapt(painted)[0]
    return ((out[0] if out.ndim == 4 else out) == 255).all(-1)


def veiled(picture: np.ndarray, spec: TokenSpec, kept: np.ndarray) -> np.ndarray:
    """Return a picture (H, W, 3) that is grey where its grid, or the time of its sound, is not kept; a video as it is."""
    if spec.kind == "grid" and len(spec.shape) == 3:
        return picture
    lattice = kept.reshape(spec.shape) if spec.kind == "grid" else kept.reshape(spec.shape).all(1)[None]
    (h, w), (ph, pw) = lattice.shape, picture.shape[:2]
    there = lattice[np.arange(ph)[:, None] * h // ph, np.arange(pw) * w // pw]
    return np.where(there[..., None], picture, np.uint8(128))
