"""What a 4M model has read of every sample: the keys and values of its layers, so that more can be read and asked without
reading it again.

What is read later is seen by nothing that was read before. So the answers are those of a block-causal encoder, each call of `read`
a block; of a bidirectional one they are what earlier tokens would say if later ones had not come.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nano4m_cli.model.attention import Cache, Mask
from nano4m_cli.model.batch import Packed
from nano4m_cli.model.fourm import FourM


class Memory:
    """Args: the model, how many samples, and how many tokens (registers among them) each will have at most.

    length_S: how many it has. own: per encoder layer, cross: per decoder layer, keys and values of what was read; text: per decoder
    layer, of what was written of a text, written_S tokens a sample.
    """

    def __init__(self, model: FourM, samples: int, most: int, text: int = 0):
        c, like = model.config, model.context.held
        make = lambda layers, n: [Cache.empty(samples, c.heads, n, c.head_width, like) for _ in layers]  # noqa: E731
        self.model = model
        self.own, self.cross = make(model.encoder, most), make(model.decoder, most)
        self.text = make(model.decoder if text else (), text)
        self.length_S = torch.zeros(samples, dtype=torch.int64, device=model.device)
        self.written_S = self.length_S.clone()

    def keep(self, rows: np.ndarray) -> None:
        """Forget all samples but some."""
        index = torch.from_numpy(rows).to(self.length_S.device)
        self.length_S, self.written_S = self.length_S[index], self.written_S[index]
        for cache in (*self.own, *self.cross, *self.text):
            cache.k, cache.v = cache.k[index], cache.v[index]

    def read(self, batch: Packed) -> None:
        """Read what a batch shows, one block more of each sample."""
        m, rows, at = self.model, batch.enc, self.length_S
        if not len(batch.enc_ids):
            return
        seen = torch.repeat_interleave(at + rows.lengths, rows.lengths)
        x, turn = m.embed_shown(batch), m.turns(batch.enc_col)
        for block, cache in zip(m.encoder, self.own, strict=True):
            x = block.more(x, cache, rows, at, seen, turn)
        context = m.context(m.enc_norm(x))
        for block, cache in zip(m.decoder, self.cross, strict=True):
            block.cross.keep_context(context, cache, rows, at, turn)
        self.length_S = at + rows.lengths

    def answer(self, batch: Packed) -> Tensor:
        """Return the decoder's output (Td, D) for what a batch asks, one decoder sample for each that was read."""
        m, seen = self.model, torch.repeat_interleave(self.length_S, batch.dec.lengths)
        own, y = Mask(batch.dec_self, batch.dec_self, causal=batch.dec_causal), m.embed_asked(batch)
        turn = m.turns(batch.dec_col)
        for block, cross in zip(m.decoder, self.cross, strict=True):
            y = y + block.attn(block.norm1(y), own, turn=turn)
            y = block.recall(y, cross, batch.dec, seen, turn)
        return m.dec_norm(y)

    def write(self, batch: Packed) -> Tensor:
        """Return the decoder's output (Td, D) for the slots of a text that follow those written; they count as written then."""
        m, rows, at = self.model, batch.dec, self.written_S
        offset = rows.place % rows.width
        seen_own = torch.repeat_interleave(at, rows.lengths) + offset + 1
        seen = torch.repeat_interleave(self.length_S, rows.lengths)
        y, turn = m.embed_asked(batch), m.turns(batch.dec_col)
        for block, cross, text in zip(m.decoder, self.cross, self.text, strict=True):
            y = y + block.attn.found(block.attn.keep(block.norm1(y), text, rows, at, turn), text, rows, seen_own)
            y = block.recall(y, cross, rows, seen, turn)
        self.written_S = at + rows.lengths
        return m.dec_norm(y)

    def unwrite(self, written_S: np.ndarray) -> None:
        """Take back what was written beyond so many tokens of each sample."""
        self.written_S = torch.from_numpy(written_S).to(self.written_S.device)
