"""The decoder of WavTokenizer: Vocos (Siuzdak 2023, arXiv:2306.00814) with attention before its blocks.

Features go through convolutions at their own rate to the magnitude and phase of a spectrum per frame; its inverse
short-time Fourier transform is the sound. Names of tensors are the published ones. Legend: B batch, C channels, T frames.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
LOUDEST = 100.0  # magnitudes are clipped here


class AdaNorm(nn.Module):
    """Layer norm over channels with scale and shift by bandwidth, of which the published models use the first."""

    def __init__(self, bandwidths: int, width: int):
        super().__init__()
        self.scale, self.shift = nn.Embedding(bandwidths, width), nn.Embedding(bandwidths, width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return F.layer_norm(x_BTC, x_BTC.shape[-1:], self.scale.weight[0], self.shift.weight[0], EPS)


class ConvNeXt(nn.Module):
    def __init__(self, width: int, hidden: int, bandwidths: int):
        super().__init__()
        self.dwconv = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.norm = AdaNorm(bandwidths, width)
        self.pwconv1, self.pwconv2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x_BCT: Tensor) -> Tensor:
        y_BTC = self.norm(self.dwconv(x_BCT).transpose(1, 2))
        y_BTC = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y_BTC)))
        return x_BCT + y_BTC.transpose(1, 2)


def group_norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=EPS)


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = group_norm(width), group_norm(width)
        self.conv1, self.conv2 = nn.Conv1d(width, width, 3, padding=1), nn.Conv1d(width, width, 3, padding=1)

    def forward(self, x_BCT: Tensor) -> Tensor:
        return x_BCT + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x_BCT))))))


class Attention(nn.Module):
    """One head over all frames."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = group_norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv1d(width, width, 1) for _ in range(4))

    def forward(self, x_BCT: Tensor) -> Tensor:
        y = self.norm(x_BCT)
        q, k, v = (layer(y).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x_BCT + self.proj_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2))


class Backbone(nn.Module):
    """(B, features, T) -> (B, T, width)."""

    def __init__(self, features: int, width: int, hidden: int, layers: int, bandwidths: int):
        super().__init__()
        self.embed = nn.Conv1d(features, width, 7, padding=3)
        self.pos_net = nn.Sequential(
            Residual(width), Residual(width), Attention(width), Residual(width), Residual(width), group_norm(width)
        )
        self.norm = AdaNorm(bandwidths, width)
        self.convnext = nn.ModuleList(ConvNeXt(width, hidden, bandwidths) for _ in range(layers))
        self.final_layer_norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, x_BCT: Tensor) -> Tensor:
        x_BCT = self.norm(self.pos_net(self.embed(x_BCT)).transpose(1, 2)).transpose(1, 2)
        for block in self.convnext:
            x_BCT = block(x_BCT)
        return self.final_layer_norm(x_BCT.transpose(1, 2))


class Head(nn.Module):
    """(B, T, width) -> (B, T * hop): spectra, then overlapping windows, with as much cut at both ends as makes T hops."""

    def __init__(self, width: int, n_fft: int, hop: int):
        super().__init__()
        self.hop = hop
        self.out = nn.Linear(width, n_fft + 2)
        self.istft = nn.Module()
        self.istft.register_buffer("window", torch.hann_window(n_fft))

    def forward(self, x_BTC: Tensor) -> Tensor:
        log_magnitude, phase = self.out(x_BTC).transpose(1, 2).chunk(2, dim=1)
        return self.inverse(torch.polar(log_magnitude.exp().clamp(max=LOUDEST), phase))

    def inverse(self, spectrum_BFT: Tensor) -> Tensor:
        """Return the sound of spectra; torch.istft cannot, as the windows' sum vanishes at the first sample, which is cut."""
        window = self.istft.window
        n, frames = len(window), spectrum_BFT.shape[-1]
        cut = (n - self.hop) // 2
        pieces = torch.fft.irfft(spectrum_BFT, n, dim=1) * window[:, None]
        total = window.square()[None, :, None].expand(1, n, frames)
        wave, weight = (
            F.fold(x, (1, (frames - 1) * self.hop + n), (1, n), stride=(1, self.hop))[:, 0, 0, cut : cut + frames * self.hop]
            for x in (pieces, total)
        )
        return wave / weight
