"""Cross-entropy where every answer chooses among its own modality's ids. The softmax is in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def grouped_nll(
    h_TD: Tensor, weight_VD: Tensor, ids_T: Tensor, group_index: Sequence[Tensor | None], sizes: Sequence[int]
) -> Tensor:
    """Return (T,) fp32: -log softmax(h W_g^T)[id] in nats, where W_g are the rows of the answer's vocabulary group g.

    Args:
        ids_T: ids within the group. group_index: per group, which of the T answers are its (None: none); every answer is in
            one. sizes: rows of each group, which lie one after the other in the table.
    """
    return _GroupedNLL.apply(h_TD, weight_VD, ids_T, tuple(group_index), tuple(sizes))


class _GroupedNLL(torch.autograd.Function):
    """Written out, because autograd would keep all groups' logits at once, and give the table a gradient of its full size for
    each group. What is kept is each group's log-probabilities."""

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, ids: Tensor, group_index, sizes) -> Tensor:
        device = h.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        out, kept = h.new_zeros(len(h), dtype=torch.float32), []
        with torch.autocast(device, enabled=False):
            x = h.to(dtype)
            for index, rows in zip(group_index, weight.to(dtype).split(sizes), strict=True):
                if index is not None:
                    logp = F.log_softmax(F.linear(x.index_select(0, index), rows).float(), -1)
                    out.index_copy_(0, index, logp.gather(1, ids[index, None]).neg_().squeeze(1))
                    kept.append(logp)
        ctx.save_for_backward(h, weight, ids, *kept)
        ctx.group_index, ctx.sizes, ctx.dtype = group_index, sizes, dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        h, weight, ids, *kept = ctx.saved_tensors
        x, table = h.to(ctx.dtype), weight.to(ctx.dtype)
        d_h, d_table = torch.empty_like(x), torch.empty_like(table)
        left = iter(kept)
        for index, rows, d_rows in zip(ctx.group_index, table.split(ctx.sizes), d_table.split(ctx.sizes), strict=True):
            if index is None:
                d_rows.zero_()
                continue
            own = grad[index, None]
            # In the place of what was kept: autograd refuses a second backward pass over it.
            d = next(left).exp_().mul_(own).scatter_add_(1, ids[index, None], -own).to(ctx.dtype)
            torch.mm(d.t(), x.index_select(0, index), out=d_rows)
            d_h.index_copy_(0, index, d @ rows)
        return d_h.to(h.dtype), d_table.to(weight.dtype), None, None, None
