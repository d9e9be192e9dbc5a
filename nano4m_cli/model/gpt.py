"""GPT: one causal stack that reads the modalities in the order of the layout, left to right (Radford et al. 2019).

The input at a slot is the token before it, with the position and modality of the slot itself, whose id the output
predicts; so nothing but the ids' order is fixed, and samples may lack modalities. What is shown stands in the same row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nano4m_cli.model.attention import Cache, Mask
from nano4m_cli.model.base import Stack
from nano4m_cli.model.batch import Merged, Packed, Ragged, merged


class GPT(Stack):
    """Args: the config, and the layout of the modalities it reads, in that order."""

    at_once = False

    def reads(self, sources: Sequence[str], target: str) -> bool:
        names = self.layout.names
        return all(names.index(s) < names.index(target) for s in sources)

    def posed(self, directions: dict[str, float]) -> dict[str, float]:
        """Every sample poses each modality given all that are read before it, whatever masks say."""
        names = self.layout.names
        return {"+".join(names[:m]) + "->" + target: 1.0 for m, target in enumerate(names)}

    def _inputs(self, m: Merged) -> Tensor:
        x = torch.cat([self.unknown, self.embed((self.vocab_C[m.col] + m.ids)[:-1])])
        first = m.rows.lengths.cumsum(0) - m.rows.lengths
        first = first[m.rows.lengths > 0]
        x = x.index_copy(0, first, self.unknown.expand(len(first), -1).to(x.dtype))
        return x + self.slots(m.col)

    def _read(self, m: Merged, caches: list[Cache] | None = None) -> Tensor:
        causal = torch.ones(m.rows.rows, dtype=torch.bool, device=m.col.device)
        mask, x, turn = Mask(m.rows, m.rows, causal=causal), self._inputs(m), self.turns(m.col)
        for i, block in enumerate(self.blocks):
            x = block(x, mask, cache=None if caches is None else caches[i], turn=turn)
        return self.norm(x)

    def answers(self, batch: Packed) -> Tensor:
        m = merged(batch)
        return self._read(m).index_select(0, m.asked)

    # -- one token after the other --------------------------------------------------------------------------------

    def open(self, batch: Packed, length: int) -> list[Cache]:
        """Return each layer's cache, of `length` tokens a sample, after reading the asked tokens of a batch."""
        c = self.config
        caches = [Cache.empty(batch.dec.rows, c.heads, length, c.head_width, self.unknown) for _ in self.blocks]
        if len(batch.dec_ids):
            self._read(merged(batch), caches)
        return caches

    def step(self, caches: list[Cache], before: tuple[np.ndarray, np.ndarray], col_S: np.ndarray, at_S: np.ndarray) -> Tensor:
        """Return (S, D), the vector of column `col` of each sample.

        Args:
            before: ids and columns (S,) of the token before (column -1: none).
            at_S: how many tokens each sample has read.
        """
        on = lambda x: torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64)).to(self.device)  # noqa: E731
        ids, cols = on(before[0]), on(before[1])
        told = self.embed(self.vocab_C[cols.clamp_min(0)] + ids)
        col, at = on(col_S), on(at_S)
        x, turn = torch.where((cols >= 0)[:, None], told, self.unknown) + self.slots(col), self.turns(col)
        rows = Ragged.of(np.ones(len(at), np.int64)).to(self.device)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block.more(x, cache, rows, at, at + 1, turn)
        return self.norm(x)
