"""The autoencoder that the FSQ tokenizers share: patches in, one code per patch, patches out; on grids of any rank.

All work is done at the resolution of the code grid (matrix products, quick on a CPU): a patch embedding, residual MLPs
that see their own patch only, FSQ, and residual MLPs that also mix over the grid (MLP-Mixer, Tolstikhin et al. 2021).
Mixing before the codes as well (`encoder_mixing`) lets empty patches help crowded ones, but then a code no longer means
one place, and a model finds the codes harder to predict (docs/RESULTS.md). It models the residual to the mean sample of
the train split, and weighs each value by how far it lies from that mean, so that small foreground objects are not
drowned by background.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from nano4m_cli.config import Config
from nano4m_cli.tokenizers._base import GradientTokenizer
from nano4m_cli.tokenizers._fsq import FSQ


class Block(nn.Module):
    """Residual: with `tokens`, a linear mix over the grid's places; then a pointwise MLP. (B, T, D) -> same."""

    def __init__(self, width: int, tokens: int = 0, expand: int = 2):
        super().__init__()
        self.mix_norm = nn.LayerNorm(width) if tokens else None
        self.mix = nn.Parameter(torch.zeros(tokens, tokens)) if tokens else None
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width * expand)
        self.down = nn.Linear(width * expand, width)
        nn.init.normal_(self.down.weight, std=0.02)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.mix is not None:
            x = x + torch.matmul(self.mix, self.mix_norm(x))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class PatchAutoencoder(nn.Module):
    """Autoencoder over (B, *grid, P): flattened patches on a grid of (H, W) or (T, H, W) places.

    Args:
        grid: of codes. patch: values per patch P. levels: FSQ levels. width, depth: of each half.
    """

    def __init__(
        self, grid: tuple[int, ...], patch: int, levels: Sequence[int], width: int, depth: int, encoder_mixing: bool = False
    ):
        super().__init__()
        tokens = math.prod(grid)
        self.register_buffer("mean", torch.zeros(*grid, patch))
        self.register_buffer("scale", torch.ones(()))
        self.place = nn.Parameter(torch.zeros(tokens, width))
        self.place_out = nn.Parameter(torch.zeros(tokens, width))
        self.embed = nn.Linear(patch, width)
        self.encoder = nn.Sequential(*[Block(width, tokens if encoder_mixing else 0) for _ in range(depth)])
        self.to_code = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(levels)))
        self.fsq = FSQ(levels)
        self.from_code = nn.Linear(len(levels), width)
        self.decoder = nn.Sequential(*[Block(width, tokens) for _ in range(depth)])
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, patch))
        nn.init.normal_(self.out[1].weight, std=0.02)

    def centre(self, data: Tensor) -> None:
        """Set mean and scale from (N, *grid, P) samples."""
        self.mean.copy_(data.float().mean(0))
        self.scale.copy_((data.float() - self.mean).std().clamp_min(1e-4))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (quantised values (B, *grid, levels), codes (B, *grid)) of (B, *grid, P)."""
        z = self.embed(((x - self.mean) / self.scale).flatten(1, -2)) + self.place
        value, codes = self.fsq(self.to_code(self.encoder(z)).float())
        grid = x.shape[1:-1]
        return value.unflatten(1, grid), codes.unflatten(1, grid)

    def decode_values(self, value: Tensor) -> Tensor:
        """Return (B, *grid, P) from quantised values."""
        y = self.decoder(self.from_code(value.flatten(1, -2)) + self.place_out)
        return self.out(y).float().unflatten(1, value.shape[1:-1]) * self.scale + self.mean

    def loss(self, x: Tensor, emphasis: float) -> tuple[Tensor, Tensor]:
        """Return (weighted reconstruction loss, plain mean squared error), in units of the data's own spread.

        The weight of a value is 1 + emphasis * min(|value - mean| / scale, 3); loss is smooth L1 plus squares.
        """
        value, _ = self.encode(x)
        error = (self.decode_values(value) - x) / self.scale
        far = ((x - self.mean) / self.scale).abs().clamp_max(3.0)
        weight = 1.0 + emphasis * far
        square = error**2
        return (weight * (square + 0.3 * error.abs())).sum() / weight.sum(), square.mean() * self.scale**2


class PatchOptions(Config):
    """levels: FSQ levels. width, depth: of encoder and of decoder. emphasis: weight of what is far from the mean.
    fit_samples, fit_steps: of fitting (None: the usual)."""

    levels: tuple[int, ...] = (8, 8, 6, 5)
    width: int = Field(128, ge=1)
    depth: int = Field(2, ge=1)
    emphasis: float = 2.0
    encoder_mixing: bool = False
    fit_samples: int
    fit_steps: int | None = None

    @field_validator("levels")
    @classmethod
    def _levels(cls, v):
        if not v or min(v) < 2:
            raise ValueError("every level must be at least 2")
        return v


class Patchwise(GradientTokenizer):
    """A tokenizer whose module is a `PatchAutoencoder` and whose `data` are patches."""

    options: PatchOptions
    module: PatchAutoencoder

    def loss(self, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, mse = self.module.loss(self.data[index], self.options.emphasis)
        return loss, {"mse": mse}

    def codes(self, index: Tensor) -> Tensor:
        return self.module.encode(self.data[index])[1].reshape(-1, 1)
