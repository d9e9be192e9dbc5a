"""Whether pictures of different modalities show the same pixels: shift, mirroring and crop, by where their edges are.

Edges of depth, normals and colour lie at the same places. Their cross-correlation, averaged over samples, peaks at no shift
where the pictures are aligned, and at the shift where they are not; where one is mirrored or a closer crop of the same, it
is higher once that is undone. What counts is tested over the samples (paired t).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

SMALL = 16  # pixels a side, under which edges say too little
LEAST, MANY, SURE = 6, 24, 4.0  # samples, enough of them; standard errors by which one place must be better than another
FLIPS = {"left to right": (slice(None), slice(None, None, -1)), "upside down": (slice(None, None, -1), slice(None)),
         "by half a turn": (slice(None, None, -1), slice(None, None, -1))}
CROPS = (0.9, 0.8, 0.67)
PAINT = np.array([255, 40, 60], dtype=np.float32)


class Alignment(NamedTuple):
    """How pictures `b` lie on pictures `a`, over `n` samples that have edges.

    shift: pixels (right, down) by which b lies off a; sure: whether moving it back is better than not, beyond chance.
    changed: what must be undone for b to lie on a, beside a shift: "mirrored left to right", "a closer crop", or "".
    own: standard errors by which edges agree better with the own sample's than with another's.
    """

    n: int
    shift: tuple[float, float]
    sure: bool
    changed: str
    own: float

    @property
    def pixels(self) -> float:
        return float(np.hypot(*self.shift))


def edges(raw: np.ndarray) -> np.ndarray:
    """Return float32 (H, W): how steep a picture is, in [0, 1], alike for colour, metres (0 is unknown) and vectors."""
    if raw.ndim == 2 and raw.dtype != np.uint8:
        known = raw > 0
        values = np.log(np.where(known, raw, np.median(raw[known]) if known.any() else 1.0))[..., None]
    else:
        known, values = np.ones(raw.shape[:2], bool), np.atleast_3d(raw).astype(np.float32)
    steep = np.zeros(raw.shape[:2])
    for axis in (0, 1):
        wide = np.pad(values, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="edge")
        n = wide.shape[axis]
        steep += ((wide.take(range(2, n), axis) - wide.take(range(n - 2), axis)) ** 2).sum(-1)
        seen = np.pad(known, [(1, 1) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        known = known & seen.take(range(2, n), axis) & seen.take(range(n - 2), axis)
    steep = np.sqrt(steep) * known
    return (steep / (steep + 2 * steep.mean() + 1e-6)).astype(np.float32)


def align(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> Alignment | None:
    """Return how raw pictures b lie on raw pictures a of the same samples; None: too small, or too few of them have edges."""
    height, width = np.minimum(a[0].shape[:2], b[0].shape[:2]) if a else (0, 0)
    if min(height, width) < SMALL:
        return None
    pairs = [[_sized(edges(x), height, width) for x in xs] for xs in (a, b)]
    clear = [i for i in range(len(a)) if min(pairs[0][i].std(), pairs[1][i].std()) > 0.01]
    if len(clear) < LEAST:
        return None
    first, second = (np.stack([x[i] for i in clear]) for x in pairs)
    surface = correlate(first, second)
    back, sure = _peak(surface)
    best = lambda x: x.max((1, 2))  # noqa: E731
    as_is = best(surface)
    better = {f"mirrored {how}": best(correlate(first, second[:, y, x])) - as_is for how, (y, x) in FLIPS.items()}
    for share in CROPS:  # what is enlarged is smooth, and smooth edges correlate: both enlarged is what it has to beat as well
        near = (_central(first, share), _central(second, share))
        least = np.maximum(as_is, best(correlate(*near)))
        better[f"a wider crop (about {1 / share:.1f} times)"] = best(correlate(first, near[1])) - least
        better[f"a closer crop (about {share:.1f} times)"] = best(correlate(near[0], second)) - least
    how = max(better, key=lambda name: better[name].mean())
    changed = how if _t(better[how]) > SURE else ""
    at = np.rint(back).astype(int)[::-1] + surface.shape[1] // 2
    near = (slice(None), slice(max(at[0] - 1, 0), at[0] + 2), slice(max(at[1] - 1, 0), at[1] + 2))
    own = _t(best(surface[near]) - best(correlate(first, np.roll(second, len(second) // 2, axis=0))[near]))
    return Alignment(len(clear), (-back[0], -back[1]), sure, changed, own)


def correlate(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return (N, 2 R + 1, 2 R + 1): correlation of pictures (N, H, W) when b is moved by -R..R pixels down and right."""
    reach = _reach(min(a.shape[1:]))
    taper = np.sqrt(np.outer(np.hanning(a.shape[1] + 2)[1:-1], np.hanning(a.shape[2] + 2)[1:-1]))
    a, b = ((x - x.mean((1, 2), keepdims=True)) * taper for x in (a, b))
    size = [n + reach for n in a.shape[1:]]
    product = np.fft.irfft2(np.fft.rfft2(a, size) * np.conj(np.fft.rfft2(b, size)), size)
    moved = np.arange(-reach, reach + 1)
    norm = np.sqrt((a**2).sum((1, 2)) * (b**2).sum((1, 2))) + 1e-9
    return product[:, moved][:, :, moved] / norm[:, None, None]


