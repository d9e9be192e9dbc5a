"""Attention over packed rows of different length. This is the attention code; nothing else computes any.

`attend` takes packed queries and keys with their `Ragged` row maps and returns packed outputs. Backends, which agree
to rounding (tested):

    padded   rows padded inside this call, plain matrix products and softmax: quickest on a CPU at small widths.
    sdpa     rows padded inside this call, torch's scaled_dot_product_attention.
    loop     one row at a time: nothing padded; wins at large widths on a CPU.
    varlen   rows as they lie, nothing padded: torch's varlen_attn (Flash), on CUDA in half precision, without blocks.
    auto     the quickest of these for the device, precision and width at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano4m_cli.errors import ConfigError
from nano4m_cli.model.batch import Ragged

BACKENDS = ("padded", "sdpa", "loop")  # that any device has
LOOP_WIDTH = 512  # from this width on rows one by one pay on a CPU, in fp32 (scripts/bench/attention.py)
GROUPS, MIN_ROWS = 3, 12  # rows are padded in so many groups of at least so many (scripts/bench/attention.py)
LONG, MIN_LONG = 64, 4  # ... or of at least so few, where they are that long on average
HALF = (torch.bfloat16, torch.float16)
NEVER = -1e9  # finite, so that a row without keys gives zeros (its values are padding), not NaN


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


@dataclass(frozen=True)
class Segment:
    """Rows that one call of varlen attention takes.

    q, k: (Tq,), (Tk,) places of their tokens in the packed tensors (None: all, in order). q_ends, k_ends: (rows + 1,) int32,
    where each row begins and the last one ends. q_width, k_width: no row is longer. causal: whether all are.
    """

    q: Tensor | None
    k: Tensor | None
    q_ends: Tensor
    k_ends: Tensor
    q_width: int
    k_width: int
    causal: bool


class Mask:
    """Which keys a query may see: keys of its own row and, where the row is causal, none after it; of blocks, none of a
    later block.

    Args:
        q, k: row maps. k_row: (q.rows,) row of k that each row of q looks at; None: the same.
        causal: (q.rows,) bool, or None.
        block: (T,) block of each token, where queries and keys are the same tokens; None: all are one.
    """

    def __init__(
        self, q: Ragged, k: Ragged, k_row: Tensor | None = None, causal: Tensor | None = None, block: Tensor | None = None
    ):
        self.q, self.k, self.k_row, self.causal, self.block = q, k, k_row, causal, block
        assert block is None or q is k
        self._cache: dict[tuple, Any] = {}  # what the layers that share the mask need again

    @cached_property
    def groups(self) -> list[Group]:
        return [self._group(rows) for rows in self._rows()]

    @cached_property
    def segments(self) -> list[Segment]:
        assert self.block is None
        if self.causal is None:
            return [self._segment(None, False)]
        kinds = ((self.causal, True), (~self.causal, False))
        return [self._segment(rows, causal) for rows, causal in kinds if bool(rows.any())]

    def _segment(self, rows: Tensor | None, causal: bool) -> Segment:
        """Return a segment of all rows, or of those where `rows` (q.rows,) is true."""
        def side(r: Ragged, chosen: Tensor | None) -> tuple[Tensor | None, Tensor]:
            lengths = r.lengths if chosen is None else r.lengths[chosen]
            ends = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
            if chosen is None:
                return None, ends
            first = (r.lengths.cumsum(0) - r.lengths)[chosen] - ends[:-1]
            return torch.repeat_interleave(first, lengths) + torch.arange(int(ends[-1]), device=ends.device), ends

        chosen = None if rows is None else rows.nonzero().squeeze(1)
        looks = chosen if self.k_row is None else self.k_row if chosen is None else self.k_row[chosen]
        (q, q_ends), (k, k_ends) = side(self.q, chosen), side(self.k, looks)
        return Segment(q, k, q_ends, k_ends, self.q.width, self.k.width, causal)

    def _rows(self) -> list[Tensor | None]:
        """Return rows in up to `GROUPS` groups by length, so that short rows are not padded to the longest."""
        if self.k_row is not None or self.q.lengths.device.type != "cpu":
            return [None]
        groups = min(GROUPS, self.q.rows // (MIN_LONG if int(self.q.lengths.sum()) >= LONG * self.q.rows else MIN_ROWS))
        if groups < 2:
            return [None]
        return list(torch.argsort(self.q.lengths * self.q.width + self.k.lengths * self.k.width, stable=True).tensor_split(groups))

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
        if self.block is not None:
            block = self.block.new_zeros(self.q.rows * self.q.width).index_copy_(0, self.q.place, self.block)
            block = block.view(self.q.rows, -1)[some][:, :q_width]
            allowed = allowed & (block[:, :, None] >= block[:, None])
        bias = torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, NEVER)
        return Group(rows, q_width, k_width, bias)

    def head_bias(self, group: int, heads: int, dtype: torch.dtype) -> Tensor:
        """Return a group's bias as (S * heads, 1 or Lq, Lk)."""
        key = ("bias", group, heads, dtype)
        if key not in self._cache:
            self._cache[key] = self.groups[group].bias.to(dtype).repeat_interleave(heads, 0)
        return self._cache[key]

    def parts(self, side: Literal["q", "k"]) -> list[tuple[int, int]]:
        """Return (first, end) of each group in the flat buffer of padded rows that `place` fills, in rows of all heads."""
        r = self.q if side == "q" else self.k
        sizes = [(r.rows if g.rows is None else len(g.rows)) * (g.q_width if side == "q" else g.k_width) for g in self.groups]
        ends = np.cumsum(sizes).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def place(self, side: Literal["q", "k"], heads: int) -> Tensor:
        """Return (T * heads,): where each head vector of a (T, heads, .) tensor goes in the flat buffer, whose groups read
        as (S * heads, L, D / heads)."""
        key = (side, heads)
        if key not in self._cache:
            r = self.q if side == "q" else self.k
            # Per row: where its group begins, its number there, the group's width.
            about = torch.empty(3, r.rows, dtype=torch.int64, device=r.lengths.device)
            for g, (first, _) in zip(self.groups, self.parts(side), strict=True):
                n = r.rows if g.rows is None else len(g.rows)
                width = g.q_width if side == "q" else g.k_width
                facts = torch.tensor([[first * heads], [0], [width]], device=about.device).repeat(1, n)
                facts[1] = torch.arange(n, device=about.device)
                about[:, slice(None) if g.rows is None else g.rows] = facts
            row, offset = r.place // r.width, r.place % r.width
            first, number, width = (x[:, None] for x in about[:, row])
            head = torch.arange(heads, device=row.device)
            self._cache[key] = (first + (number * heads + head) * width + offset[:, None]).reshape(-1)
        return self._cache[key]


