"""Moments of media files: frames and sound at given times of videos and recordings of any length, in bounded memory.

PyAV (FFmpeg) reads what soundfile does not. Times are seconds from the start of the file's first stream; rotation that a
phone wrote into the file is applied, several channels are mixed down to one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from nano4m_cli.errors import MediaError
from nano4m_cli.modalities._frames import LEAD, container, decode, frames, length
from nano4m_cli.modalities.audio import RATE, canonical

__all__ = ["Facts", "facts", "frames", "sound"]

EXACT = {".wav", ".flac", ".ogg", ".aiff"}  # soundfile reads these, sample by sample
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
    with container(path) as box:
        return Facts(length(box, box.streams.video), length(box, box.streams.audio))


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

    with container(path) as box:
        if not box.streams.audio:
            raise MediaError(f"'{path}' has no sound")
        stream = box.streams.audio[0]
        begin = float((stream.start_time or 0) * stream.time_base)
        if start > 2 * LEAD:
            box.seek(int((begin + start - LEAD) / stream.time_base), stream=stream)
        resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
        parts: list[np.ndarray] = []
        first = None
        for frame in decode(box, stream, path):
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
def _sound_file(path: Path) -> Iterator[soundfile.SoundFile]:
    try:
        file = soundfile.SoundFile(str(path))
    except (soundfile.LibsndfileError, RuntimeError) as err:
        raise MediaError(f"'{path}' is no readable sound: {err}") from err
    with file:
        yield file
