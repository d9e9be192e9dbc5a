"""The layers that all models share: norms, MLPs, token tables, positions, transformer blocks."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nano4m_cli.model.attention import Cache, Mask, attend, attend_folded, attend_kept, weights
from nano4m_cli.model.batch import Ragged
from nano4m_cli.model.positions import rotate
from nano4m_cli.spec import Layout

Norm = Literal["layernorm", "rmsnorm"]


def make_norm(kind: Norm, width: int) -> nn.Module:
    """Return a norm with a gain and no bias."""
    return nn.LayerNorm(width, eps=1e-6, bias=False) if kind == "layernorm" else nn.RMSNorm(width, eps=1e-6)


class Linear(nn.Linear):
    """A linear layer whose weight may be held in autocast's type (`lean`): without gradients autocast casts it at every call."""

    _held: Tensor | None = None

    @property
    def held(self) -> Tensor:
        """The weight to multiply with."""
        return self.weight if self._held is None else self._held

    def hold(self, dtype: torch.dtype) -> None:
        self._held = self.weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.held, self.bias)


def linear(n_in: int, n_out: int, gain: float = 1.0) -> Linear:
    """Return a bias-free linear layer, weights N(0, gain^2 / n_in)."""
    layer = Linear(n_in, n_out, bias=False)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(n_in))
    return layer


def sincos(position_C3: np.ndarray, width: int, axes: int) -> Tensor:
    """Return float32 (C, width): sines and cosines of the first `axes` coordinates, equal shares of the width.

    Frequencies 10000^(-i / n) as in Vaswani et al. 2017; for several axes as in MAE's 2-D embedding. A share that does
    not divide leaves zeros at the end.
    """
    out = np.zeros((len(position_C3), width), dtype=np.float64)
    per = width // axes // 2
    omega = 10000.0 ** (-np.arange(per) / per)
    for a in range(axes):
        angle = position_C3[:, a, None] * omega
        out[:, 2 * a * per : 2 * (a + 1) * per] = np.concatenate([np.sin(angle), np.cos(angle)], 1)
    return torch.from_numpy(out.astype(np.float32))


def position_table(layout: Layout, width: int) -> Tensor:
    """Return float32 (C, width): 2-D or 3-D sincos for grids, (frame, codebook) or frame for codes, 1-D for text."""
    parts = []
    for m, spec in enumerate(layout.specs):
        position = layout.position_C3[layout.start[m] : layout.start[m + 1]]
        if spec.kind == "grid":
            used = position[:, 1:] if len(spec.shape) == 2 else position
        else:
            used = position[:, : 2 if spec.codebooks > 1 else 1]
        parts.append(sincos(used, width, used.shape[1]))
    return torch.cat(parts)


