"""Finite scalar quantisation (Mentzer et al. 2023, arXiv:2309.15505): each latent channel is rounded to L levels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FSQ(nn.Module):
    """Quantise (..., len(levels)) latents; the code of a vector is the mixed-radix number of its digits.

    Digit 0 is the least significant. The bounding function is the paper's, shifted for even L so that exactly L
    values can be reached; gradients pass straight through the rounding.
    """

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        assert all(l >= 2 for l in levels), levels
        self.levels = tuple(levels)
        self.codes = math.prod(levels)
        level_D = torch.tensor(levels, dtype=torch.float32)
        bases = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("level_D", level_D, persistent=False)
        self.register_buffer("base_D", torch.tensor(bases, dtype=torch.int64), persistent=False)

    def bound(self, z: Tensor) -> Tensor:
        """Return latents squashed into the open interval that rounds to L values."""
        half = (self.level_D - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.level_D % 2 == 0, 0.5, 0.0)
        shift = torch.atanh(offset / half)
        return torch.tanh(z + shift) * half - offset

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return (values in [-1, 1] of z's shape with straight-through gradient, int64 codes z.shape[:-1])."""
        bounded = self.bound(z)
        digit = torch.round(bounded)
        value = bounded + (digit - bounded).detach()
        half_width = torch.div(self.level_D, 2, rounding_mode="floor")
        codes = ((digit + half_width).long() * self.base_D).sum(-1)
        return value / half_width, codes

    def decode(self, codes: Tensor) -> Tensor:
        """Return values in [-1, 1], shape (*codes.shape, len(levels))."""
        half_width = torch.div(self.level_D, 2, rounding_mode="floor")
        digit = (codes[..., None] // self.base_D) % self.level_D.long()
        return (digit.float() - half_width) / half_width