def best_backend(device: str, dtype: torch.dtype, width: int, blocks: bool = False, grad: bool = True) -> str:
    """Return what "auto" stands for. device: "cpu" or "cuda". blocks: whether the mask has some. grad: whether in training."""
    if device == "cuda":
        return "varlen" if dtype in HALF and not blocks else "sdpa"
    slow = grad and dtype in HALF  # Flash for CPUs, backwards
    return "loop" if width >= LOOP_WIDTH and not slow else "padded"


def attend(q_TD: Tensor, k_TD: Tensor, v_TD: Tensor, heads: int, mask: Mask, backend: str = "auto") -> Tensor:
    """Return (Tq, D): softmax(q k / sqrt(head width)) v within the rows of `mask`; q (Tq, D), k and v (Tk, D).

    Raises: ConfigError where the backend cannot do it: varlen without CUDA or in fp32.
    """
    if backend == "auto":
        grad = torch.is_grad_enabled() and q_TD.requires_grad
        backend = best_backend(q_TD.device.type, q_TD.dtype, q_TD.shape[1], mask.block is not None, grad)
    if backend == "varlen":
        return _varlen(q_TD, k_TD, v_TD, heads, mask)
    assert backend in BACKENDS, backend
    if backend == "loop":
        return _loop(q_TD, k_TD, v_TD, heads, mask)
    q, k, v = (x.reshape(len(x) * heads, x.shape[1] // heads) for x in (q_TD, k_TD, v_TD))
    return (_Padded.apply(q, k, v, mask, heads) if backend == "padded" else _sdpa(q, k, v, mask, heads)).view(q_TD.shape)


def weights(q_TD: Tensor, k_TD: Tensor, heads: int, mask: Mask) -> list[Tensor]:
    """Return per row of queries its weights (heads, Lq, Lk): softmax(q k / sqrt(head width)), zero where a query may not look.

    To look at what a model attends to: `weights @ v` is `attend` to rounding, row by row and much slower.
    """
    out, ks = [], k_TD.split(mask.k.lengths.tolist())
    blocks = None if mask.block is None else mask.block.split(mask.q.lengths.tolist())
    for i, q in enumerate(q_TD.split(mask.q.lengths.tolist())):
        k = ks[i if mask.k_row is None else int(mask.k_row[i])]
        q_HQW, k_HKW = (x.unflatten(1, (heads, -1)).transpose(0, 1).float() for x in (q, k))
        score = q_HQW @ k_HKW.transpose(1, 2) * q_HQW.shape[2] ** -0.5
        if mask.causal is not None and bool(mask.causal[i]):
            score = score.masked_fill(torch.ones_like(score, dtype=torch.bool).triu(1), -torch.inf)
        if blocks is not None:
            score = score.masked_fill(blocks[i][:, None] < blocks[i], -torch.inf)
        out.append(score.softmax(-1))
    return out


@dataclass
class Cache:
    """Keys and values of one layer for tokens already read: k, v (S, heads, L, head width), filled from the left."""

    k: Tensor
    v: Tensor

    @classmethod
    def empty(cls, samples: int, heads: int, length: int, width: int, like: Tensor) -> Cache:
        return cls(*(like.new_zeros(samples, heads, length, width) for _ in "kv"))

    def fill(self, k_TD: Tensor, v_TD: Tensor, rows: Ragged, at_S: Tensor | None = None) -> None:
        """Put packed rows in, each from the left, or behind the `at` tokens that are there."""
        row, offset = rows.place // rows.width, rows.place % rows.width
        offset = offset if at_S is None else offset + at_S[row]
        for mine, new in ((self.k, k_TD), (self.v, v_TD)):
            mine[row, :, offset] = new.view(len(new), mine.shape[1], -1).to(mine.dtype)


def attend_kept(q_TD: Tensor, cache: Cache, rows: Ragged, seen_T: Tensor) -> Tensor:
    """Return (T, D): attention of packed queries to the first `seen` cached tokens of their sample."""
    s, heads, _, width = cache.k.shape
    longest, m = int(seen_T.max()), rows.width
    even = len(q_TD) == s * m
    pad = lambda x: x if even else x.new_zeros(s * m, *x.shape[1:]).index_copy_(0, rows.place, x)  # noqa: E731
    q = pad(q_TD).view(s, m, heads, width).transpose(1, 2).to(cache.k.dtype)
    bias = None
    if int(seen_T.min()) < longest or not even:
        unseen = torch.arange(longest, device=q.device) >= pad(seen_T).view(s, 1, m, 1)
        bias = torch.zeros(unseen.shape, dtype=q.dtype, device=q.device).masked_fill_(unseen, NEVER)
    y = F.scaled_dot_product_attention(q, cache.k[:, :, :longest], cache.v[:, :, :longest], attn_mask=bias)
    y = y.transpose(1, 2).reshape(s * m, -1).to(q_TD.dtype)
    return y if even else y.index_select(0, rows.place)


def attend_folded(q_TD: Tensor, context_KD: Tensor, kv_2DD: Tensor, heads: int, mask: Mask) -> Tensor:
    """Return (Tq, D): attention to keys and values that are products of `context` with kv, (2 D, D), without making them: the
    queries go through the keys' matrix, the weighted contexts through the values'."""
    wk, wv = (w.to(q_TD.dtype).unflatten(0, (heads, -1)) for w in kv_2DD.chunk(2))  # (H, W, D)
    q = (q_TD.unflatten(1, (heads, -1)).transpose(0, 1) @ wk) * wk.shape[1] ** -0.5  # (H, Tq, D)
    rows, out = context_KD.split(mask.k.lengths.tolist()), []
    for i, q_HQD in enumerate(q.split(mask.q.lengths.tolist(), 1)):
        c = rows[i if mask.k_row is None else int(mask.k_row[i])]
        few = q_HQD.flatten(0, 1)
        out.append(((few @ c.T).softmax(-1) @ c).view(q_HQD.shape))
    return (torch.cat(out, 1) @ wv.transpose(1, 2)).transpose(0, 1).flatten(1)


def _groups(mask: Mask, heads: int, of_q: Sequence[Tensor], of_k: Sequence[Tensor]):
    """Yield for each group its bias (S * heads, 1 or Lq, Lk) and its views (S * heads, L, W) of flat buffers."""
    for i, (g, (qa, qz), (ka, kz)) in enumerate(zip(mask.groups, mask.parts("q"), mask.parts("k"), strict=True)):
        qs = [x[qa * heads : qz * heads].view(-1, g.q_width, x.shape[1]) for x in of_q]
        ks = [x[ka * heads : kz * heads].view(-1, g.k_width, x.shape[1]) for x in of_k]
        yield mask.head_bias(i, heads, of_q[0].dtype), qs, ks


def _pick(x: Tensor, mask: Mask) -> Tensor:
    """Return the rows of keys (R * heads, L, W) that the rows of queries look at, (S * heads, L, W)."""
    return x if mask.k_row is None else x.unflatten(0, (mask.k.rows, -1)).index_select(0, mask.k_row).flatten(0, 1)


def _pad(x: Tensor, place: Tensor, rows: int) -> Tensor:
    return x.new_zeros(rows, x.shape[1]).index_copy_(0, place, x)


class _Padded(torch.autograd.Function):
    """Softmax attention of (Tq * H, W), (Tk * H, W), (Tk * H, W), group by group in one padded buffer each.

    Written out, because autograd would copy and add up what the groups' slices of a buffer can be written into.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Mask, heads: int) -> Tensor:
        at_q, at_k = mask.place("q", heads), mask.place("k", heads)
        n_q, n_k = mask.parts("q")[-1][1] * heads, mask.parts("k")[-1][1] * heads
        q, k, v = _pad(q, at_q, n_q), _pad(k, at_k, n_k), _pad(v, at_k, n_k)
        y, weights = torch.empty_like(q), []
        with torch.autocast(q.device.type, enabled=False):  # the softmax's fp32 arithmetic stays inside its kernel
            for bias, (q_, y_), (k_, v_) in _groups(mask, heads, [q, y], [k, v]):
                score = torch.baddbmm(bias, q_, _pick(k_, mask).transpose(1, 2), alpha=q.shape[1] ** -0.5)
                weights.append(torch.softmax(score, -1))
                torch.bmm(weights[-1], _pick(v_, mask), out=y_)
        ctx.save_for_backward(q, k, v, y, *weights)
        ctx.mask, ctx.heads = mask, heads
        return y.index_select(0, at_q)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, y, *weights = ctx.saved_tensors
        mask, heads, scale = ctx.mask, ctx.heads, q.shape[1] ** -0.5
        at_q, at_k = mask.place("q", heads), mask.place("k", heads)
        grad = _pad(grad, at_q, len(q))
        inner = -(grad * y).sum(-1, keepdim=True)  # of each query: - sum over keys of weight * its gradient
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        groups = _groups(mask, heads, [q, grad, inner, dq], [k, v, dk, dv])
        for p, (_, (q_, grad_, inner_, dq_), (k_, v_, dk_, dv_)) in zip(weights, groups, strict=True):
            d_score = torch.baddbmm(inner_, grad_, _pick(v_, mask).transpose(1, 2)).mul_(p)
            torch.baddbmm(dq_, d_score, _pick(k_, mask), beta=0, alpha=scale, out=dq_)
            _to_keys(dk_, d_score.transpose(1, 2), q_, scale, mask)
            _to_keys(dv_, p.transpose(1, 2), grad_, 1.0, mask)
        return dq.index_select(0, at_q), dk.index_select(0, at_k), dv.index_select(0, at_k), None, None


def _to_keys(out: Tensor, weight: Tensor, x: Tensor, scale: float, mask: Mask) -> None:
    """Write scale * weight @ x, (S * heads, Lk, W), into the rows of keys that `_pick` took."""
    if mask.k_row is None:
        torch.baddbmm(out, weight, x, beta=0, alpha=scale, out=out)
    else:
        rows = torch.bmm(weight, x).mul_(scale).unflatten(0, (mask.q.rows, -1))
        out.zero_().unflatten(0, (mask.k.rows, -1)).index_add_(0, mask.k_row, rows)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask, heads: int) -> Tensor:
    at_q, at_k = mask.place("q", heads), mask.place("k", heads)
    q = q.new_zeros(mask.parts("q")[-1][1] * heads, q.shape[1]).index_copy(0, at_q, q)
    k, v = (x.new_zeros(mask.parts("k")[-1][1] * heads, x.shape[1]).index_copy(0, at_k, x) for x in (k, v))
    out = [F.scaled_dot_product_attention(q_, _pick(k_, mask), _pick(v_, mask), attn_mask=bias).flatten(0, 1)
           for bias, (q_,), (k_, v_) in _groups(mask, heads, [q], [k, v])]
    return torch.cat(out).index_select(0, at_q)


def _varlen(q_TD: Tensor, k_TD: Tensor, v_TD: Tensor, heads: int, mask: Mask) -> Tensor:
    if q_TD.device.type != "cuda" or q_TD.dtype not in HALF or mask.block is not None:
        what = "a block-causal encoder" if mask.block is not None else f"{q_TD.dtype} on {q_TD.device.type}"
        raise ConfigError(f"model.attention=varlen does not take {what}",
                          "it is for CUDA with train.precision=bf16; leave model.attention at auto")
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.view(len(x), heads, -1) for x in (q_TD, k_TD, v_TD))
    out = None
    for s in mask.segments:
        some = lambda x, at: x if at is None else x.index_select(0, at)  # noqa: E731
        y = varlen_attn(some(q, s.q), some(k, s.k), some(v, s.k), s.q_ends, s.k_ends, s.q_width, s.k_width,
                        window_size=(-1, 0 if s.causal else -1))
        out = y if s.q is None else (torch.empty_like(q) if out is None else out).index_copy(0, s.q, y)
    return q_TD[:0] if out is None else out.flatten(1)


def _loop(q_TD: Tensor, k_TD: Tensor, v_TD: Tensor, heads: int, mask: Mask) -> Tensor:
    even = mask.k_row is None and mask.block is None and not (mask.causal is not None and bool(mask.causal.any()))
    if even and mask.q.rows and len(q_TD) == mask.q.rows * mask.q.width and len(k_TD) == mask.k.rows * mask.k.width:
        # Rows of one length are a batch.
        whole = lambda x, r: x.view(r.rows, r.width, heads, -1).transpose(1, 2)  # noqa: E731 - (S, H, L, D / H)
        y = F.scaled_dot_product_attention(whole(q_TD, mask.q), whole(k_TD, mask.k), whole(v_TD, mask.k))
        return y.transpose(1, 2).reshape(q_TD.shape)
    if q_TD.device.type == "cpu":
        return _Rows.apply(q_TD, k_TD, v_TD, heads, mask)
    return torch.cat([q_TD[:0], *(
        F.scaled_dot_product_attention(*(_heads(x, heads) for x in (q_TD[a], k_TD[b], v_TD[b])), attn_mask=may, is_causal=causal)[0]
        .transpose(0, 1).flatten(1) if b.stop > b.start else torch.zeros_like(q_TD[a])
        for a, b, causal, may in _each_row(mask, q_TD.dtype)
    )])


def _heads(x_LD: Tensor, heads: int) -> Tensor:
    """Return a (1, H, L, D / H) view of one row."""
    return x_LD.view(len(x_LD), heads, -1).transpose(0, 1)[None]


def _each_row(mask: Mask, dtype: torch.dtype) -> list[tuple[slice, slice, bool, Tensor | None]]:
    """Return for every row with queries where they are, where its keys are, whether it is causal, and its blocks' bias; kept
    with the mask, which all layers share."""
    key = ("rows", dtype)
    if key not in mask._cache:
        mask._cache[key] = list(_find_rows(mask, dtype))
    return mask._cache[key]


def _find_rows(mask: Mask, dtype: torch.dtype) -> Iterator[tuple[slice, slice, bool, Tensor | None]]:
    q_end, k_end = (np.concatenate([[0], np.cumsum(r.lengths.cpu().numpy())]).tolist() for r in (mask.q, mask.k))
    look = range(mask.q.rows) if mask.k_row is None else mask.k_row.tolist()
    causal = [False] * mask.q.rows if mask.causal is None else mask.causal.tolist()
    for i, j in enumerate(look):
        a, b = slice(q_end[i], q_end[i + 1]), slice(k_end[j], k_end[j + 1])
        if a.stop > a.start:
            block = None if mask.block is None else mask.block[a]
            unseen = None if block is None else block[:, None] < block
            yield a, b, causal[i], None if unseen is None else torch.zeros_like(unseen, dtype=dtype).masked_fill_(unseen, NEVER)


class _Rows(torch.autograd.Function):
    """Rows one by one, each by torch's Flash kernel for CPUs, between slices of whole tensors.

    Written out, because autograd would keep every row's output twice, and give each row gradients that it then adds up.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Mask) -> Tensor:
        y, sums = torch.empty_like(q), []
        for a, b, causal, may in _each_row(mask, q.dtype):
            if b.stop == b.start:
                y[a] = 0
                continue
            views = [_heads(x, heads) for x in (q[a], k[b], v[b])]
            out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*views, 0.0, causal, attn_mask=may)
            _heads(y[a], heads).copy_(out)
            sums.append(log_sum)
        ctx.save_for_backward(q, k, v, y, *sums)
        ctx.heads, ctx.mask = heads, mask
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, y, *sums = ctx.saved_tensors
        # Rows of keys may have many readers, or none.
        shared = ctx.mask.k_row is not None or bool((ctx.mask.q.lengths == 0).any())
        dq, (dk, dv) = torch.empty_like(q), ((torch.zeros_like if shared else torch.empty_like)(x) for x in (k, v))
        left = iter(sums)
        for a, b, causal, may in _each_row(ctx.mask, q.dtype):
            if b.stop == b.start:
                dq[a] = 0
                continue
            views = [_heads(x, ctx.heads) for x in (grad[a], q[a], k[b], v[b], y[a])]
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *views, next(left), 0.0, causal, attn_mask=may
            )
            _heads(dq[a], ctx.heads).copy_(parts[0])
            for whole, part in ((dk, parts[1]), (dv, parts[2])):
                own = _heads(whole[b], ctx.heads)
                own.add_(part) if shared else own.copy_(part)
        return dq, dk, dv, None, None
