"""A padded 4M with one table and one head for all modalities, as the course's code and what grew from it compute it.

Written for comparison only, plainly: every sample is padded to the largest budget, attention takes boolean masks, every padded
target has logits over all ids of the shared table, and the loss ignores the padded ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano4m_cli.model.layers import position_table
from nano4m_cli.spec import Layout

VOCAB = 50304
IGNORE = -100


@dataclass(frozen=True)
class PaddedBatch:
    """N inputs and M targets per sample, the largest budgets. shown_ids, shown_col (B, N); asked_ids, asked_col (B, M), ids IGNORE
    where padded; boolean masks (B, queries, keys), true where a query may look."""

    shown_ids: Tensor
    shown_col: Tensor
    asked_ids: Tensor
    asked_col: Tensor
    encoder_mask: Tensor
    self_mask: Tensor
    cross_mask: Tensor


def shared_ids(layout: Layout, ids_BC: np.ndarray) -> np.ndarray:
    """Return ids in the one table: those of codebook q after those of the codebooks before it, modalities on top of each other."""
    book_C = layout.group_C - np.array([min(g for g, (m, _, _) in enumerate(layout.groups) if m == n)
                                        for n in range(len(layout.specs))])[layout.modality_C]
    return ids_BC + book_C * np.array([s.vocab_size for s in layout.specs])[layout.modality_C]


def pad(layout: Layout, ids_BC: np.ndarray, shown_BC: np.ndarray, asked_BC: np.ndarray, budget: int, within: bool = False):
    """Return a PaddedBatch. within: targets see those of their own modality only (the field's see all of their sample's)."""
    b = len(ids_BC)
    ids, cols = np.zeros((2, b, budget), np.int64), np.zeros((2, b, budget), np.int64)
    real = np.zeros((2, b, budget), bool)
    for side, chosen_BC in enumerate((shown_BC, asked_BC)):
        for i in range(b):
            col = np.flatnonzero(chosen_BC[i])
            ids[side, i, : len(col)], cols[side, i, : len(col)], real[side, i, : len(col)] = ids_BC[i, col], col, True
    shown, asked = torch.from_numpy(real)
    asked_ids = torch.from_numpy(np.where(real[1], ids[1], IGNORE))
    self_mask = asked[:, None, :].expand(b, budget, budget)
    if within:
        modality = torch.from_numpy(layout.modality_C[cols[1]])
        self_mask = self_mask & (modality[:, :, None] == modality[:, None, :])
    look = shown[:, None, :].expand(b, budget, budget)
    return PaddedBatch(torch.from_numpy(ids[0]), torch.from_numpy(cols[0]), asked_ids, torch.from_numpy(cols[1]), look,
                       self_mask, look)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_BLD: Tensor, context_BKD: Tensor, mask_BLK: Tensor | None) -> Tensor:
        heads = lambda x: x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731 - (B, H, L, D / H)
        k, v = self.kv(context_BKD).chunk(2, -1)
        mask = None if mask_BLK is None else mask_BLK[:, None]
        y = F.scaled_dot_product_attention(heads(self.q(x_BLD)), heads(k), heads(v), attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, cross: bool):
        super().__init__()
        norm = lambda: nn.LayerNorm(width, eps=1e-6, bias=False)  # noqa: E731
        self.norm1, self.attn, self.norm2 = norm(), Attention(width, heads), norm()
        if cross:
            self.query_norm, self.cross = norm(), Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None, context: Tensor | None = None, cross_mask: Tensor | None = None) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn(h, h, mask)
        if context is not None:
            x = x + self.cross(self.query_norm(x), context, cross_mask)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Padded4M(nn.Module):
    """Args: the layout (for modalities and positions only), sizes, and the rows of the shared table."""

    def __init__(self, layout: Layout, width: int, encoder: int, decoder: int, heads: int, vocab: int = VOCAB):
        super().__init__()
        m = len(layout.specs)
        self.embed = nn.Embedding(vocab, width)
        self.enc_modality, self.dec_modality = nn.Embedding(m, width), nn.Embedding(m, width)
        self.register_buffer("position", position_table(layout, width))
        self.register_buffer("modality_C", torch.from_numpy(layout.modality_C))
        self.encoder = nn.ModuleList([Block(width, heads, False) for _ in range(encoder)])
        self.decoder = nn.ModuleList([Block(width, heads, True) for _ in range(decoder)])
        self.enc_norm = nn.LayerNorm(width, eps=1e-6, bias=False)
        self.dec_norm = nn.LayerNorm(width, eps=1e-6, bias=False)
        self.context = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, vocab, bias=False)
        for table in (self.embed, self.enc_modality, self.dec_modality):
            nn.init.normal_(table.weight, std=0.02)

    def forward(
        self, shown_ids: Tensor, shown_col: Tensor, asked_col: Tensor, encoder_mask: Tensor | None = None,
        self_mask: Tensor | None = None, cross_mask: Tensor | None = None,
    ) -> Tensor:
        """Return logits (B, M, vocab) of what is asked; without masks everything is real."""
        x = self.embed(shown_ids) + self.enc_modality(self.modality_C[shown_col]) + self.position[shown_col]
        for block in self.encoder:
            x = block(x, encoder_mask)
        context = self.context(self.enc_norm(x))
        y = self.dec_modality(self.modality_C[asked_col]) + self.position[asked_col]
        for block in self.decoder:
            y = block(y, self_mask, context, cross_mask)
        return self.head(self.dec_norm(y))

    def loss(self, batch: PaddedBatch) -> Tensor:
        """Return cross-entropy in nats: mean per modality over its targets, mean over modalities asked."""
        logits = self(batch.shown_ids, batch.shown_col, batch.asked_col, batch.encoder_mask, batch.self_mask, batch.cross_mask)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.asked_ids.flatten(), ignore_index=IGNORE, reduction="none")
        real, modality = batch.asked_ids.flatten() != IGNORE, self.modality_C[batch.asked_col].flatten()
        means = [loss[chosen].mean() for m in range(self.enc_modality.num_embeddings)
                 if (chosen := real & (modality == m)).any()]
        return torch.stack(means).mean()