class TokenTable(nn.Module):
    """One vector per id of every vocabulary group, side by side in one (V, D) table.

    Where ids are mixed-radix numbers (finite scalar quantisation), a vector per level value is added, so that codes
    which share a level share what is learned of it. The own vectors of such ids start near zero (`OWN` of the usual
    spread): a code begins as the sum of its levels and departs from it as far as its own samples say.
    """

    OWN = 0.05
    _held: Tensor | None = None

    def __init__(self, layout: Layout, width: int, std: float, multiplier: float = 1.0):
        super().__init__()
        self.std, self.multiplier = std, multiplier  # of all but own vectors at the start; of `weight()`
        total = int(layout.vocab_start[-1])
        self.table = nn.Parameter(torch.randn(total, width) * std)
        most = max((len(s.levels) for s in layout.specs), default=0)
        self.factored = most > 0
        if self.factored:
            rows = np.zeros((total, most), dtype=np.int64)  # row 0 of the level table stays zero
            used = 1
            for g, (m, _, size) in enumerate(layout.groups):
                own = slice(layout.vocab_start[g], layout.vocab_start[g + 1])
                ids, base = np.arange(size), 1
                for d, level in enumerate(layout.specs[m].levels):
                    rows[own, d] = used + (ids // base) % level
                    used, base = used + level, base * level
                if layout.specs[m].levels:
                    self.table.data[own] *= self.OWN
            self.register_buffer("level_row", torch.from_numpy(rows), persistent=False)
            self.level = nn.Parameter(torch.randn(used, width) * std)

    def hold(self, dtype: torch.dtype | None) -> None:
        """Keep `weight()` as it is now (the parameters must not change), in a type where one is given."""
        self._held = None
        made = self.weight() if self.factored or self.multiplier != 1 or dtype else None
        self._held = made if made is None or dtype is None else made.to(dtype)

    def weight(self) -> Tensor:
        """Return the (V, D) table with level vectors added, times the multiplier."""
        if self._held is not None:
            return self._held
        out = self.table
        if self.factored:
            out = out + F.embedding_bag(self.level_row, self.level, mode="sum", padding_idx=0)
        return out if self.multiplier == 1 else out * self.multiplier

    def forward(self, rows_T: Tensor) -> Tensor:
        """Return (T, D), rows of `weight()` of a table without multiplier, without making the others."""
        assert self.multiplier == 1, self.multiplier
        own = F.embedding(rows_T, self.table)
        if not self.factored:
            return own
        return own + F.embedding_bag(self.level_row[rows_T], self.level, mode="sum", padding_idx=0)


class _GeluLinear(torch.autograd.Function):
    """gelu(h) @ W^T, of which only h is kept for the backward pass: the widest activation of a block is made again there,
    which costs a hundredth of a step and saves a quarter of what a block keeps. Bit for bit what autograd gives."""

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(h, weight)
        return F.gelu(h) @ weight.to(h.dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        h, weight = ctx.saved_tensors
        d_weight = grad.t() @ F.gelu(h)
        return torch.ops.aten.gelu_backward(grad @ weight.to(h.dtype), h), d_weight.to(weight.dtype)


class MLP(nn.Module):
    def __init__(self, width: int, kind: Literal["gelu", "swiglu"], ratio: float, out_gain: float):
        super().__init__()
        hidden = round(width * ratio) if kind == "gelu" else round(width * ratio * 2 / 3 / 8) * 8
        self.kind = kind
        self.fc1 = linear(width, hidden)
        self.gate = linear(width, hidden) if kind == "swiglu" else None
        self.fc2 = linear(hidden, width, out_gain)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None and not torch.is_grad_enabled():  # in place: a fresh hidden layer is mostly page faults
            return F.linear(torch.ops.aten.gelu_(self.fc1(x)), self.fc2.held)
        if self.gate is None:
            return _GeluLinear.apply(self.fc1(x), self.fc2.weight)
        return self.fc2(F.silu(self.gate(x)) * self.fc1(x))


class Attention(nn.Module):
    """Self-attention, or cross-attention where `context` is given. (T, D) -> (T, D).

    turn, context_turn: with rope, how queries turn, and keys where they are of another row (model/positions.py). Scores
    are divided by the square root of the head width, under muP too: widths differ in the number of heads, not in theirs.
    """

    def __init__(self, cfg, out_gain: float):
        super().__init__()
        width, self.heads, self.backend = cfg.width, cfg.heads, cfg.attention
        self.attend = attend
        self.q = linear(width, width)
        self.kv = linear(width, 2 * width)
        self.out = linear(width, width, out_gain)
        # Queries and keys normalised per head (Henry et al. 2020, arXiv:2010.04245), as 4M does.
        self.q_norm = make_norm(cfg.norm, cfg.head_width) if cfg.qk_norm else None
        self.k_norm = make_norm(cfg.norm, cfg.head_width) if cfg.qk_norm else None

    def _qkv(self, x: Tensor, context: Tensor, turn: Tensor | None, k_turn: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, (k, v) = self.q(x), self.kv(context).chunk(2, -1)
        if self.q_norm is not None:
            q = self.q_norm(q.unflatten(1, (self.heads, -1))).flatten(1).to(v.dtype)
            k = self.k_norm(k.unflatten(1, (self.heads, -1))).flatten(1).to(v.dtype)
        if turn is not None:
            q, k = rotate(q, self.heads, turn), rotate(k, self.heads, k_turn)
        return q, k, v

    def forward(self, x: Tensor, mask: Mask, context: Tensor | None = None, cache: Cache | None = None,
                turn: Tensor | None = None, context_turn: Tensor | None = None) -> Tensor:
        own = context is None
        q, k, v = self._qkv(x, x if own else context, turn, turn if own else context_turn)
        if cache is not None:
            cache.fill(k, v, mask.k)
        return self.out(self.attend(q, k, v, self.heads, mask, self.backend))

    def look(self, x: Tensor, mask: Mask, context: Tensor | None = None, turn: Tensor | None = None,
             context_turn: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """Return what `forward` weighs: per row of queries the weights (heads, Lq, Lk), and all values (Tk, D)."""
        own = context is None
        q, k, v = self._qkv(x, x if own else context, turn, turn if own else context_turn)
        return weights(q, k, self.heads, mask), v

    def keep(self, x: Tensor, cache: Cache, rows: Ragged, at_S: Tensor, turn: Tensor | None = None) -> Tensor:
        """Put the keys (turned) and values of packed tokens behind the `at` tokens of each sample; return the queries (T, D)."""
        q, k, v = self._qkv(x, x, turn, turn)
        cache.fill(k, v, rows, at_S)
        return q

    def keep_context(self, context: Tensor, cache: Cache, rows: Ragged, at_S: Tensor, turn: Tensor | None = None) -> None:
        """Put the keys (turned) and values of a context behind the `at` tokens of each sample."""
        k, v = self.kv(context).chunk(2, -1)
        k = k if self.k_norm is None else self.k_norm(k.unflatten(1, (self.heads, -1))).flatten(1)
        cache.fill(k if turn is None else rotate(k, self.heads, turn), v, rows, at_S)

    def recall(self, x: Tensor, cache: Cache, rows: Ragged, seen_T: Tensor, turn: Tensor | None = None) -> Tensor:
        """Return (T, D): what packed tokens find among the first `seen` cached tokens of their sample."""
        q = self.q(x)
        q = q if self.q_norm is None else self.q_norm(q.unflatten(1, (self.heads, -1))).flatten(1)
        return self.found(q if turn is None else rotate(q, self.heads, turn), cache, rows, seen_T)

    def found(self, q: Tensor, cache: Cache, rows: Ragged, seen_T: Tensor) -> Tensor:
        """Return `recall` for queries that are made."""
        return self.out(attend_kept(q, cache, rows, seen_T))

    def few(self, x: Tensor, mask: Mask, context: Tensor, turn: Tensor | None = None, context_turn: Tensor | None = None) -> Tensor:
        """Return `forward` of few queries, the context's keys and values not made where that is less work."""
        if self.k_norm is not None or turn is not None or len(x) * self.heads >= mask.q.rows * x.shape[1]:
            return self(x, mask, context, turn=turn, context_turn=context_turn)
        return self.out(attend_folded(self.q(x), context, self.kv.held, self.heads, mask))


class Block(nn.Module):
    """Pre-norm transformer block; with `cross`, cross-attention stands between self-attention and MLP."""

    def __init__(self, cfg, layers: int, cross: bool):
        super().__init__()
        gain = 1.0 / math.sqrt((3 if cross else 2) * layers)  # residual outputs sum to order one
        self.norm1 = make_norm(cfg.norm, cfg.width)
        self.attn = Attention(cfg, gain)
        if cross:
            self.query_norm = make_norm(cfg.norm, cfg.width)
            self.cross = Attention(cfg, gain)
        self.norm2 = make_norm(cfg.norm, cfg.width)
        self.mlp = MLP(cfg.width, cfg.mlp, cfg.mlp_ratio, gain)

    def forward(
        self, x: Tensor, mask: Mask, context: Tensor | None = None, cross_mask: Mask | None = None, cache: Cache | None = None,
        turn: Tensor | None = None, context_turn: Tensor | None = None, few: bool = False,
    ) -> Tensor:
        x = x + self.attn(self.norm1(x), mask, cache=cache, turn=turn)
        if context is not None:
            look = self.cross.few if few else self.cross
            x = x + look(self.query_norm(x), cross_mask, context, turn=turn, context_turn=context_turn)
        return x + self.mlp(self.norm2(x))

    def more(self, x: Tensor, cache: Cache, rows: Ragged, at_S: Tensor, seen_T: Tensor, turn: Tensor | None = None) -> Tensor:
        """Return (T, D) for tokens that follow the `at` ones of each sample that are cached, and are put behind them."""
        x = x + self.attn.found(self.attn.keep(self.norm1(x), cache, rows, at_S, turn), cache, rows, seen_T)
        return x + self.mlp(self.norm2(x))

    def recall(self, x: Tensor, cross: Cache, rows: Ragged, seen_T: Tensor, turn: Tensor | None = None) -> Tensor:
        """Return (T, D) after cross-attention to what is cached, and the MLP."""
        x = x + self.cross.recall(self.query_norm(x), cross, rows, seen_T, turn)
        return x + self.mlp(self.norm2(x))


def compile_blocks(model: nn.Module) -> None:
    """Compile every block of a model in place, for any number of tokens. Attention stays as it is: its kernels are written out,
    and its masks differ from batch to batch. Names of parameters and the results (to rounding) stay too.
    """
    own = torch.compiler.disable(attend)
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = own
        if isinstance(module, Block):
            module.compile(dynamic=True)
