"""Moving pictures: uint8 (T, H, W, 3) at the data set's frame rate; one PNG strip in shards, WebP for people.

The strip is (T * H, W): lossless, the same bytes always, and small, since what stands still is stored once. How many frames
it holds is its text chunk "frames"; how fast they go is stated once for all samples, in dataset.json.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence, PngImagePlugin, UnidentifiedImageError

from nano4m_cli.errors import MediaError
from nano4m_cli.modalities._base import Modality
from nano4m_cli.modalities._frames import container, frames, length
from nano4m_cli.modalities._image import open_image, read_bytes, rgb_array

FPS = 8.0  # where no data set says otherwise
MOST = 256  # frames read of a file, where no data set says how many
PIXELS = 1 << 26  # of a strip at most: larger pictures are refused as decompression bombs
SHOWN = 16  # frames of a picture of a video, at most
STILL = 0.1  # seconds of a frame that states none, as browsers have it


class Video(Modality):
    """Args: fps: frames per second of raw values. frames: how many of a file are read (None: all, up to `MOST`)."""

    name, ext, kind, suffix = "video", "video.png", "video", ".webp"
    tokenizer = "fsq_video"

    def __init__(self, fps: float = FPS, frames: int | None = None):
        self.fps, self.frames = fps, frames

    def sized(self, size: dict[str, Any]) -> Video:
        return Video(size.get("fps", self.fps), size.get("frames", self.frames))

    def from_bytes(self, data: bytes, where: str) -> np.ndarray:
        image = open_image(data, where)
        strip, told = rgb_array(image, where), str(image.info.get("frames", ""))
        count = int(told) if told.isascii() and told.isdigit() and len(told) < 10 else 0
        if not count or len(strip) % count:
            raise MediaError(f"{where} is no strip of frames: {len(strip)} rows, frames = '{told}'")
        return strip.reshape(count, -1, *strip.shape[1:])

    def to_bytes(self, raw: np.ndarray) -> bytes:
        assert raw.dtype == np.uint8 and raw.ndim == 4 and raw.shape[3] == 3, (raw.dtype, raw.shape)
        assert raw[..., 0].size <= PIXELS, (raw.shape, PIXELS)
        told, out = PngImagePlugin.PngInfo(), io.BytesIO()
        told.add_text("frames", str(len(raw)))
        strip = np.ascontiguousarray(raw).reshape(-1, *raw.shape[2:])
        Image.fromarray(strip).save(out, format="PNG", compress_level=4, pnginfo=told)
        return out.getvalue()

    def read_file(self, path: Path) -> np.ndarray:
        """Return the first frames of a video, an animated picture or a picture (one frame), at this modality's rate.

        Frame i is what is shown in the middle of its span, at (i + 0.5) / fps seconds.
        """
        seconds, _ = self._facts(path)
        times = (np.arange(self._count(seconds)) + 0.5) / self.fps
        animated = _open(path)
        shown = list(frames(path, times.tolist()) if animated is None else _shown(animated, times, f"'{path}'"))
        if len({f.shape for f in shown}) > 1:
            raise MediaError(f"'{path}' changes its size on the way")
        return np.stack(shown)

    def conversion(self, path: Path) -> str | None:
        seconds, rate = self._facts(path)
        read = self._count(seconds) / self.fps
        cut = seconds - read > 0.5 / self.fps
        if not seconds or (not cut and abs(rate - self.fps) < 0.01):
            return None
        return f"'{path}' ({seconds:.2f} s at {rate:.4g} frames/s) was read at {self.fps:g} frames/s" + (
            f", its first {read:.2f} s" if cut else "")

    def write_file(self, raw: np.ndarray, path: Path) -> None:
        """Write a lossless animated WebP that runs for ever; where nothing moves, it is a picture."""
        ends = np.round(np.arange(len(raw) + 1) * 1000 / self.fps).astype(int)
        first, *others = (Image.fromarray(np.ascontiguousarray(f)) for f in raw)
        first.save(path, format="WEBP", save_all=True, append_images=others, duration=np.diff(ends).tolist(), loop=0,
                   lossless=True, quality=70, method=4)

    def write_picture(self, raw: np.ndarray, stem: Path) -> Path:
        path = stem.with_name(stem.name + self.suffix)
        self.write_file(raw, path)
        return path

    def show(self, raw: np.ndarray) -> np.ndarray:
        """Return up to `SHOWN` frames side by side, row by row, white between them."""
        few = raw[np.unique(np.linspace(0, len(raw) - 1, SHOWN).round().astype(int))]
        n, h, w, _ = few.shape
        columns = math.ceil(math.sqrt(n))
        gap = max(1, h // 32)
        page = np.full((math.ceil(n / columns) * (h + gap) - gap, columns * (w + gap) - gap, 3), 255, dtype=np.uint8)
        for i, frame in enumerate(few):
            y, x = i // columns * (h + gap), i % columns * (w + gap)
            page[y : y + h, x : x + w] = frame
        return page

    def _count(self, seconds: float) -> int:
        """Return how many frames are read of a file of so many seconds."""
        return max(1, min(round(seconds * self.fps), self.frames or MOST))

    def _facts(self, path: Path) -> tuple[float, float]:
        """Return (seconds, frames per second) of a file; (0, 0) of a still picture."""
        animated = _open(path)
        if animated is not None:
            spans = [end - start for start, end, _ in _spans(animated, f"'{path}'")]
            return (sum(spans), len(spans) / sum(spans)) if len(spans) > 1 else (0.0, 0.0)
        with container(path) as box:
            if not box.streams.video:
                raise MediaError(f"'{path}' has no picture")
            return length(box, box.streams.video), float(box.streams.video[0].average_rate or 0)


def _open(path: Path) -> Image.Image | None:
    """Return a picture, animated or not; None where the file is something else."""
    try:
        return Image.open(io.BytesIO(read_bytes(path)))
    except UnidentifiedImageError:
        return None
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as err:
        raise MediaError(f"'{path}' is no readable picture: {err}") from err


def _spans(image: Image.Image, where: str) -> Iterator[tuple[float, float, Image.Image]]:
    """Yield (start, end, frame) in seconds; a frame is good until the next is asked for."""
    at = 0.0
    try:
        for frame in ImageSequence.Iterator(image):
            frame.load()  # WebP tells a frame's duration only then
            start, at = at, at + (float(frame.info.get("duration") or 0) / 1000 or STILL)
            yield start, at, frame
    except (Image.DecompressionBombError, OSError, EOFError, SyntaxError, ValueError) as err:
        raise MediaError(f"{where} is no readable picture: {err}") from err


def _shown(image: Image.Image, times: Sequence[float], where: str) -> Iterator[np.ndarray]:
    """Yield the picture shown at each time (ascending); the last one stays."""
    left, last = list(times), None
    for _, end, frame in _spans(image, where):
        last = rgb_array(frame, where)
        while left and left[0] < end:
            left.pop(0)
            yield last
    yield from (last for _ in left)


MODALITY = Video()
