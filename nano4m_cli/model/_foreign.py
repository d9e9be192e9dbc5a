"""What models of other 4M projects share: pre-norm blocks with biases and normed context, named as apple's ml-4m names them.

Names and shapes of the parameters are theirs (queries, keys and values in one matrix), so that reading a checkpoint is
renaming. They run on the same packed batches and the same attention as our models.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from nano4m_cli.errors import WeightsError
from nano4m_cli.model.attention import Mask, attend
from nano4m_cli.model.base import PairConfig, TokenModel
from nano4m_cli.model.batch import Packed, Ragged
from nano4m_cli.spec import Layout


class ForeignConfig(PairConfig):
    """*_bias: which layers have one (norm_bias: the norms).

    modalities: by our names, in the order of the checkpoint's tables; vocab_sizes and lengths: of each of them there.
    """

    qkv_bias: bool = False
    proj_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    modalities: list[str] = []
    vocab_sizes: list[int] = []
    lengths: list[int] = []

    @model_validator(mode="after")
    def _lists(self) -> ForeignConfig:
        if not len(self.modalities) == len(self.vocab_sizes) == len(self.lengths):
            raise ValueError("modalities, vocab_sizes and lengths are of the same length")
        return self

    def table(self, modality: str) -> tuple[int, int]:
        """Return ids and slots of a modality of the checkpoint; one that it lacks is a WeightsError."""
        if modality not in self.modalities:
            raise WeightsError(f"the checkpoint has no '{modality}'", f"it has {', '.join(self.modalities)}")
        at = self.modalities.index(modality)
        return self.vocab_sizes[at], self.lengths[at]

    @model_validator(mode="after")
    def _theirs(self) -> ForeignConfig:
        if (self.norm, self.positions, self.init, self.mup_base) != ("layernorm", "sincos", "scaled", None):
            raise ValueError("norm, positions, init and mup_base are those of the checkpoint and cannot be chosen")
        return self

    @property
    def hidden(self) -> int:
        """Channels inside an MLP."""
        plain = int(self.width * self.mlp_ratio)
        return plain if self.mlp == "gelu" else int(2 * plain / 3)


def _norm(width: int, bias: bool) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, bias=bias)


class _Attention(nn.Module):
    """Self-attention (`qkv`), or cross-attention (`q` and `kv`). (T, D) -> (T, D)."""

    def __init__(self, c: ForeignConfig, cross: bool):
        super().__init__()
        d, self.heads, self.backend = c.width, c.heads, c.attention
        if cross:
            self.q, self.kv = nn.Linear(d, d, bias=c.qkv_bias), nn.Linear(d, 2 * d, bias=c.qkv_bias)
        else:
            self.qkv = nn.Linear(d, 3 * d, bias=c.qkv_bias)
        self.q_norm = _norm(c.head_width, c.norm_bias) if c.qk_norm else None
        self.k_norm = _norm(c.head_width, c.norm_bias) if c.qk_norm else None
        self.proj = nn.Linear(d, d, bias=c.proj_bias)

    def forward(self, x: Tensor, mask: Mask, context: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1) if context is None else (self.q(x), *self.kv(context).chunk(2, -1))
        if self.q_norm is not None:
            q = self.q_norm(q.unflatten(1, (self.heads, -1))).flatten(1).to(v.dtype)
            k = self.k_norm(k.unflatten(1, (self.heads, -1))).flatten(1).to(v.dtype)
        return self.proj(attend(q, k, v, self.heads, mask, self.backend))


class _MLP(nn.Module):
    def __init__(self, c: ForeignConfig):
        super().__init__()
        self.fc1 = nn.Linear(c.width, c.hidden, bias=c.mlp_bias)
        self.fc2 = nn.Linear(c.hidden, c.width, bias=c.mlp_bias)
        self.fc3 = nn.Linear(c.width, c.hidden, bias=c.mlp_bias) if c.mlp == "swiglu" else None

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)) if self.fc3 is None else F.silu(self.fc1(x)) * self.fc3(x))


class EncoderBlock(nn.Module):
    def __init__(self, c: ForeignConfig):
        super().__init__()
        self.norm1, self.norm2 = _norm(c.width, c.norm_bias), _norm(c.width, c.norm_bias)
        self.attn, self.mlp = _Attention(c, False), _MLP(c)

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nn.Module):
    def __init__(self, c: ForeignConfig):
        super().__init__()
        self.norm1, self.norm2 = _norm(c.width, c.norm_bias), _norm(c.width, c.norm_bias)
        self.query_norm, self.context_norm = _norm(c.width, c.norm_bias), _norm(c.width, c.norm_bias)
        self.self_attn, self.cross_attn, self.mlp = _Attention(c, False), _Attention(c, True), _MLP(c)

    def forward(self, x: Tensor, own: Mask, context: Tensor, cross: Mask) -> Tensor:
        x = x + self.self_attn(self.norm1(x), own)
        x = x + self.cross_attn(self.query_norm(x), cross, self.context_norm(context))
        return x + self.mlp(self.norm2(x))


class Head(nn.Module):
    """The output matrix (V, D), with a bias (V,) where the original has one."""

    def __init__(self, rows: int, width: int, bias: bool = False):
        super().__init__()
        self.table = nn.Parameter(torch.randn(rows, width) * width**-0.5 * 0.5)
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None

    def weight(self) -> Tensor:
        return self.table


class Slots(NamedTuple):
    """Tokens by number: row of the embedding table, modality (-1: a register), row of the position table; each (T,)."""

    row: Tensor
    modality: Tensor
    place: Tensor


def with_more(slots: Slots, rows: Ragged, sample_N: Tensor, more: Slots) -> tuple[Slots, Ragged]:
    """Return packed tokens with N more ones, each put behind those of its sample."""
    device = slots.row.device
    sample = torch.cat([torch.repeat_interleave(torch.arange(rows.rows, device=device), rows.lengths), sample_N])
    order = torch.argsort(sample, stable=True)
    lengths = torch.bincount(sample, minlength=rows.rows)
    return Slots(*(torch.cat(pair)[order] for pair in zip(slots, more, strict=True))), Ragged.of(lengths.cpu().numpy()).to(device)


class Shown(NamedTuple):
    """The encoder's input x (T, D), what is added to its output again for the decoder (T, D), and the rows of both."""

    x: Tensor
    again: Tensor
    rows: Ragged


