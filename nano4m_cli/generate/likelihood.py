"""How likely a model finds given ids: -log p of slots that are asked at once, given those that are shown."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from nano4m_cli import dist
from nano4m_cli.model.base import TokenModel
from nano4m_cli.model.batch import pack
from nano4m_cli.spec import Layout

CHUNK = 100  # samples per encoder batch, at most
LOGITS = 1 << 26  # logits held at once


def chunk_size(layout: Layout, asked_NC: np.ndarray) -> int:
    """Return how many samples are asked at once: their logits stay in bounds where vocabularies are large."""
    vocab_C = np.array(layout.sizes)[layout.group_C]
    return int(np.clip(LOGITS // max(int((asked_NC * vocab_C).sum(1).max(initial=1)), 1), 1, CHUNK))


def slot_nll(
    model: TokenModel, ids_NC: np.ndarray, shown_NC: np.ndarray, asked_NC: np.ndarray, inside_NC: np.ndarray
) -> np.ndarray:
    """Return (N, C): -log p in nats of each asked slot (NaN elsewhere); grids and codes slot by slot independent given what is
    shown, text from left to right.

    Args:
        inside_NC: the slots that each sample has: what a model that sees every slot must be asked for.
    """
    return dist.answers([nll_work(model, ids_NC, shown_NC, asked_NC, inside_NC)])[0]


def nll_work(
    model: TokenModel, ids_NC: np.ndarray, shown_NC: np.ndarray, asked_NC: np.ndarray, inside_NC: np.ndarray
) -> dist.Work[np.ndarray]:
    """Return what `slot_nll` does, in pieces."""
    parts = posed(model, shown_NC, asked_NC, inside_NC)

    def piece(rows: slice, asked: np.ndarray) -> np.ndarray:
        packed = pack(model.layout, ids_NC[rows], shown_NC[rows], asked, model.config.registers).to(model.device)
        with torch.inference_mode():
            return model.nll(packed).cpu().numpy()

    def join(found: list[np.ndarray]) -> np.ndarray:
        out = np.full(asked_NC.shape, np.nan)
        for (rows, asked), values in zip(parts, found, strict=True):
            out[rows][asked] = values
        return np.where(asked_NC, out, np.nan)

    return dist.Work([partial(piece, *p) for p in parts], join, [cost(shown_NC[rows], asked) for rows, asked in parts])


def posed(
    model: TokenModel, shown_NC: np.ndarray, asked_NC: np.ndarray, inside_NC: np.ndarray
) -> list[tuple[slice, np.ndarray]]:
    """Return the samples that are asked at once, with what the model is asked for there; none where nothing is."""
    out, chunk = [], chunk_size(model.layout, asked_NC)
    for a in range(0, len(shown_NC), chunk):
        rows = slice(a, min(a + chunk, len(shown_NC)))
        asked = inside_NC[rows] & ~shown_NC[rows] if model.wholly else asked_NC[rows]
        if asked.any():
            out.append((rows, asked))
    return out


def cost(shown_NC: np.ndarray, asked_NC: np.ndarray) -> float:
    """Return about how much a question costs: its tokens."""
    return float(shown_NC.sum() + asked_NC.sum())
