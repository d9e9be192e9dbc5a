"""Sound to codes: log-mel frames, a patch autoencoder with finite scalar quantisation, phase reconstruction.

Preprocessing (one place: `log_mel`): mono 24 kHz, cut or padded with silence to `seconds`; Hann window of `window`
samples, hop 250 (96 frames/s); `mels` bands between `low_hz` and `high_hz`; natural log of power with a floor of
1e-2. A code covers `frames` successive frames. Decoding inverts the mel bands and runs Griffin-Lim.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from nano4m_cli.config import Config
from nano4m_cli.media_compat import ensure_torchaudio
from nano4m_cli.spec import TokenSpec
from nano4m_cli.tokenizers._base import GradientTokenizer, check_ids
from nano4m_cli.tokenizers._patch_ae import PatchAutoencoder
from nano4m_cli.tokenizers._sound import RATE, adapted, check_sounds, fixed

HOP = 250
INVERSIONS = 30  # updates when mel bands are inverted
FLOOR = 1e-2  # about 62 dB under a loud tone: what lies below is the noise of 16 bits and of phase reconstruction


class Tokenizer(GradientTokenizer):
    class Options(Config):
        """frames: mel frames per code. window: samples per analysis window. griffin_lim: iterations when decoding.

        variants: of each sample of the train split, the first as it is and the others varied (`Modality.vary`).
        """

        frames: int = 3
        mels: int = 64
        window: int = 1024
        low_hz: float = 40.0
        high_hz: float = 12_000.0
        levels: tuple[int, ...] = (8, 5, 5, 5)
        width: int = 128
        depth: int = 2
        emphasis: float = 1.0
        encoder_mixing: bool = False
        griffin_lim: int = 16
        variants: int = Field(1, ge=1)
        fit_samples: int = 4_000
        fit_steps: int | None = None

    name = "fsq_mel"
    train = {"steps": 280, "batch": 64, "lr": 3e-3, "optimizer": "muon", "muon_lr": 0.03, "warmup": 40}

    def __init__(self, modality: str, options: Config, size: dict[str, Any]):
        super().__init__(modality, options, size)
        step = HOP * options.frames
        self.samples = -(-round(size["seconds"] * RATE) // step) * step
        self.steps = self.samples // step
        self.sha256 = ""
        ensure_torchaudio()
        import torchaudio.functional as A

        bins = options.window // 2 + 1
        self.bank = A.melscale_fbanks(bins, options.low_hz, options.high_hz, options.mels, RATE, norm=None, mel_scale="htk")
        self.inverse = torch.linalg.pinv(self.bank)  # (mels, bins)
        self.hann = torch.hann_window(options.window)

    def comparable(self, raw: np.ndarray) -> np.ndarray:
        return fixed(raw, self.samples)

    def adapt(self, raw: np.ndarray) -> tuple[np.ndarray, str | None]:
        return adapted(raw, self.samples, self.modality)

    def log_mel(self, waves_BN: np.ndarray | Tensor) -> Tensor:
        """Return float32 (B, frames, mels) of (B, samples)."""
        x = torch.as_tensor(waves_BN)
        w = self.options.window
        spectrum = torch.stft(x, w, HOP, window=self.hann, center=True, pad_mode="constant", return_complex=True)
        spectrum = spectrum[..., :-1]  # the last frame is centred on the end of the clip
        power = spectrum.real.square() + spectrum.imag.square()  # abs() would guard against overflow, slowly
        return torch.log(torch.einsum("bft,fm->btm", power, self.bank) + FLOOR)

    def _patches(self, raws: Sequence[np.ndarray]) -> Tensor:
        """Return (B, steps, 1, frames * mels)."""
        # A few clips at a time: their spectra stay in the cache, and memory is not faulted in anew for each batch.
        waves = [fixed(r, self.samples) for r in raws]
        mel = torch.cat([self.log_mel(np.stack(waves[i : i + 8])) for i in range(0, len(waves), 8)])
        return mel.reshape(len(raws), self.steps, 1, -1)

    def spec(self) -> TokenSpec:
        o = self.options
        return TokenSpec(
            modality=self.modality, kind="codes", shape=(self.steps, 1), vocab_size=int(np.prod(o.levels)),
            levels=o.levels, tokenizer=self.ref(self.sha256), variants=o.variants,
            preprocess={"rate": RATE, "samples": self.samples, "hop": HOP, "window": o.window, "mels": o.mels},
        )

    def encode(self, raws: Sequence[np.ndarray], where: Sequence[str] | None = None) -> list[np.ndarray]:
        check_sounds(raws, where)
        with torch.inference_mode():
            _, codes = self.module.encode(self._patches(raws))
        return list(codes.reshape(len(raws), -1).numpy())

    def decode_mel(self, ids: Sequence[np.ndarray]) -> Tensor:
        """Return the log-mel (B, frames, mels) that the ids stand for."""
        spec = self.spec()
        codes = np.stack([check_ids(np.asarray(i), (self.steps, 1), spec, "decode") for i in ids])
        return self._mel(self.module.fsq.decode(torch.from_numpy(codes)).flatten(1, 2))

    def _mel(self, values_BSD: Tensor) -> Tensor:
        with torch.inference_mode():
            patches = self.module.decode_values(values_BSD.unflatten(1, (self.steps, 1)))
        return patches.reshape(len(values_BSD), self.steps * self.options.frames, -1)

    def decode(self, ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self._waves(self.decode_mel(ids))

    def decode_values(self, values_BSD: np.ndarray) -> list[np.ndarray]:
        return self._waves(self._mel(torch.from_numpy(values_BSD)))

    def _waves(self, mel: Tensor) -> list[np.ndarray]:
        # A few clips per thread: their spectra stay in the cache, and small transforms gain nothing from more threads.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(threads) as pool:
                parts = pool.map(self.to_wave, mel.split(8))
                return [wave for part in parts for wave in part]
        finally:
            torch.set_num_threads(threads)

    def invert_mel(self, power_BTM: Tensor) -> Tensor:
        """Return power (B, T, bins) >= 0 whose mel bands come near `power_BTM`: non-negative least squares.

        Multiplicative updates (Lee and Seung 2001) from the clipped pseudo-inverse, which alone spills power into
        neighbouring bands (bench: scripts/bench/audio_inversion.py).
        """
        x = (power_BTM @ self.inverse).clamp_min(0)
        x = x + 1e-3 * power_BTM.mean(-1, keepdim=True) + 1e-8  # nothing is zero for good
        wanted = power_BTM @ self.bank.T
        for _ in range(INVERSIONS):
            x *= wanted / ((x @ self.bank) @ self.bank.T + 1e-8)
        return x

    def to_wave(self, log_mel_BTM: Tensor) -> np.ndarray:
        """Return (B, samples): `invert_mel`, then Griffin-Lim from a fixed phase."""
        import torchaudio.functional as A

        power = (log_mel_BTM.float().exp() - FLOOR).clamp_min(0)
        magnitude = self.invert_mel(power).sqrt().transpose(1, 2)
        magnitude = torch.cat([magnitude, magnitude[..., -1:]], -1)
        wave = A.griffinlim(
            magnitude, self.hann, self.options.window, HOP, self.options.window, 1.0,
            self.options.griffin_lim, 0.99, self.samples, False,
        )
        return wave.clamp(-1, 1).numpy()

    def fit(self, raws: Iterable[np.ndarray]) -> None:
        self._make()
        raws = list(raws)
        self.data = torch.cat([self._patches(raws[i : i + 256]) for i in range(0, len(raws), 256)])
        self.module.centre(self.data)

    def _make(self) -> None:
        o = self.options
        self.module = PatchAutoencoder((self.steps, 1), o.frames * o.mels, o.levels, o.width, o.depth, o.encoder_mixing)

    def build(self, state: dict[str, Tensor]) -> None:
        self._make()

    def loss(self, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, mse = self.module.loss(self.data[index], self.options.emphasis)
        return loss, {"mse": mse}

    def codes(self, index: Tensor) -> Tensor:
        return self.module.encode(self.data[index])[1].reshape(-1, 1)
