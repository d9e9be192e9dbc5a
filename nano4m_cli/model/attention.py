"""Attention over packed rows of different length. This is the attention code; nothing else computes any.

`attend` takes packed queries and keys with their `Ragged` row maps and returns packed outputs. Backends, which agree
to rounding (tested):

    padded   rows padded inside this call, plain matrix products and softmax: quickest on a CPU at small widths.
    sdpa     rows padded inside this call, torch's scaled_dot_product_attention.
    loop     one row at a time: nothing padded; wins at large widths on a CPU.
"""

from __future__ import annotations

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
        allowed = (key < lengths[:, None])[:, None, None]  # (S, 1, 1, Lk)
        if causal is not None and bool(causal.any()):
            assert q.width == k.width, (q.width, k.width)
            order = key[:, None] >= key  # (Lq, Lk)
            allowed = allowed & (order | ~causal[:, None, None])[:, None]
        self.bias = torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, NEVER)


def attend(q_TD: Tensor, k_TD: Tensor, v_TD: Tensor, heads: int, mask: Mask, backend: str = "padded") -> Tensor:
    """Return (T, D): softmax(q k / sqrt(head dim)) v within the rows of `mask`.

    Args:
        q_TD: (Tq, D). k_TD, v_TD: (Tk, D). D is split into `heads`.
    """
    if backend == "loop":
        return _loop(q_TD, k_TD, v_TD, heads, mask)
    q, k, v = _split(q_TD, mask.q, heads), _split(k_TD, mask.k, heads), _split(v_TD, mask.k, heads)
    if mask.k_row is not None:
        k, v = k.index_select(0, mask.k_row), v.index_select(0, mask.k_row)
    if backend == "sdpa":
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.bias.to(q.dtype))
    else:
        assert backend == "padded", backend
        score = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))  # (S, H, Lq, Lk)
        y = torch.matmul(torch.softmax(score + mask.bias.to(score.dtype), -1), v)
    y = y.transpose(1, 2).reshape(mask.q.rows * mask.q.width, q_TD.shape[1])
    return _Unpad.apply(y, mask.q.place)


def _split(x_TD: Tensor, ragged: Ragged, heads: int) -> Tensor:
    """(T, D) -> (S, H, L, D / H)."""
    x = _Pad.apply(x_TD, ragged.place, ragged.rows * ragged.width)
    return x.view(ragged.rows, ragged.width, heads, -1).transpose(1, 2)


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
        shape = lambda x: x.view(len(x), heads, -1).transpose(0, 1)[None]  # noqa: E731 - (1, H, L, D / H)
        causal = mask.causal is not None and bool(mask.causal[i])
        y = F.scaled_dot_product_attention(shape(q), shape(ks[j]), shape(vs[j]), is_causal=causal)
        out.append(y[0].transpose(0, 1).reshape(len(q), -1))
    return torch.cat(out) if out else q_TD[:0]