def _reach(side: int) -> int:
    return int(np.clip(side // 4, 2, 32))


def _sized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    if picture.shape == (height, width):
        return picture
    return np.asarray(Image.fromarray(picture).resize((int(width), int(height)), Image.Resampling.BOX))


def _peak(surface: np.ndarray) -> tuple[tuple[float, float], bool]:
    """Return the place (right, down) of the mean surface's peak, to parts of a pixel, and whether it beats none for sure.

    A peak that does not is chance: that within a pixel of no shift is returned instead.
    """
    mean, reach = surface.mean(0), surface.shape[1] // 2
    y, x = np.unravel_index(int(mean.argmax()), mean.shape)
    sure = _t(surface[:, y, x] - surface[:, reach, reach]) > SURE
    if not sure:
        near = mean[reach - 1 : reach + 2, reach - 1 : reach + 2]
        y, x = np.array(np.unravel_index(int(near.argmax()), near.shape)) + reach - 1
    place = []
    for at, line in ((x, mean[y]), (y, mean[:, x])):
        part = 0.0
        if 0 < at < 2 * reach:
            low, top, high = line[at - 1 : at + 2]
            bend = low - 2 * top + high
            part = float(np.clip(0.5 * (low - high) / bend, -0.5, 0.5)) if bend < 0 else 0.0
        place.append(float(at - reach + part))
    return (place[0], place[1]), sure


def _central(pictures: np.ndarray, share: float) -> np.ndarray:
    """Return the central part of pictures (N, H, W), enlarged to their size."""
    h, w = pictures.shape[1:]
    box = (w * (1 - share) / 2, h * (1 - share) / 2, w * (1 + share) / 2, h * (1 + share) / 2)
    return np.stack([np.asarray(Image.fromarray(p).resize((w, h), Image.Resampling.BILINEAR, box=box)) for p in pictures])


def _t(difference: np.ndarray) -> float:
    """Return the mean in standard errors."""
    return float(difference.mean() / (difference.std(ddof=1) / len(difference) ** 0.5 + 1e-6))


def overlay(base: np.ndarray, other: np.ndarray, height: int = 128) -> np.ndarray:
    """Return picture `base` (uint8 (H, W, 3)), enlarged, with the edges of raw picture `other` painted red."""
    scale = max(1, round(height / base.shape[0]))
    size = (base.shape[1] * scale, base.shape[0] * scale)
    big = np.asarray(Image.fromarray(base).resize(size, Image.Resampling.NEAREST)).astype(np.float32)
    lines = np.asarray(Image.fromarray(edges(other)).resize(size, Image.Resampling.BILINEAR))
    share = np.clip((lines - 0.45) * 4, 0, 0.85)[..., None]
    return np.rint(big * (1 - share) + PAINT * share).astype(np.uint8)


def verdict(found: Alignment, limit: float = 1.5) -> tuple[str, str] | None:
    """Return (severity, what is wrong) of an alignment; None: nothing."""
    if found.changed:
        return "error", found.changed
    if found.sure and found.pixels > limit:
        ways = zip(found.shift, (("left", "right"), ("up", "down")), strict=True)
        return "error", "shifted by " + " and ".join(f"{abs(n):.0f} px {way[n > 0]}" for n, way in ways if abs(n) >= 0.5)
    if found.own < 1.5:
        return ("error" if found.n >= MANY else "notice"), "of another scene: edges fit those of other samples as well"
    return None


def figures(found: Alignment) -> dict[str, Any]:
    """Return an alignment as JSON has it."""
    return {"dx": round(found.shift[0], 2), "dy": round(found.shift[1], 2), "n": found.n, "own": round(found.own, 1)}
