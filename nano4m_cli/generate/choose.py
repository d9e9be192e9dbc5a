"""From logits to ids: temperature, then top-k, then top-p, then one uniform number per slot. Pure functions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def filter_logits(logits_NV: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Return log-probabilities (N, V) fp32 after temperature, top-k and top-p, in this order; barred ids are -inf.

    temperature 0 leaves the most likely id alone. top_p keeps the smallest set of ids whose probability reaches it.
    """
    logits = logits_NV.float()
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter_(-1, best, 0.0)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        barred = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before >= top_p)
        logits = logits.masked_fill(barred, -torch.inf)
    return logits.log_softmax(-1)


def draw(logp_NV: Tensor, uniform_N: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return (ids (N,), their log-probability (N,)) by inverting the cumulative distribution at given numbers in (0, 1)."""
    p = logp_NV.double().exp()
    cumulative = p.cumsum(-1)
    u = torch.from_numpy(np.asarray(uniform_N))[:, None].to(p.device) * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, u, right=True).squeeze(-1).clamp_max(p.shape[-1] - 1)
    # Rounding at the very end may land on a barred id: the most likely one is then taken.
    ids = torch.where(p.gather(-1, ids[:, None]).squeeze(-1) > 0, ids, p.argmax(-1))
    return ids, logp_NV.gather(-1, ids[:, None]).squeeze(-1)


def counts(slots: int, steps: int, schedule: str = "linear") -> list[int]:
    """Return how many slots each step fills: at most `steps` positive numbers that sum to `slots`.

    linear: as even as possible. cosine (MaskGIT, Chang et al. 2022): few at first, more later.
    """
    steps = max(1, min(steps, slots))
    if schedule == "cosine":
        left = [round(slots * np.cos(np.pi / 2 * (i + 1) / steps)) for i in range(steps)]
        left = [max(l, 0) for l in left]
        left[-1] = 0
        out = [a - b for a, b in zip([slots, *left[:-1]], left, strict=True)]
    else:
        edges = [round(slots * (i + 1) / steps) for i in range(steps)]
        out = [b - a for a, b in zip([0, *edges[:-1]], edges, strict=True)]
    return [n for n in out if n > 0]
