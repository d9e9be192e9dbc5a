"""MaskGIT: one stack that sees every slot, known ones by their ids and the others as masks (Chang et al. 2022,
arXiv:2202.04200). A slot that is not known is always asked: training shows no sample with slots missing."""

from __future__ import annotations

from torch import Tensor

from nano4m_cli.model.attention import Mask
from nano4m_cli.model.base import Stack
from nano4m_cli.model.batch import Packed, merged


class MaskGIT(Stack):
    """Args: the config, and the layout of the modalities it serves."""

    wholly = True

    def answers(self, batch: Packed) -> Tensor:
        m = merged(batch)
        x = self.unknown.expand(len(m.col), -1)
        at = m.shown.nonzero().squeeze(1)
        if len(at):
            told = self.embed((self.vocab_C[m.col] + m.ids).index_select(0, at))
            x = x.index_copy(0, at, told.to(x.dtype))
        x = x + self.slots(m.col)
        if self.rope:  # a mask has no token: its place is all that it is
            x = x + self.places(m.col).masked_fill(m.shown[:, None], 0.0)
        mask, turn = Mask(m.rows, m.rows), self.turns(m.col)
        for block in self.blocks:
            x = block(x, mask, turn=turn)
        return self.norm(x).index_select(0, m.asked)
