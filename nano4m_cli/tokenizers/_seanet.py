"""The waveform codec of EnCodec (Defossez et al. 2022, arXiv:2210.13438) at a small size, and its spectral loss.

Strided convolutions of kernel 2 s with a residual unit before each, ELU, channels doubled with every stride, mirrored in
the decoder; a residual quantiser between. Not theirs: strides are in the encoder's order and the first is a layer of its own,
large by default, so that nothing runs at the full rate (on a CPU that is nearly all of the time); the encoder is also given
log magnitudes after it, and latents of one length, both of which make it learn sooner; padding is symmetric; there is no LSTM
and no weight norm.
Legend: B sounds, N samples, C channels, T frames, Q codebooks, D channels of a code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano4m_cli.media_compat import ensure_torchaudio
from nano4m_cli.tokenizers._sound import RATE
from nano4m_cli.tokenizers._vq import ResidualVQ


class Down(nn.Conv1d):
    """(B, C, N) -> (B, out, N / stride), for N a multiple of the stride."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__(channels, out, 2 * stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        s = self.stride[0]
        return super().forward(F.pad(x, (s // 2, s - s // 2)))


class Up(nn.ConvTranspose1d):
    """(B, C, T) -> (B, out, T * stride)."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__(channels, out, 2 * stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        s = self.stride[0]
        return super().forward(x)[..., s // 2 : s // 2 - s]


class Unit(nn.Module):
    """Residual: ELU, convolution of 3, ELU, convolution of 1, at half the channels within. (B, C, N) -> same."""

    def __init__(self, channels: int):
        super().__init__()
        self.wide = nn.Conv1d(channels, channels // 2, 3, padding=1)
        self.out = nn.Conv1d(channels // 2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.elu(self.wide(F.elu(x))))


class Loudness(nn.Module):
    """Mix channels with their log magnitudes, which says how loud each band is whatever its phase. (B, C, N) -> same."""

    def __init__(self, channels: int):
        super().__init__()
        self.mix = nn.Conv1d(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.cat([x, torch.log(x.abs() + 0.01)], 1))


class Codec(nn.Module):
    """Autoencoder of sounds (B, N), N a multiple of the strides' product, with a frame of Q codes per so many samples."""

    def __init__(self, strides: Sequence[int], width: int, dim: int, books: int, codes: int, quantiser: dict[str, Any]):
        super().__init__()
        sizes = [width * 2**i for i in range(len(strides))]
        down: list[nn.Module] = [Down(1, width, strides[0]), Loudness(width)]
        up: list[nn.Module] = [nn.Conv1d(dim, sizes[-1], 7, padding=3)]
        for c, s in zip(sizes, strides[1:], strict=False):
            down += [Unit(c), nn.ELU(), Down(c, 2 * c, s)]
        for c, s in reversed(list(zip(sizes, strides[1:], strict=False))):
            up += [nn.ELU(), Up(2 * c, c, s), Unit(c)]
        self.register_buffer("scale", torch.ones(()))
        self.encoder = nn.Sequential(*down, Unit(sizes[-1]), nn.ELU(), nn.Conv1d(sizes[-1], dim, 7, padding=3))
        self.vq = ResidualVQ(books, codes, dim, **quantiser)
        self.decoder = nn.Sequential(*up, nn.ELU())
        self.out = Up(width, 1, strides[0])

    def latent(self, wave_BN: Tensor) -> Tensor:
        """Return what is quantised (B, T, D), of one length: left alone they shrink to nothing at first."""
        z_BTD = self.encoder(wave_BN[:, None] / self.scale).transpose(1, 2).float()
        return F.layer_norm(z_BTD, z_BTD.shape[-1:])

    def wave(self, value_BTD: Tensor) -> Tensor:
        """Return sounds (B, N) of quantised frames."""
        return self.out(self.decoder(value_BTD.transpose(1, 2)))[:, 0].float() * self.scale


class SpectralLoss:
    """Distance of log-mel spectrograms at several windows, each of 1/4 hop; windows longer than the sounds are left out.

    EnCodec adds an L2 of the same and L1 of the powers; a log with a floor is enough to train by (as the Descript codec does).
    """

    def __init__(self, windows: Sequence[int] = (256, 512, 1024, 2048), floor: float = 1e-3):
        ensure_torchaudio()
        import torchaudio.functional as A

        self.floor = floor
        self.scales = []
        for w in windows:
            mels = max(10, round(5 * math.sqrt(w / 8)))  # 28 bands at 256 samples, 80 at 2048: none is empty
            bank = A.melscale_fbanks(w // 2 + 1, 0.0, RATE / 2, mels, RATE, norm=None, mel_scale="htk")
            self.scales.append((w, torch.hann_window(w), bank))

    def __call__(self, made_BN: Tensor, real_BN: Tensor) -> Tensor:
        fit = [s for s in self.scales if s[0] <= real_BN.shape[-1]] or self.scales[:1]
        return torch.stack([(self.mel(made_BN, *s) - self.mel(real_BN, *s)).abs().mean() for s in fit]).mean()

    def mel(self, wave_BN: Tensor, window: int, hann: Tensor, bank: Tensor) -> Tensor:
        """Return natural log of power (B, frames, mels); a floor in proportion to the window, as the power of noise is."""
        with torch.autocast(wave_BN.device.type, enabled=False):
            spectrum = torch.stft(wave_BN.float(), window, window // 4, window=hann, pad_mode="constant", return_complex=True)
            power = spectrum.real.square() + spectrum.imag.square()
            return torch.log(power.transpose(1, 2) @ bank + self.floor * window / 256)
