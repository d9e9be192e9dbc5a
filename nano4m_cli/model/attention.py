"""Attention over packed rows of different length. This is the attention code; nothing else computes any.

`attend` takes packed queries and keys with their `Ragged` row maps and returns packed outputs. Backends, which agree
to rounding (tested):

    padded   rows padded inside this call, plain matrix products and softmax: quickest on a CPU at small widths.
    sdpa     rows padded inside this call, torch's scaled_dot_product_attention.
    loop     one row at a time: nothing padded; wins at large widths on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nano4m_cli.model.batch import Ragged

BACKENDS = ("padded", "sdpa", "loop")
GROUPS, MIN_ROWS = 3, 12  # rows are padded in so many groups of at least so many (scripts/bench/attention.py)
NEVER = -1e9  # finite, so that a row without keys gives zeros (its values are padding), not NaN


class _Pad(torch.autograd.Function):
    """(T, D) -> (S * L, D) with zeros between; its gradient is a plain gather."""

    @staticmethod
    def forward(ctx, x: Tensor, place: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(place)
        return x.new_zeros(rows, x.shape[1]).index_copy_(0, place, x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (place,) = ctx.saved_tensors
        return grad.index_select(0, place), None, None


class _Unpad(torch.autograd.Function):
    """(S * L, D) -> (T, D); places are unique, so its gradient is a plain copy."""

    @staticmethod
    def forward(ctx, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.rows = x.shape[0]
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (place,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, grad.shape[1]).index_copy_(0, place, grad), None


@dataclass(frozen=True)
class Group:
    """Rows of about the same length, padded to the longest of them only.

    rows: (S,) which rows, None: all. q_width, k_width: of their longest. bias: (S, 1 or Lq, Lk), NEVER where a query may
    not look.
    """

    rows: Tensor | None
    q_width: int
    k_width: int
    bias: Tensor


class Mask:
    """Which keys a query may see: keys of its own row and, where the row is causal, none after it.

    Args:
        q, k: row maps. k_row: (q.rows,) row of k that each row of q looks at; None: the same.
        causal: (q.rows,) bool, or None.
    """

    def __init__(self, q: Ragged, k: Ragged, k_row: Tensor | None = None, causal: Tensor | None = None):
        self.q, self.k, self.k_row, self.causal = q, k, k_row, causal
        self.groups = [self._group(rows) for rows in self._rows()]
        self._cache: dict[tuple, Tensor] = {}

    def _rows(self) -> list[Tensor | None]:
        """Return rows in up to `GROUPS` groups by length, so that short rows are not padded to the longest."""
        if self.k_row is not None or self.q.rows < MIN_ROWS * 2 or self.q.lengths.device.type != "cpu":
            return [None]
        order = torch.argsort(self.q.lengths * self.q.width + self.k.lengths * self.k.width, stable=True)
        return list(order.tensor_split(min(GROUPS, self.q.rows // MIN_ROWS)))

    def _group(self, rows: Tensor | None) -> Group:
        some = slice(None) if rows is None else rows
        q_lengths, k_lengths = self.q.lengths[some], (self.k.lengths if self.k_row is None else self.k.lengths[self.k_row])[some]
        q_width = self.q.width if rows is None else max(int(q_lengths.max()), 1)
        k_width = self.k.width if rows is None else max(int(k_lengths.max()), 1)
        key = torch.arange(k_width, device=k_lengths.device)
        allowed = (key < k_lengths[:, None])[:, None]  # (S, 1, Lk)
        if self.causal is not None and bool(self.causal[some].any()):
            assert q_width == k_width, (q_width, k_width)
            allowed = allowed & ((key[:, None] >= key) | ~self.causal[some][:, None, None])  # (S, Lq, Lk)
        bias = torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, NEVER)
        return Group(rows, q_width, k_width, bias)

    def head_bias(self, group: int, heads: int, dtype: torch.dtype) -> Tensor:
        """Return a group's bias as (S * heads, 1 or Lq, Lk)."""
        key = ("bias", group, heads, dtype)
        if key not in self._cache:
            self._cache[key] = self.groups[group].bias.to(dtype).repeat_interleave(heads, 0)
        return self._cache[key]

    def parts(self, side: Literal["q", "kv"], heads: int) -> list[tuple[int, int]]:
        """Return (first, end) of each group in the flat buffer of padded head vectors that `place` fills."""
        edges = [0]
        for g in self.groups:
            if side == "q":
                size = (self.q.rows if g.rows is None else len(g.rows)) * g.q_width
            else:
                size = 2 * (self.k.rows if g.rows is None else len(g.rows)) * g.k_width
            edges.append(edges[-1] + size * heads)
        return list(zip(edges[:-1], edges[1:], strict=True))

    def place(self, side: Literal["q", "kv"], heads: int) -> Tensor:
        """Return where each head vector goes in the flat buffer, whose groups read as (S * heads, L, D / heads).

        "q": (T * heads,), in the order of a (T, heads, .) tensor; "kv": (T * 2 * heads,), of a (T, 2, heads, .) tensor,
        a group's keys before its values.
        """
        key = (side, heads)
        if key not in self._cache:
            r, copies = (self.q, 1) if side == "q" else (self.k, 2)
            # Per row: where its group begins, rows in that group, its number there, the group's width.
            about = torch.empty(4, r.rows, dtype=torch.int64, device=r.lengths.device)
            for g, (first, _) in zip(self.groups, self.parts(side, heads), strict=True):
                n = r.rows if g.rows is None else len(g.rows)
                width = g.q_width if side == "q" else g.k_width
                facts = torch.tensor([[first], [n], [0], [width]], device=about.device).repeat(1, n)
                facts[2] = torch.arange(n, device=about.device)
                about[:, slice(None) if g.rows is None else g.rows] = facts
            row, offset = r.place // r.width, r.place % r.width
            first, n, number, width = (x[:, None, None] for x in about[:, row])
            which = torch.arange(copies, device=row.device)[:, None]
            head = torch.arange(heads, device=row.device)
            self._cache[key] = (first + ((which * n + number) * heads + head) * width + offset[:, None, None]).reshape(-1)
        return self._cache[key]