class ForeignModel(TokenModel):
    """Encoder and decoder of another project; subclasses say what goes into them."""

    config: ForeignConfig
    encodes = True

    def __init__(self, config: ForeignConfig, layout: Layout):
        super().__init__()
        self.config, self.layout = config, layout
        c = self.config
        self.encoder = nn.ModuleList([EncoderBlock(c) for _ in range(c.encoder_layers)])
        self.decoder = nn.ModuleList([DecoderBlock(c) for _ in range(c.decoder_layers)])
        self.enc_norm, self.dec_norm = _norm(c.width, c.norm_bias), _norm(c.width, c.norm_bias)
        self._columns(layout)

    @abstractmethod
    def shown(self, batch: Packed) -> Shown:
        """Return what the encoder reads."""

    @abstractmethod
    def asked(self, batch: Packed) -> tuple[Tensor, Mask]:
        """Return the decoder's input (Td, D), and which of it sees which."""

    context: nn.Linear

    def encode(self, batch: Packed) -> Tensor:
        """Return the encoder's output; it may hold more tokens than the batch shows."""
        return self._encoded(self.shown(batch))

    def decode(self, batch: Packed, encoded: Tensor) -> Tensor:
        """Return the decoder's output (Td, D), given the encoder's."""
        return self._decoded(batch, self.shown(batch), encoded)

    def answers(self, batch: Packed) -> Tensor:
        shown = self.shown(batch)
        return self._decoded(batch, shown, self._encoded(shown))

    def _encoded(self, shown: Shown) -> Tensor:
        x, mask = shown.x, Mask(shown.rows, shown.rows)
        for block in self.encoder:
            x = block(x, mask)
        return self.enc_norm(x)

    def _decoded(self, batch: Packed, shown: Shown, encoded: Tensor) -> Tensor:
        context = self.context(encoded) + shown.again
        y, own = self.asked(batch)
        cross = Mask(batch.dec, shown.rows, k_row=batch.dec_context)
        for block in self.decoder:
            y = block(y, own, context, cross)
        return self.dec_norm(y)
