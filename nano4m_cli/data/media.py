"""Moments of media files: frames and sound at given times of videos and recordings of any length, in bounded memory.

PyAV (FFmpeg) reads what soundfile does not. Times are seconds from the start of the file's first stream; rotation that a
phone wrote into the file is applied, several channels are mixed down to one.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from nano4m_cli.errors import MediaError
from nano4m_cli.modalities.audio import RATE, canonical

EXACT = {".wav", ".flac", ".ogg", ".aiff"}  # soundfile reads these, sample by sample
LEAD = 1.0  # decoding starts so many seconds early: codecs need what came before, and seeking lands near, not on, a time
SLACK = 0.05  # a clip may lack so many seconds at its end: containers round their length


@dataclass(frozen=True)
class Facts:
    """Seconds of picture and of sound that a file holds; 0 where it has none."""

    video: float
    audio: float


def facts(path: Path) -> Facts:
    """Return what a media file holds, from its headers; unreadable files are MediaErrors."""
    if path.stat().st_size == 0:
        raise MediaError(f"'{path}' is empty (0 bytes)")
    if path.suffix.lower() in EXACT:
        with _sound_file(path) as file:
            return Facts(0.0, file.frames / file.samplerate)
    with _container(path) as box:
        return Facts(_seconds(box, box.streams.video), _seconds(box, box.streams.audio))


def frames(path: Path, times: Sequence[float]) -> Iterator[np.ndarray]:
    """Yield the picture shown at each time (ascending), uint8 (H, W, 3), upright."""
    with _container(path) as box:
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
                coming = (f for f in _decode(box, stream, path) if f.time is not None)
                shown = ahead = next(coming, None)
            while ahead is not None and ahead.time <= begin + time + 1e-6:
                shown, ahead = ahead, next(coming, None)
            if shown is None or (ahead is None and begin + time - shown.time > LEAD):
                raise MediaError(f"'{path}' has no picture at {time:.2f} s: it ends early")
            yield _upright(shown, stream.sample_aspect_ratio)


def sound(path: Path, start: float, seconds: float) -> np.ndarray:
    """Return mono sound at 24 kHz, float32 (round(seconds * 24000),) from `start`; a file that ends earlier is a MediaError."""
    if path.suffix.lower() in EXACT:
        with _sound_file(path) as file:
            file.seek(min(round(start * file.samplerate), file.frames))
            try:
                wave = file.read(round(seconds * file.samplerate), dtype="float32", always_2d=True)
            except (soundfile.LibsndfileError, RuntimeError) as err:
                raise MediaError(f"'{path}' cannot be decoded: {err}") from err
            rate = file.samplerate
        wave = canonical(wave, rate, f"'{path}'")
    else:
        wave = _decoded_sound(path, start, seconds)
    wanted = round(seconds * RATE)
    if wanted - len(wave) > SLACK * RATE:
        raise MediaError(f"'{path}' has no sound beyond {start + len(wave) / RATE:.2f} s: it ends early")
    return np.pad(wave[:wanted], (0, max(0, wanted - len(wave))))


def _decoded_sound(path: Path, start: float, seconds: float) -> np.ndarray:
    import av

    with _container(path) as box:
        if not box.streams.audio:
            raise MediaError(f"'{path}' has no sound")
        stream = box.streams.audio[0]
        begin = float((stream.start_time or 0) * stream.time_base)
        if start > 2 * LEAD:
            box.seek(int((begin + start - LEAD) / stream.time_base), stream=stream)
        resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
        parts: list[np.ndarray] = []
        first = None
        for frame in _decode(box, stream, path):
            if first is None:
                first = (frame.time or begin) - begin
            parts += [part.to_ndarray().reshape(-1) for part in resampler.resample(frame)]
            if first + sum(map(len, parts)) / RATE > start + seconds + SLACK:
                break
        parts += [part.to_ndarray().reshape(-1) for part in resampler.resample(None)]
    wave = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if not len(wave):
        raise MediaError(f"'{path}' has a sound track without sound")
    if not np.isfinite(wave).all():
        raise MediaError(f"'{path}' holds NaN or infinite samples")
    skip = round((start - first) * RATE)
    wave = np.pad(wave, (max(0, -skip), 0))[max(0, skip) :]
    return wave.astype(np.float32)


@contextlib.contextmanager
def _container(path: Path) -> Iterator[Any]:
    import av

    try:
        with av.open(str(path), metadata_errors="replace") as box:
            yield box
    except (av.FFmpegError, ValueError) as err:
        raise MediaError(f"'{path}' is no readable video or sound: {err}") from err


def _decode(box: Any, stream: Any, path: Path) -> Iterator[Any]:
    import av

    try:
        yield from box.decode(stream)
    except (av.FFmpegError, ValueError) as err:
        raise MediaError(f"'{path}' cannot be decoded: {err}") from err


@contextlib.contextmanager
def _sound_file(path: Path) -> Iterator[soundfile.SoundFile]:
    try:
        file = soundfile.SoundFile(str(path))
    except (soundfile.LibsndfileError, RuntimeError) as err:
        raise MediaError(f"'{path}' is no readable sound: {err}") from err
    with file:
        yield file


def _seconds(box: Any, streams: Any) -> float:
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
