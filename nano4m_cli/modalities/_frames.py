"""Frames of video files by PyAV (FFmpeg): the picture shown at given times, in bounded memory, upright and square-pixelled."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nano4m_cli.errors import MediaError

LEAD = 1.0  # decoding starts so many seconds early: codecs need what came before, and seeking lands near, not on, a time


def frames(path: Path, times: Sequence[float]) -> Iterator[np.ndarray]:
    """Yield the picture shown at each time (ascending), uint8 (H, W, 3), upright."""
    with container(path) as box:
        if not box.streams.video:
            raise MediaError(f"'{path}' has no picture")
        stream = box.streams.video[0]
        stream.thread_type = "AUTO"
        begin = float((stream.start_time or 0) * stream.time_base)
        shown = ahead = None  # the frame shown at the time before, and the one that follows it
        coming: Iterator[Any] = iter(())
        for time in times:
            if shown is None or begin + time - shown.time > 2 * LEAD:
                box.seek(int((begin + time) / stream.time_base), stream=stream)
                coming = (f for f in decode(box, stream, path) if f.time is not None)
                shown = ahead = next(coming, None)
            while ahead is not None and ahead.time <= begin + time + 1e-6:
                shown, ahead = ahead, next(coming, None)
            if shown is None or (ahead is None and begin + time - shown.time > LEAD):
                raise MediaError(f"'{path}' has no picture at {time:.2f} s: it ends early")
            yield _upright(shown, stream.sample_aspect_ratio)


@contextlib.contextmanager
def container(path: Path) -> Iterator[Any]:
    """Open a media file; one that FFmpeg cannot read is a MediaError."""
    import av

    try:
        with av.open(str(path), metadata_errors="replace") as box:
            yield box
    except (av.FFmpegError, ValueError) as err:
        raise MediaError(f"'{path}' is no readable video or sound: {err}") from err


def decode(box: Any, stream: Any, path: Path) -> Iterator[Any]:
    """Yield the decoded frames of a stream from where the container stands."""
    import av

    try:
        yield from box.decode(stream)
    except (av.FFmpegError, ValueError) as err:
        raise MediaError(f"'{path}' cannot be decoded: {err}") from err


def length(box: Any, streams: Any) -> float:
    """Return the length of the first of the streams, else of the file (0: there is no stream)."""
    if not streams:
        return 0.0
    stream = streams[0]
    if getattr(stream.codec_context, "codec", None) is None:
        return 0.0
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    tag = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))  # Matroska's and WebM's way to say it
    if tag:
        return 3600 * int(tag[1]) + 60 * int(tag[2]) + float(tag[3])
    return float(box.duration or 0) / 1e6


def _upright(frame: Any, aspect: Any) -> np.ndarray:
    """Return (H, W, 3) with square pixels, turned as the display matrix says (counter-clockwise, quarters)."""
    width = round(frame.width * float(aspect)) if aspect and aspect > 0 else frame.width
    picture = frame.reformat(width=width, format="rgb24").to_ndarray()
    return np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90) % 4))
