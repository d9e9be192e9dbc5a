"""One note per object: shape is timbre, size is pitch, material is decay. Colour and place cannot be heard.

Waves are read from tables by integer phase, so that a clip costs a few array operations and is the same everywhere.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache

import numpy as np

from nano4m_cli.modalities.audio import RATE

PITCH = {"large": 220.0, "small": 660.0}  # Hz, times the detune
DETUNE = 0.03  # pitch is off by up to this part
DECAY = {"rubber": 0.05, "metal": 0.30}  # seconds to 1/e
LEVEL = (0.21, 0.31)  # a note's peak stays below its level: three notes never reach 1
ATTACK, FADE_OUT = 0.004, 0.008  # seconds
# (ratio to the pitch, amplitude): nearly a sine; odd harmonics; inharmonic, as a struck tube
PARTIALS = {
    "sphere": ((1.0, 1.0), (2.0, 0.05)),
    "cube": tuple((float(k), 1.0 / k) for k in (1, 3, 5, 7, 9, 11)),
    "cylinder": ((1.0, 1.0), (2.76, 0.6), (5.40, 0.4), (8.93, 0.25)),
}
SLOTS = 3  # object i sounds from i / SLOTS of the clip
_LOUDNESS = 0.38  # RMS of every timbre before level and decay
_BITS = 14  # of the table index
_PERIOD = 2 * np.pi * np.arange(1 << _BITS) / (1 << _BITS)


@cache
def _sine() -> np.ndarray:
    return np.sin(_PERIOD).astype(np.float32)


@cache
def _timbre(shape: str) -> tuple[tuple[float, np.float32, np.ndarray], ...]:
    """Return (ratio, gain, one period) per wave to add; harmonic partials make one wave together."""
    partials = PARTIALS[shape]
    gain = _LOUDNESS / math.sqrt(sum(a * a for _, a in partials) / 2)
    if all(ratio == int(ratio) for ratio, _ in partials):
        period = sum(a * np.sin(ratio * _PERIOD) for ratio, a in partials)
        return ((1.0, np.float32(gain), period.astype(np.float32)),)
    return tuple((ratio, np.float32(gain * a), _sine()) for ratio, a in partials)


@lru_cache(maxsize=8)
def _envelope(material: str, samples: int) -> np.ndarray:
    """Return float32 (up to samples,): attack and decay, cut where 16 bits no longer hold it."""
    t = np.arange(min(samples, int(12 * DECAY[material] * RATE))) / RATE
    return (np.minimum(t / ATTACK, 1.0) * np.exp(-t / DECAY[material])).astype(np.float32)


@lru_cache(maxsize=2)
def _clock(samples: int) -> np.ndarray:
    return np.arange(samples, dtype=np.uint32)


def note(shape: str, material: str, hertz: float, level: float, samples: int) -> np.ndarray:
    """Return float32 (up to samples,)."""
    envelope = _envelope(material, samples)
    clock = _clock(samples)[: len(envelope)]
    wave = np.zeros(len(envelope), np.float32)
    for ratio, gain, period in _timbre(shape):
        step = np.uint32(round(hertz * ratio / RATE * 2.0**32))
        wave += gain * period.take((clock * step) >> np.uint32(32 - _BITS))  # the phase wraps by itself
    wave *= envelope
    wave *= np.float32(level)
    return wave


def clip(notes: list[tuple[str, str, float, float]], seconds: float) -> np.ndarray:
    """Return float32 (round(seconds * RATE),): notes (shape, material, hertz, level) at their slots of onset."""
    samples = round(seconds * RATE)
    out = np.zeros(samples, np.float32)
    for i, (shape, material, hertz, level) in enumerate(notes):
        start = round(i * samples / SLOTS)
        wave = note(shape, material, hertz, level, samples)[: samples - start]
        out[start : start + len(wave)] += wave
    fade = min(samples, round(FADE_OUT * RATE))
    out[samples - fade :] *= np.linspace(1, 0, fade, dtype=np.float32)
    return out
