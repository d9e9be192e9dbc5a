"""In which order shown slots became known, for a block-causal encoder: what generation does to it, drawn at random."""

from __future__ import annotations

import numpy as np

from nano4m_cli.masking._base import Key
from nano4m_cli.rng import uniform
from nano4m_cli.spec import Layout


def draw_blocks(layout: Layout, shown_BC: np.ndarray, asked_BC: np.ndarray, key: Key) -> np.ndarray:
    """Return int64 (B, C): the block of each slot (0 where it is not shown).

    Block 0 holds the conditions: texts, and modalities of which nothing is asked. The shown slots of the others follow in a random
    order, in blocks of one size per sample, log-uniform between one and all of them; in half of the samples some, of a uniform
    share, were given with the conditions.
    """
    starts = layout.start[:-1]
    grown_BM = np.add.reduceat(asked_BC, starts, axis=1) > 0
    grown = shown_BC & grown_BM[:, layout.modality_C] & ~layout.sequence_C
    n = grown.sum(1)
    u = lambda what, *more: uniform(key.seed, f"{key.stream}/{what}", *(more or (key.counter_B,)))  # noqa: E731
    size = np.maximum(np.floor(np.exp(u("size") * np.log(np.maximum(n, 1) + 1))), 1).astype(np.int64)
    given = np.floor(n * np.maximum(2 * u("given") - 1, 0)).astype(np.int64)
    order = u("order", key.counter_B[:, None], np.arange(layout.columns))
    place = np.argsort(np.argsort(np.where(grown, order, np.inf), axis=1, kind="stable"), axis=1)
    block = np.maximum(place - given[:, None], -1) // size[:, None] + 1
    return np.where(grown, block, 0)
