"""What can be measured in a sound: log-mel bands, when notes begin, how high they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nano4m_cli.modalities.audio import RATE
from nano4m_cli.tokenizers.fsq_mel import Tokenizer as Mel

HOP, FRAME = RATE // 200, RATE // 50  # samples: energy every 5 ms, over 20 ms
FLOOR = 1e-6  # of power: -60 dB under full scale
RISE = np.log(4.0)  # a note begins where power rises by 6 dB within `AGO` hops
AGO = 5
LISTEN, LATE = 0.06, 0.005  # seconds of a note that its pitch is read from, and after its onset
LOWEST, HIGHEST = 150.0, 1000.0  # Hz: where a fundamental is looked for


def log_mel(raws: Sequence[np.ndarray], size: dict) -> np.ndarray:
    """Return (N, frames, bands): the bands that fsq_mel has by default, so that figures of all tokenizers compare."""
    mel = Mel("audio", Mel.Options(), size)
    few = [mel.log_mel(np.stack([mel.comparable(r) for r in raws[i : i + 8]])).numpy() for i in range(0, len(raws), 8)]
    return np.concatenate(few)


def energy(wave: np.ndarray) -> np.ndarray:
    """Return (frames,) log power around every `HOP` samples, from the first sample on; before and after it is silent."""
    padded = np.pad(wave.astype(np.float64) ** 2, (FRAME // 2, FRAME))
    sums = np.concatenate([[0.0], np.cumsum(padded)])
    starts = np.arange(0, len(wave), HOP)
    return np.log((sums[starts + FRAME] - sums[starts]) / FRAME + FLOOR)


def onset(wave: np.ndarray, expected: float, within: float) -> tuple[float, float]:
    """Return (seconds, rise) of the steepest rise of log power no further than `within` seconds from where it is expected."""
    level = np.concatenate([np.full(AGO, np.log(FLOOR)), energy(wave)])
    rise = level[AGO:] - level[:-AGO]  # (frames,)
    at = np.arange(len(rise)) * HOP / RATE
    near = np.flatnonzero(np.abs(at - expected) <= within)
    if not len(near):
        return expected, 0.0
    best = near[rise[near].argmax()]
    # The rise ends at `best` and began AGO hops before; its middle is where the power grew.
    return max(float(at[best]) - AGO * HOP / RATE / 2, 0.0), float(rise[best])


def pitch(wave: np.ndarray, start: float) -> float:
    """Return the frequency (Hz) of the strongest partial from LOWEST to HIGHEST just after `start` seconds; NaN in silence.

    A parabola through the logs of the highest bin and its neighbours, of a Hann-windowed spectrum, gives parts of bins.
    """
    first = round((start + LATE) * RATE)
    piece = wave[first : first + round(LISTEN * RATE)]
    if len(piece) < RATE // 50 or not np.abs(piece).max() > 1e-4:
        return float("nan")
    points = 1 << 14
    power = np.abs(np.fft.rfft(piece * np.hanning(len(piece)), points)) ** 2 + 1e-20
    low, high = (int(f * points / RATE) for f in (LOWEST, HIGHEST))
    k = low + int(power[low:high].argmax())
    a, b, c = np.log(power[k - 1 : k + 2])
    bent = a - 2 * b + c
    return float((k + (0.5 * (a - c) / bent if bent < 0 else 0.0)) * RATE / points)


def cents(heard: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return |1200 log2(heard / true)|: hundredths of semitones; two octaves (2400) where nothing was heard, and at most."""
    return np.nan_to_num(np.minimum(np.abs(1200 * np.log2(heard / true)), 2400.0), nan=2400.0)
