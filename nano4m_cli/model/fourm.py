"""The 4M model: an encoder over what is shown, a decoder that answers what is asked.

After Mizrahi et al. 2023 (arXiv:2312.06647) with three differences, each because it was measured to matter at small
size: a target's logits are over its own vocabulary only; decoder self-attention stays within one modality of one
sample, so that training and use pose the same question; registers make an empty condition representable.
"""

from __future__ import annotations

import re
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import field_validator, model_validator
from torch import Tensor, nn

from nano4m_cli.config import Config
from nano4m_cli.model.attention import BACKENDS, Mask
from nano4m_cli.model.batch import Packed
from nano4m_cli.model.layers import Block, Norm, TokenTable, linear, make_norm, position_table
from nano4m_cli.spec import Layout


class FourMConfig(Config):
    """size: "d<layers>-<heads of 64, or w<width>>", e.g. "d6-6w512": 6 encoder and 6 decoder layers of width 512."""

    size: str = "d3-3w128"
    head_width: int = 64
    mlp: Literal["gelu", "swiglu"] = "gelu"
    mlp_ratio: float = 4.0
    norm: Norm = "layernorm"
    qk_norm: bool = False
    registers: int = 1
    positions: Literal["sincos", "learned"] = "sincos"
    attention: Literal["auto", "padded", "sdpa", "loop"] = "auto"

    @field_validator("size")
    @classmethod
    def _size(cls, v):
        if not re.fullmatch(r"d\d+-\d+w\d+", v) or 0 in [int(n) for n in re.findall(r"\d+", v)]:
            raise ValueError("a size reads d<encoder layers>-<decoder layers>w<width>, e.g. d6-6w512")
        return v

    @model_validator(mode="after")
    def _divides(self) -> FourMConfig:
        if self.head_width < 1 or self.mlp_ratio <= 0:
            raise ValueError("head_width and mlp_ratio are positive")
        if self.width % self.head_width:
            raise ValueError(f"width {self.width} does not divide into heads of {self.head_width}")
        if self.registers < 0:
            raise ValueError("registers cannot be negative")
        return self

    @property
    def encoder_layers(self) -> int:
        return int(re.findall(r"\d+", self.size)[0])

    @property
    def decoder_layers(self) -> int:
        return int(re.findall(r"\d+", self.size)[1])

    @property
    def width(self) -> int:
        return int(re.findall(r"\d+", self.size)[2])

    @property
    def heads(self) -> int:
        return self.width // self.head_width


