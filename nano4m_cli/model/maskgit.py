"""MaskGIT: one stack that sees every slot, known ones by their ids and the others as masks (Chang et al. 2022,
arXiv:2202.04200). A slot that is not known is always asked: training shows no sample with slots missing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano4m_cli.model.attention import Mask
from nano4m_cli.model.base import StackConfig, TokenModel
from nano4m_cli.model.batch import Packed, merged
from nano4m_cli.model.layers import Block, TokenTable, make_norm, position_table
from nano4m_cli.spec import Layout


class MaskGIT(TokenModel):
    """Args: the config, and the layout of the modalities it serves."""

    wholly = True

    def __init__(self, config: StackConfig, layout: Layout):
        super().__init__()
        config = config.with_backend()
        self.config, self.layout = config, layout
        d, m = config.width, len(layout.specs)
        self.embed = TokenTable(layout, d, 0.5)
        self.modality = nn.Parameter(torch.randn(m, d) * 0.02)
        self.mask = nn.Parameter(torch.randn(1, d) * 0.5)
        table = position_table(layout, d)
        if config.positions == "learned":
            self.position = nn.Parameter(table)
        else:
            self.register_buffer("position", table, persistent=False)
        self.encoder = nn.ModuleList([Block(config, config.layers, False) for _ in range(config.layers)])
        self.norm = make_norm(config.norm, d)
        self.head = TokenTable(layout, d, d**-0.5 * 0.5)
        self._columns(layout)

    def answers(self, batch: Packed) -> Tensor:
        m = merged(batch)
        x = self.mask.expand(len(m.col), -1)
        at = m.shown.nonzero().squeeze(1)
        if len(at):
            told = self.embed((self.vocab_C[m.col] + m.ids).index_select(0, at))
            x = x.index_copy(0, at, told.to(x.dtype))
        x = x + F.embedding(self.modality_C[m.col], self.modality) + F.embedding(m.col, self.position)
        mask = Mask(m.rows, m.rows)
        for block in self.encoder:
            x = block(x, mask)
        return self.norm(x).index_select(0, m.asked)