def attend(q_TD: Tensor, kv_T2D: Tensor, heads: int, mask: Mask, backend: str = "padded") -> Tensor:
    """Return (Tq, D): softmax(q k / sqrt(head width)) v within the rows of `mask`.

    Args:
        q_TD: (Tq, D), split into `heads`. kv_T2D: (Tk, 2 D), keys then values.
    """
    if backend == "loop":
        return _loop(q_TD, *kv_T2D.chunk(2, -1), heads, mask)
    assert backend in BACKENDS, backend
    width = q_TD.shape[1] // heads
    q_parts, kv_parts = mask.parts("q", heads), mask.parts("kv", heads)
    q = _Pad.apply(q_TD.reshape(-1, width), mask.place("q", heads), q_parts[-1][1])
    kv = _Pad.apply(kv_T2D.reshape(-1, width), mask.place("kv", heads), kv_parts[-1][1])
    qs, kvs = (x.split([z - a for a, z in parts]) for x, parts in ((q, q_parts), (kv, kv_parts)))
    out = []
    for i, (g, q_, kv_) in enumerate(zip(mask.groups, qs, kvs, strict=True)):
        q_, (k_, v_) = q_.view(-1, g.q_width, width), kv_.view(2, -1, g.k_width, width)
        if mask.k_row is not None:
            pick = lambda x: x.view(mask.k.rows, -1).index_select(0, mask.k_row).view(-1, mask.k.width, width)  # noqa: E731
            k_, v_ = pick(k_), pick(v_)
        out.append(_softmax_attention(q_, k_, v_, mask.head_bias(i, heads, q.dtype), backend).reshape(-1, width))
    y = out[0] if len(out) == 1 else torch.cat(out)
    return _Unpad.apply(y, mask.place("q", heads)).view(q_TD.shape)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, backend: str) -> Tensor:
    """Return (S, Lq, W) of (S, Lq, W), (S, Lk, W), (S, Lk, W) and an additive bias (S, 1 or Lq, Lk)."""
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    with torch.autocast(q.device.type, enabled=False):  # the softmax's fp32 arithmetic stays inside its kernel
        score = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)  # (S, Lq, Lk)
        return torch.bmm(torch.softmax(score, -1), v)


def _loop(q_TD: Tensor, k_TD: Tensor, v_TD: Tensor, heads: int, mask: Mask) -> Tensor:
    ks = k_TD.split(mask.k.lengths.tolist())
    vs = v_TD.split(mask.k.lengths.tolist())
    out = []
    for i, q in enumerate(q_TD.split(mask.q.lengths.tolist())):
        j = i if mask.k_row is None else int(mask.k_row[i])
        if not len(q):
            continue
        if not len(ks[j]):
            out.append(torch.zeros_like(q))
            continue
        shape = lambda x: x.reshape(len(x), heads, -1).transpose(0, 1)[None]  # noqa: E731 - (1, H, L, D / H)
        causal = mask.causal is not None and bool(mask.causal[i])
        y = F.scaled_dot_product_attention(shape(q), shape(ks[j]), shape(vs[j]), is_causal=causal)
        out.append(y[0].transpose(0, 1).reshape(len(q), -1))
    return torch.cat(out) if out else q_TD[:0]
