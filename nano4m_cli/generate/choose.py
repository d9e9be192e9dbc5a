"""From logits to ids: repetition penalty, temperature, top-k, top-p, min-p, then one uniform number per slot. Pure functions.

The order is a choice: temperature first, so that top-p and min-p bound the distribution that is drawn from, whatever its
temperature; each filter sees what the one before it left.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def penalize(logits_NV: Tensor, seen_NV: Tensor, penalty: float) -> Tensor:
    """Return logits whose probabilities p are as p ** penalty where an id was seen (bool), before they are normalised again.

    The repetition penalty of Keskar et al. 2019 (arXiv:1909.05858), on log-probabilities: they are never positive, so
    that the level of the logits does not matter.
    """
    logp = logits_NV.float().log_softmax(-1)
    return torch.where(seen_NV, logp * penalty, logp)


def filter_logits(
    logits_NV: Tensor, temperature: float | Tensor, top_k: int | None, top_p: float | None, min_p: float | None = None
) -> Tensor:
    """Return log-probabilities (N, V) fp32 after temperature, top-k, top-p and min-p, in this order; barred ids are -inf.

    temperature: one, or one per row (N,); 0 leaves the most likely id alone. top_p keeps the smallest set of ids whose
    probability reaches it; min_p those at least so likely as its share of the likeliest (Nguyen et al. 2024,
    arXiv:2407.01082).
    """
    logits = logits_NV.float()
    if isinstance(temperature, Tensor):
        cold = (temperature == 0)[:, None]
        warm = filter_logits(logits / torch.where(cold, 1.0, temperature[:, None].float()), 1.0, top_k, top_p, min_p)
        return torch.where(cold, filter_logits(logits, 0.0, None, None), warm) if bool(cold.any()) else warm
    if temperature == 0:
        return torch.full_like(logits, -torch.inf).scatter_(-1, logits.argmax(-1, keepdim=True), 0.0)
    logits = logits if temperature == 1 else logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        barred = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before >= top_p)
        logits = logits.masked_fill(barred, -torch.inf)
    if min_p is not None:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + np.log(min_p), -torch.inf)
    return logits.log_softmax(-1)


def draw(logp_NV: Tensor, uniform_N: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return (ids (N,), their log-probability (N,)) by inverting the cumulative distribution at given numbers in (0, 1)."""
    p = logp_NV.double().exp()
    cumulative = p.cumsum(-1)
    u = torch.from_numpy(np.asarray(uniform_N))[:, None].to(p.device) * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, u, right=True).squeeze(-1).clamp_max(p.shape[-1] - 1)
    # Rounding at the very end may land on a barred id: the most likely one is then taken.
    barred = ~(p.gather(-1, ids[:, None]).squeeze(-1) > 0)
    if bool(barred.any()):
        ids = torch.where(barred, p.argmax(-1), ids)
    return ids, logp_NV.gather(-1, ids[:, None]).squeeze(-1)