class FourM(nn.Module):
    """Args: the config, and the layout of the modalities it serves.

    Rows of parameters are taken by `F.embedding`: the gradient of plain indexing adds in an order that changes from
    run to run where several threads share it.
    """

    def __init__(self, config: FourMConfig, layout: Layout):
        super().__init__()
        if config.attention == "auto":
            config = config.model_copy(update={"attention": "loop" if config.width >= 512 else "padded"})
        assert config.attention in BACKENDS, config.attention
        self.config, self.layout = config, layout
        d, m = config.width, len(layout.specs)
        self.embed = TokenTable(layout, d, 0.5)
        self.enc_modality = nn.Parameter(torch.randn(m, d) * 0.02)
        self.dec_modality = nn.Parameter(torch.randn(m, d) * 0.5)
        self.begin = nn.Parameter(torch.randn(m, d) * 0.5)
        self.register_tokens = nn.Parameter(torch.randn(max(config.registers, 1), d) * 0.5)
        table = position_table(layout, d)
        if config.positions == "learned":
            self.position = nn.Parameter(table)
        else:
            self.register_buffer("position", table, persistent=False)
        self.encoder = nn.ModuleList([Block(config, config.encoder_layers, False) for _ in range(config.encoder_layers)])
        self.decoder = nn.ModuleList([Block(config, config.decoder_layers, True) for _ in range(config.decoder_layers)])
        self.enc_norm, self.dec_norm = make_norm(config.norm, d), make_norm(config.norm, d)
        self.context = linear(d, d)
        self.head = TokenTable(layout, d, d**-0.5 * 0.5)
        self.register_buffer("sequence_C", torch.from_numpy(layout.sequence_C), persistent=False)
        self.register_buffer("modality_C", torch.from_numpy(layout.modality_C), persistent=False)
        self.register_buffer("vocab_C", torch.from_numpy(layout.vocab_start[layout.group_C]), persistent=False)

    # -- encoder --------------------------------------------------------------------------------------------------

    def embed_shown(self, batch: Packed) -> Tensor:
        """Return the encoder's input (Te, D)."""
        col = batch.enc_col.clamp_min(0)
        x = self.embed(self.vocab_C[col] + batch.enc_ids)
        x = x + F.embedding(self.modality_C[col], self.enc_modality) + F.embedding(col, self.position)
        if self.config.registers:
            at = (batch.enc_col < 0).nonzero().squeeze(1)
            tokens = self.register_tokens.repeat(batch.samples, 1)
            x = x.index_copy(0, at, tokens.to(x.dtype))
        return x

    def encode(self, batch: Packed, layers: list[Tensor] | None = None) -> Tensor:
        """Return the encoder's output (Te, D); each layer's output is appended to `layers` where given."""
        mask = Mask(batch.enc, batch.enc)
        x = self.embed_shown(batch)
        for block in self.encoder:
            x = block(x, mask)
            if layers is not None:
                layers.append(x)
        return self.enc_norm(x)

    # -- decoder --------------------------------------------------------------------------------------------------

    def decode(self, batch: Packed, encoded: Tensor) -> Tensor:
        """Return the decoder's output (Td, D) for what is asked, given the encoder's."""
        context = self.context(encoded)
        modality = self.modality_C[batch.dec_col]
        y = F.embedding(modality, self.dec_modality) + F.embedding(batch.dec_col, self.position)
        text = self.sequence_C[batch.dec_col]
        if bool(text.any()):
            at = text.nonzero().squeeze(1)
            prev = batch.dec_prev[at]
            rows = (self.vocab_C[batch.dec_col[at]] + prev).clamp_min(0)
            told = torch.where((prev >= 0)[:, None], self.embed(rows), F.embedding(modality[at], self.begin))
            y = y.index_add(0, at, told.to(y.dtype))
        own = Mask(batch.dec_self, batch.dec_self, causal=batch.dec_causal)
        cross = Mask(batch.dec, batch.enc, k_row=batch.dec_context)
        for block in self.decoder:
            y = block(y, own, context, cross)
        return self.dec_norm(y)

    def logits(self, batch: Packed, decoded: Tensor) -> list[Tensor | None]:
        """Return per vocabulary group the logits (n, vocab_size) of the slots asked of it, or None."""
        weight = self.head.weight().to(decoded.dtype)
        start = self.layout.vocab_start
        return [
            None if index is None else F.linear(decoded.index_select(0, index), weight[start[g] : start[g + 1]])
            for g, index in enumerate(batch.group_index)
        ]

    def forward(self, batch: Packed) -> list[Tensor | None]:
        """Return `logits` of the batch."""
        return self.logits(batch, self.decode(batch, self.encode(batch)))

    def nll(self, batch: Packed) -> Tensor:
        """Return (Td,) fp32: -log p of each answer, in nats."""
        out = torch.zeros(len(batch.dec_ids), device=batch.dec_ids.device)
        for index, logits in zip(batch.group_index, self(batch), strict=True):
            if index is not None:
                loss = F.cross_entropy(logits.float(), batch.dec_ids[index], reduction="none")
                out = out.index_copy(0, index, loss)
        return out

    def modality_sums(self, batch: Packed) -> tuple[Tensor, Tensor]:
        """Return (summed -log p, count), each (M,), per modality of the answers."""
        modality = self.modality_C[batch.dec_col]
        zero = torch.zeros(len(self.layout.specs), device=modality.device)
        total = zero.index_add(0, modality, self.nll(batch))
        return total, zero.index_add(0, modality, torch.ones_like(modality, dtype=zero.dtype))
