"""Attention over packed rows of different length. This is the attention code; nothing else computes any.

`attend` takes packed queries and keys with their `Ragged` row maps and returns packed outputs. Backends, which agree
to rounding (tested):

    padded   rows padded inside this call, plain matrix products and softmax: quickest on a CPU at small widths.
    sdpa     rows padded inside this call, torch's scaled_dot_product_attention.
    loop     one row at a time: nothing padded; wins at large widths on a CPU.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nano4m_cli.model.batch import Ragged

BACKENDS = ("padded", "sdpa", "loop")
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


class Mask:
    """Which keys a query may see: keys of its own row and, where the row is causal, none after it.

    Args:
        q, k: row maps. k_row: (q.rows,) row of k that each row of q looks at; None: the same.
        causal: (q.rows,) bool, or None.
    """

    def __init__(self, q: Ragged, k: Ragged, k_row: Tensor | None = None, causal: Tensor | None = None):
        self.q, self.k, self.k_row, self.causal = q, k, k_row, causal
        key = torch.arange(k.width, device=k.lengths.device)
        lengths = k.lengths if k_row is None else k.lengths[k_row]
        allowed = (key < lengths[:, None])[:, None]  # (S, 1, Lk)
        if causal is not None and bool(causal.any()):
            assert q.width == k.width, (q.width, k.width)
            order = key[:, None] >= key  # (Lq, Lk)
            allowed = allowed & (order | ~causal[:, None, None])
        self.bias = torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, NEVER)  # (S, 1 or Lq, Lk)
        self._cache: dict[tuple, Tensor] = {}

    def head_bias(self, heads: int, dtype: torch.dtype) -> Tensor:
        """Return the bias as (S * heads, 1 or Lq, Lk)."""
        key = ("bias", heads, dtype)
        if key not in self._cache:
            self._cache[key] = self.bias.to(dtype).repeat_interleave(heads, 0)
        return self._cache[key]

    def place(self, side: Literal["q", "kv"], heads: int) -> Tensor:
        """Return where each head vector goes, so that padded rows come out as (S * heads, L, D / heads).

        "q": (T * heads,), in the order of a (T, heads, .) tensor; "kv": (T * 2 * heads,), of a (T, 2, heads, .) tensor,
        keys before values.
        """
        key = (side, heads)
        if key not in self._cache:
            r, copies = (self.q, 1) if side == "q" else (self.k, 2)
            row, offset = r.place // r.width, r.place % r.width
            which = torch.arange(copies, device=row.device)[:, None] * r.rows
            head = torch.arange(heads, device=row.device)
            full = ((which + row[:, None, None]) * heads + head) * r.width + offset[:, None, None]
            self._cache[key] = full.reshape(-1)
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
    rq, rk = mask.q, mask.k
    q = _Pad.apply(q_TD.reshape(-1, width), mask.place("q", heads), rq.rows * heads * rq.width)
    kv = _Pad.apply(kv_T2D.reshape(-1, width), mask.place("kv", heads), 2 * rk.rows * heads * rk.width)
    q, (k, v) = q.view(-1, rq.width, width), kv.view(2, -1, rk.width, width)
    if mask.k_row is not None:
        pick = lambda x: x.view(rk.rows, -1).index_select(0, mask.k_row).view(-1, rk.width, width)  # noqa: E731
        k, v = pick(k), pick(v)
    bias = mask.head_bias(heads, q.dtype)
    if backend == "sdpa":
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        with torch.autocast(q.device.type, enabled=False):  # the softmax's fp32 arithmetic stays inside its kernel
            score = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=width**-0.5)  # (S * heads, Lq, Lk)
            y = torch.bmm(torch.softmax(score, -1), v)
    return _Unpad.apply(y.reshape(-1, width), mask.place("q", heads)).view(q_TD.shape)


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
