"""Positions that are not a fixed table: rotary ones (rope), and learned Fourier features.

Both read a slot's true coordinates on four axes: time, y, x, codebook. An axis that has one place only is no axis.
What is comparable across modalities is on one scale: all grids are pictures of one scene, so y and x of a coarse grid are
the centres of its cells in units of the finest one; codes and video of a sample cover the same span, so a time step of
the one lies where it lies in the other. A word's place in its text is an order, not a time that others know: it keeps its
own unit, and shares the time axis because no sequence has both. Codebooks count from the coarse one.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano4m_cli.errors import ConfigError
from nano4m_cli.spec import Layout

AXES = ("time", "y", "x", "codebook")
# Wavelengths run from 2 pi to 2 pi * base places: long texts (Su et al. 2021), short sides of pictures (Heo et al. 2024).
BASE = {"time": 10000.0, "y": 100.0, "x": 100.0, "codebook": 100.0}


def coordinates(layout: Layout) -> tuple[np.ndarray, list[str]]:
    """Return float64 (C, A), coordinates of every column on the A axes in use (0 where it is not on one), and their names."""
    on = {"grid": (0, 1, 2), "codes": (0, 3), "sequence": (0,)}
    sizes = []  # per modality, places on each axis
    for spec in layout.specs:
        shape = (1, *spec.shape) if spec.kind == "grid" and len(spec.shape) == 2 else spec.shape
        sizes.append(dict(zip(on[spec.kind], shape, strict=True)))
    finest = [max((n[a] for n, s in zip(sizes, layout.specs, strict=True) if a in n and s.kind != "sequence"), default=1)
              for a in range(4)]
    out = np.zeros((layout.columns, 4))
    for m, spec in enumerate(layout.specs):
        own = slice(layout.start[m], layout.start[m + 1])
        for at, (axis, size) in enumerate(sizes[m].items()):
            if size == 1:
                continue
            place = layout.position_C3[own, at].astype(np.float64)
            if spec.kind != "sequence" and axis < 3:
                place = (place + 0.5) * finest[axis] / size - 0.5
            out[own, axis] = place
    used = [a for a in range(4) if out[:, a].any()] or [0]
    return out[:, used], [AXES[a] for a in used]


def rotations(layout: Layout, head_width: int) -> Tensor:
    """Return float32 (C + 1, 2, head_width / 2): cosines and sines by which the pairs of a head turn at each column.

    RoPE (Su et al. 2021, arXiv:2104.09864); with several axes each turns its own share of the pairs (axial, as Heo et al.
    2024, arXiv:2403.13298). Shares are the same for all modalities, so the score of a query and a key depends on their
    distance on every axis that both have. Where one of them lacks an axis it stands still there (angle 0), and the score
    may tell where on it the other lies; a register (column -1, the last row) lacks all of them.

    Raises:
        ConfigError: if a head has fewer pairs than there are axes.
    """
    place_CA, axes = coordinates(layout)
    pairs = head_width // 2
    if pairs < len(axes):
        raise ConfigError(f"rope turns {len(axes)} axes ({', '.join(axes)}), heads of {head_width} have {pairs} pairs",
                          f"set model.head_width to {2 * len(axes)} or more")
    angle = np.zeros((len(place_CA) + 1, pairs))
    for a, share in enumerate(np.array_split(np.arange(pairs), len(axes))):
        angle[:-1, share] = place_CA[:, a, None] * BASE[axes[a]] ** (-np.arange(len(share)) / len(share))
    return torch.from_numpy(np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32))


def rotate(x_TD: Tensor, heads: int, turn_T2P: Tensor) -> Tensor:
    """Return (T, D): the pairs (i, i + P) of each head turned, in the dtype of x."""
    a, b = x_TD.unflatten(1, (heads, 2, -1)).unbind(2)  # (T, H, P)
    cos, sin = turn_T2P[:, None, 0], turn_T2P[:, None, 1]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], 2).flatten(1).to(x_TD.dtype)


class Fourier(nn.Module):
    """Learned Fourier features of coordinates (Li et al. 2021, arXiv:2106.02795): () -> (C, D).

    Cosines and sines of learned projections of all axes at once, then an MLP. Frequencies begin as in that paper, normal:
    neighbours look alike within a sixteenth of an axis, and within one place at least.
    """

    def __init__(self, layout: Layout, width: int):
        super().__init__()
        place_CA, _ = coordinates(layout)
        self.register_buffer("place", torch.from_numpy(place_CA.astype(np.float32)), persistent=False)
        spread_A1 = torch.from_numpy(np.maximum(place_CA.max(0) / 16, 1.0).astype(np.float32))[:, None]
        self.frequency = nn.Parameter(torch.randn(place_CA.shape[1], width // 2) / spread_A1)
        self.fc1 = nn.Linear(width // 2 * 2, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.fc1.weight, std=width**-0.5)
        nn.init.normal_(self.fc2.weight, std=2 * width**-0.5)  # rows of the size of sines and cosines

    def forward(self) -> Tensor:
        angle = (self.place[:, :, None] * self.frequency).sum(1)  # products in fp32 under autocast as well
        return self.fc2(F.gelu(self.fc1(torch.cat([angle.cos(), angle.sin()], 1))))
