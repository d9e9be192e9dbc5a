"""How near one recording of speech comes to another: mel-cepstral distance along the best alignment, STOI, PESQ.

Recordings are (samples,) at RATE. Before anything is compared, what is more than RANGE dB under a recording's loudest frame is
cut off at both ends: the silence that fills a clip up would count as speech that is right.
Legend: T frames of a recording, K mel bands, D cepstral coefficients.
"""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import torch

from nano4m_cli.errors import UsageError
from nano4m_cli.media_compat import ensure_torchaudio
from nano4m_cli.modalities.audio import RATE, resample

RANGE = 40.0  # dB; what pystoi takes for silence as well
FRAME, HOP = 600, 120  # samples: 25 and 5 ms
FFT, BANDS, ORDER = 1024, 40, 13  # mel bands of 0 to 8 kHz; coefficients c1 .. c13
TOP_HZ = 8000.0
DEPTH = 80.0  # dB under a recording's loudest band, below which all counts as equally silent
INSTALL = {
    "pystoi": "pip install pystoi",
    "pesq": "pip install 'nano4m[pesq]' (it is compiled: a C compiler is needed), or leave out tts.pesq",
}
SHORTEST = 0.5  # seconds, under which STOI means nothing


def trimmed(wave: np.ndarray) -> np.ndarray:
    """Return the recording without the silence at both ends; all of silence is empty."""
    n = len(wave) // HOP
    if not n or not np.abs(wave).max() > 0:
        return wave[:0]
    power = (wave[: n * HOP].reshape(n, HOP).astype(np.float64) ** 2).mean(1)
    loud = np.flatnonzero(power > power.max() * 10 ** (-RANGE / 10))
    return wave[loud[0] * HOP : (loud[-1] + 1) * HOP]


def seconds(wave: np.ndarray) -> float:
    """Return how long speech lasts in a recording."""
    return len(trimmed(wave)) / RATE


def cepstra(wave: np.ndarray) -> np.ndarray:
    """Return float64 (T, ORDER): c1 .. c13 of each frame's log mel spectrum in nats, without c0, the level.

    ln |H_k| = c0 + sum over d of c_d cos(pi d (k + 1/2) / K), so that the root mean square difference of two log spectra, each
    smoothed to D coefficients and taken without its level, is sqrt(1/2 sum (c_d - c'_d)^2).
    """
    ensure_torchaudio()
    import torchaudio.functional as A

    x = torch.as_tensor(np.pad(np.asarray(wave, np.float64), (0, max(0, FRAME - len(wave)))))
    frames = x.unfold(0, FRAME, HOP) * torch.hann_window(FRAME, dtype=torch.float64)
    power = torch.fft.rfft(frames, FFT).abs().square()
    bank = A.melscale_fbanks(FFT // 2 + 1, 0.0, TOP_HZ, BANDS, RATE, norm="slaney", mel_scale="htk").double()
    mel_TK = power @ bank
    log_TK = 0.5 * torch.log(torch.clamp(mel_TK, min=max(float(mel_TK.max()), 1e-30) * 10 ** (-DEPTH / 10)))
    k = torch.arange(BANDS, dtype=torch.float64) + 0.5
    cosines_KD = torch.cos(torch.pi / BANDS * k[:, None] * torch.arange(1, ORDER + 1))
    return (2.0 / BANDS * log_TK @ cosines_KD).numpy()


def align(cost_TU: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the path (rows, columns) from the first cell to the last along which the costs sum to the least (dynamic time
    warping, Sakoe and Chiba 1978, steps (1, 1), (1, 0), (0, 1) of equal weight); of equal ways the diagonal one."""
    t, u = cost_TU.shape
    total = np.full((t + 1, u + 1), np.inf)
    total[0, 0] = 0.0
    for s in range(2, t + u + 1):  # antidiagonals i + j = s of the padded table: their cells wait for none of each other
        i = np.arange(max(1, s - u), min(t, s - 1) + 1)
        j = s - i
        total[i, j] = cost_TU[i - 1, j - 1] + np.minimum(total[i - 1, j - 1], np.minimum(total[i - 1, j], total[i, j - 1]))
    i, j, path = t, u, []
    while i and j:
        path.append((i - 1, j - 1))
        back = (total[i - 1, j - 1], total[i - 1, j], total[i, j - 1])
        step = back.index(min(back))
        i, j = i - (step != 2), j - (step != 1)
    rows, columns = zip(*path[::-1], strict=True)
    return np.array(rows), np.array(columns)


def mcd(made: np.ndarray, truth: np.ndarray) -> float:
    """Return the mel-cepstral distance in dB (NaN where one of the two is silent), its mean over the best alignment's frame pairs:
    (10 / ln 10) sqrt(2 sum over d of (c_d - c'_d)^2) (Kubichek 1993), which is the root mean square difference in dB of two
    smoothed log spectra without their levels (see `cepstra`). Its cepstra come from mel bands, not from WORLD or SPTK: figures
    compare with each other, not with those of other tools."""
    a, b = trimmed(made), trimmed(truth)
    if not len(a) or not len(b):
        return float("nan")
    a_TD, b_UD = cepstra(a), cepstra(b)
    distance = np.sqrt(2 * np.maximum(((a_TD[:, None] - b_UD[None]) ** 2).sum(-1), 0.0)) * 10 / np.log(10)
    rows, columns = align(distance)
    return float(distance[rows, columns].mean())


def stoi(made: np.ndarray, truth: np.ndarray) -> float:
    """Return short-time objective intelligibility, about 0 to 1 (Taal et al. 2011, by pystoi); NaN where the true speech lasts
    less than SHORTEST or the made one is silent. Both keep their time: it compares moment with moment."""
    try:
        import pystoi
    except ImportError as err:
        raise lacks("pystoi") from err
    n = min(len(made), len(truth))
    made, truth = made[:n].astype(np.float64), truth[:n].astype(np.float64)
    if seconds(truth) < SHORTEST or not np.abs(made).max(initial=0) > 0:
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # pystoi warns, and returns 1e-5, where too little is left
        try:
            return float(pystoi.stoi(truth, made, RATE, extended=False))
        except RuntimeWarning:
            return float("nan")


def pesq(made: np.ndarray, truth: np.ndarray) -> float:
    """Return wide-band PESQ (ITU-T P.862.2, by the package pesq), 1 to 4.6; NaN where there is no speech to compare."""
    try:
        import pesq as package
    except ImportError as err:
        raise lacks("pesq") from err
    n = min(len(made), len(truth))
    made, truth = (resample(w[:n], RATE, 16_000) for w in (made, truth))
    if not np.abs(made).max(initial=0) > 0 or not np.abs(truth).max(initial=0) > 0:
        return float("nan")
    with contextlib.suppress(package.PesqError):
        return float(package.pesq(16_000, truth, made, "wb"))
    return float("nan")


def lacks(name: str) -> UsageError:
    """Return the error for a package that is not installed."""
    return UsageError(f"package '{name}' is not installed", INSTALL[name])
