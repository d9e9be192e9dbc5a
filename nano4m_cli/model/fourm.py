"""The 4M model: an encoder over what is shown, a decoder that answers what is asked.

After Mizrahi et al. 2023 (arXiv:2312.06647) with three differences, each because it was measured to matter at small
size: a target's logits are over its own vocabulary only; decoder self-attention stays within one modality of one
sample, so that training and use pose the same question; registers make an empty condition representable.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import field_validator
from torch import Tensor, nn

from nano4m_cli.model.attention import Mask
from nano4m_cli.model.base import PairConfig, TokenModel
from nano4m_cli.model.batch import Packed
from nano4m_cli.model.layers import Block, TokenTable, linear, make_norm
from nano4m_cli.spec import Layout


class FourMConfig(PairConfig):
    """encoder: what is shown sees all that is shown; or it comes in blocks, none of which sees a later one (drawn in training by
    masking/_blocks.py), so that generation never reads anything twice."""

    size: str = "d3-3w128"
    registers: int = 1
    encoder: Literal["bidirectional", "block_causal"] = "bidirectional"

    @field_validator("registers")
    @classmethod
    def _registers(cls, v):
        if v < 0:
            raise ValueError("registers cannot be negative")
        return v


class FourM(TokenModel):
    """Args: the config, and the layout of the modalities it serves.

    Rows of parameters are taken by `F.embedding`: the gradient of plain indexing adds in an order that changes from
    run to run where several threads share it.
    """

    encodes = True

    def __init__(self, config: FourMConfig, layout: Layout):
        super().__init__()
        self.config, self.layout = config, layout
        d, m = config.width, len(layout.specs)
        self.embed = TokenTable(layout, d, 0.5)
        self.enc_modality = nn.Parameter(torch.randn(m, d) * 0.02)
        self.dec_modality = nn.Parameter(torch.randn(m, d) * 0.5)
        self.begin = nn.Parameter(torch.randn(m, d) * 0.5)
        self.register_tokens = nn.Parameter(torch.randn(max(config.registers, 1), d) * 0.5)
        self._positions(config, layout)
        self.encoder = nn.ModuleList([Block(config, config.encoder_layers, False) for _ in range(config.encoder_layers)])
        self.decoder = nn.ModuleList([Block(config, config.decoder_layers, True) for _ in range(config.decoder_layers)])
        self.enc_norm, self.dec_norm = make_norm(config.norm, d), make_norm(config.norm, d)
        self.context = linear(d, d)
        self.head = self._head(config, layout)
        self._ready(config, layout)

    @property
    def in_blocks(self) -> bool:
        return self.config.encoder == "block_causal"

    # -- encoder --------------------------------------------------------------------------------------------------

    def embed_shown(self, batch: Packed) -> Tensor:
        """Return the encoder's input (Te, D)."""
        col = batch.enc_col.clamp_min(0)
        x = self.embed(self.vocab_C[col] + batch.enc_ids)
        x = x + F.embedding(self.modality_C[col], self.enc_modality)
        if not self.rope:
            x = x + self.places(col)
        if self.config.registers:
            at = (batch.enc_col < 0).nonzero().squeeze(1)
            if len(at):  # what is read behind other tokens has none
                x = x.index_copy(0, at, self.register_tokens.repeat(batch.samples, 1).to(x.dtype))
        return x

    def encode(self, batch: Packed, layers: list[Tensor] | None = None) -> Tensor:
        """Return the encoder's output (Te, D); each layer's output is appended to `layers` where given."""
        mask = Mask(batch.enc, batch.enc, block=batch.enc_block)
        x, turn = self.embed_shown(batch), self.turns(batch.enc_col)
        for block in self.encoder:
            x = block(x, mask, turn=turn)
            if layers is not None:
                layers.append(x)
        return self.enc_norm(x)

    # -- decoder --------------------------------------------------------------------------------------------------

    def embed_asked(self, batch: Packed) -> Tensor:
        """Return the decoder's input (Td, D)."""
        modality = self.modality_C[batch.dec_col]
        text = self.sequence_C[batch.dec_col]
        place = self.places(batch.dec_col)
        if self.rope:  # a query has no token: its place is all that it is, and with nothing shown no turn would tell it
            place = place.masked_fill(text[:, None], 0.0)
        y = F.embedding(modality, self.dec_modality) + place
        if bool(text.any()):
            at = text.nonzero().squeeze(1)
            prev = batch.dec_prev[at]
            rows = (self.vocab_C[batch.dec_col[at]] + prev).clamp_min(0)
            told = torch.where((prev >= 0)[:, None], self.embed(rows), F.embedding(modality[at], self.begin))
            y = y.index_add(0, at, told.to(y.dtype))
        return y

    def decode(self, batch: Packed, encoded: Tensor, few: bool = False) -> Tensor:
        """Return the decoder's output (Td, D) for what is asked, given the encoder's.

        Args:
            few: whether keys and values need not be made where few slots ask for them (without gradients, to rounding).
        """
        context, y = self.context(encoded), self.embed_asked(batch)
        own = Mask(batch.dec_self, batch.dec_self, causal=batch.dec_causal)
        cross = Mask(batch.dec, batch.enc, k_row=batch.dec_context)
        turn, context_turn = self.turns(batch.dec_col), self.turns(batch.enc_col)
        for block in self.decoder:
            y = block(y, own, context, cross, turn=turn, context_turn=context_turn, few=few)
        return self.dec_norm(y)

    def ask(self, batch: Packed) -> list[Tensor | None]:
        return self.logits(batch, self.decode(batch, self.encode(batch), few=True))

    def answers(self, batch: Packed) -> Tensor:
        return self.decode(batch, self.encode(batch))
