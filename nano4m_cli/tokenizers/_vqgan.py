"""The convolutional autoencoder of VQGAN (Esser et al. 2021, arXiv:2012.09841) at any size, and its reconstruction loss.

Residual blocks with group norm and swish, halving the resolution between levels, attention where it is lowest. Two things
are not the paper's: `stem` pixels each way are folded into channels before the first convolution (1: as in the paper),
since on a CPU nearly all time goes into full-resolution layers; and, as the FSQ tokenizers here, the network models the
residual to the mean picture and weighs pixels by how far they lie from it. LPIPS is not used: it is a pretrained network
out of torchvision. The structure term compares differences between neighbouring pixels at several scales instead
(Mathieu et al. 2016, arXiv:1511.05440), and the critic, where asked for, is a learned one.
Legend: B pictures, C channels, D channels of a code, h, w the code grid.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano4m_cli.tokenizers._vq import VectorQuantizer


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(8 if channels % 8 == 0 else 1, channels, eps=1e-6)


class Block(nn.Module):
    """Residual: norm, swish, 3 x 3 convolution, twice. (B, C, h, w) -> same."""

    def __init__(self, channels: int):
        super().__init__()
        self.norms = nn.ModuleList(norm(channels) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        nn.init.normal_(self.convs[1].weight, std=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for n, conv in zip(self.norms, self.convs, strict=True):
            y = conv(F.silu(n(y)))
        return x + y


class Attention(nn.Module):
    """Residual: one head over all places. (B, C, h, w) -> same."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.qkv, self.out = norm(channels), nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
        nn.init.normal_(self.out.weight, std=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, -1)
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.out(y.transpose(1, 2).view_as(x))


class VQGAN(nn.Module):
    """Autoencoder of pictures (B, C, H, W) with one code per `downsample` pixels each way.

    Args:
        size: (H, W). width: channels at the finest level, doubled at each up to four times. depth: blocks per level.
        dim: D. quantiser: options of `VectorQuantizer`.
    """

    def __init__(self, channels: int, size: tuple[int, int], downsample: int, stem: int, width: int, depth: int, codes: int,
                 dim: int, quantiser: dict[str, Any]):
        super().__init__()
        levels = (downsample // stem).bit_length()  # one more than halvings
        sizes = [width * min(2**i, 4) for i in range(levels)]
        self.register_buffer("mean", torch.zeros(channels, *size))
        self.register_buffer("scale", torch.ones(()))
        down: list[nn.Module] = [nn.PixelUnshuffle(stem), nn.Conv2d(channels * stem**2, width, 3, padding=1)]
        up: list[nn.Module] = [nn.Conv2d(dim, sizes[-1], 3, padding=1)]
        for i, c in enumerate(sizes):
            down += [Block(c) for _ in range(depth)]
            down += [nn.Conv2d(c, sizes[i + 1], 4, 2, 1)] if i + 1 < levels else [Attention(c)]
        for i, c in reversed(list(enumerate(sizes))):
            up += ([Attention(c)] if i + 1 == levels else []) + [Block(c) for _ in range(depth)]
            up += [nn.Upsample(scale_factor=2), nn.Conv2d(c, sizes[i - 1], 3, padding=1)] if i else []
        self.encoder = nn.Sequential(*down, norm(sizes[-1]), nn.SiLU(), nn.Conv2d(sizes[-1], dim, 1))
        self.vq = VectorQuantizer(codes, dim, **quantiser)
        self.decoder = nn.Sequential(*up, norm(width), nn.SiLU())
        self.out = nn.Conv2d(width, channels * stem**2, 3, padding=1)
        self.fold = nn.PixelShuffle(stem)
        nn.init.normal_(self.out.weight, std=0.02)

    def centre(self, data: Tensor) -> None:
        """Set mean and scale from (N, C, H, W) pictures."""
        self.mean.copy_(data.mean(0, dtype=torch.float32))
        square = sum((part.float() - self.mean).square().sum() for part in data.split(256)) / data.numel()
        self.scale.copy_(square.sqrt().clamp_min(1e-4))

    def latent(self, x: Tensor) -> Tensor:
        """Return what is quantised (B, h, w, D) of pictures."""
        return self.encoder((x - self.mean) / self.scale).permute(0, 2, 3, 1)

    def picture(self, value: Tensor) -> Tensor:
        """Return pictures of quantised (B, h, w, D)."""
        y = self.fold(self.out(self.decoder(value.permute(0, 3, 1, 2)))).float()
        return y * self.scale + self.mean

    def reconstruction(self, x: Tensor, made: Tensor, emphasis: float, structure: float) -> tuple[Tensor, Tensor]:
        """Return (loss in units of the data's spread, mean squared error)."""
        error, far = (made - x) / self.scale, ((x - self.mean) / self.scale).abs().clamp_max(3.0)
        weight = 1.0 + emphasis * far
        loss = (weight * (error.square() + 0.3 * error.abs())).sum() / weight.sum()
        return loss + structure * differences(error), error.square().mean() * self.scale**2


def differences(error: Tensor, scales: int = 3) -> Tensor:
    """Return the mean |difference between neighbours' errors|, each way, summed over scales: that of made and real edges."""
    total = error.new_zeros(())
    for _ in range(scales):
        total = total + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        if min(error.shape[-2:]) < 4:
            break
        error = F.avg_pool2d(error, 2)
    return total
