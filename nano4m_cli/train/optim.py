"""Optimizers: AdamW for everything, or Muon for the hidden matrices and AdamW for the rest."""

from __future__ import annotations

import torch
from torch import nn

from nano4m_cli.train.config import TrainConfig


def build_optimizers(model: nn.Module, c: TrainConfig) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a config; each group carries its peak rate as "peak_lr".

    Muon (Jordan et al. 2024) takes the matrices inside encoder and decoder; embeddings, heads, gains and projections
    at the borders stay with AdamW. Vectors are not decayed.
    """
    hidden, matrices, rest = [], [], []
    for name, p in model.named_parameters():
        inner = name.split(".")[0] in ("encoder", "decoder")
        if p.ndim == 2 and inner and c.optimizer == "muon" and min(p.shape) > 16:
            hidden.append(p)
        elif p.ndim >= 2:
            matrices.append(p)
        else:
            rest.append(p)
    groups = [{"params": matrices, "weight_decay": c.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    out: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], lr=c.lr, betas=c.betas, eps=1e-8, fused=True)
    ]
    if hidden:
        out.append(torch.optim.Muon(hidden, lr=c.muon_lr, weight_decay=c.weight_decay))
    for optimizer in out:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return out
