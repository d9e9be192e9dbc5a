"""Sound: float32 (samples,), mono, 24 kHz, in [-1, 1]; 16-bit FLAC in shards, WAV for people."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import soundfile

from nano4m_cli.errors import MediaError
from nano4m_cli.modalities._base import Modality
from nano4m_cli.modalities._image import read_bytes

RATE = 24_000


class Audio(Modality):
    name, ext, kind, suffix = "audio", "audio.flac", "audio", ".wav"
    tokenizer = "fsq_mel"

    def from_bytes(self, data: bytes, where: str) -> np.ndarray:
        try:
            wave, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError) as err:
            raise MediaError(f"{where} is no readable sound: {err}") from err
        return canonical(wave, rate, where)

    def to_bytes(self, raw: np.ndarray) -> bytes:
        return _encode(raw, "FLAC")

    def read_file(self, path: Path) -> np.ndarray:
        return self.from_bytes(read_bytes(path), f"'{path}'")

    def conversion(self, path: Path) -> str | None:
        info = soundfile.info(str(path))
        if info.samplerate == RATE and info.channels == 1:
            return None
        return f"'{path}' has {info.samplerate} Hz and {info.channels} channel(s) and was converted to {RATE} Hz mono"

    def vary(self, raw: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the sound as another speaker or distance would give it: speed and pitch by 0.85 to 1.18 (as one: it is played
        at another rate), begun up to 50 ms later, 4 dB louder or softer."""
        speed, late, gain = np.exp(rng.uniform(-0.165, 0.165)), rng.integers(0, RATE // 20), 10 ** (rng.uniform(-4, 4) / 20)
        at = np.arange(round(len(raw) / speed)) * speed
        played = np.interp(at, np.arange(len(raw)), raw) * min(gain, 0.99 / max(float(np.abs(raw).max()), 1e-6))
        return np.concatenate([np.zeros(late), played]).astype(np.float32)

    def write_file(self, raw: np.ndarray, path: Path) -> None:
        path.write_bytes(_encode(raw, "WAV"))

    def show(self, raw: np.ndarray) -> np.ndarray:
        """Log-frequency-free spectrogram, low notes at the bottom, 80 dB range."""
        return spectrogram_picture(raw)


def canonical(wave: np.ndarray, rate: int, where: str) -> np.ndarray:
    """Return (samples,) mono at RATE from (samples, channels); empty and non-finite sounds are MediaErrors."""
    if wave.shape[0] == 0:
        raise MediaError(f"{where} holds no samples", "give a sound of at least a few milliseconds")
    mono = wave.mean(axis=1) if wave.shape[1] > 1 else wave[:, 0]
    if not np.isfinite(mono).all():
        raise MediaError(f"{where} holds NaN or infinite samples")
    return resample(mono, rate, RATE)


def resample(wave: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Return the sound at `target` Hz (torchaudio's windowed sinc); ceil(n * target / rate) samples."""
    if rate == target:
        return wave.astype(np.float32)
    import torch  # late: a shard of 24 kHz sound is read without it

    from nano4m_cli.media_compat import ensure_torchaudio

    ensure_torchaudio()
    import torchaudio.functional

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # clips are short: spreading one over cores costs more than it saves
    try:
        return torchaudio.functional.resample(torch.from_numpy(wave.astype(np.float32)), rate, target).numpy()
    finally:
        torch.set_num_threads(threads)


def spectrogram_picture(wave: np.ndarray, n_fft: int = 512, hop: int = 128, rows: int = 96) -> np.ndarray:
    """Return uint8 (rows, frames, 3): magnitudes in dB under the loudest, on a mel-like axis up to 12 kHz."""
    wave = np.pad(wave, (n_fft // 2, n_fft // 2))
    frames = np.lib.stride_tricks.sliding_window_view(wave, n_fft)[::hop] * np.hanning(n_fft)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2  # (frames, bins)
    mel = np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), rows)
    hz = 700 * (10 ** (mel / 2595) - 1)
    at = hz / (RATE / 2) * (power.shape[1] - 1)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, power.shape[1] - 1)
    rows_p = power[:, low] * (1 - (at - low)) + power[:, high] * (at - low)
    db = 10 * np.log10(rows_p.T[::-1] + 1e-10)
    top = max(float(db.max()), -60.0)
    t = np.clip((db - top + 80) / 80, 0, 1)
    stops = np.array([[8, 12, 30], [35, 60, 120], [40, 140, 140], [150, 200, 90], [255, 250, 190]], dtype=np.float64)
    return np.stack([np.interp(t, np.linspace(0, 1, 5), stops[:, c]) for c in range(3)], -1).astype(np.uint8)


def _encode(raw: np.ndarray, container: str) -> bytes:
    assert raw.ndim == 1, raw.shape
    out = io.BytesIO()
    pcm = np.clip(np.rint(np.asarray(raw, dtype=np.float64) * 32767), -32768, 32767).astype(np.int16)
    soundfile.write(out, pcm, RATE, format=container, subtype="PCM_16")
    return out.getvalue()


MODALITY = Audio()
