"""Optimizers: AdamW for everything, or Muon for the hidden matrices and AdamW for the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nano4m_cli.compute import multiplies_bf16
from nano4m_cli.train.config import TrainConfig
from nano4m_cli.train.sharding import is_shared, local, norm_over_ranks


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are orthogonalised (Jordan et al. 2024), equal shapes in one batched product.

    The same update as `torch.optim.Muon`, bit for bit (tested), which handles one matrix at a time: at small widths
    its many small products took a third of a training step. Parameters must be 2-D.

    dtype: of the orthogonalisation (None: bf16 as there, but fp32 on hardware that does not multiply bf16).
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95, ns_steps: int = 5,
                 dtype: torch.dtype | None = None):
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "ns_steps": ns_steps})

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            shapes: dict[tuple, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    assert p.ndim == 2, p.shape
                    shapes[tuple(p.shape)].append(p)
            for shape, params in shapes.items():
                for p in params:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum_buffer"] for p in params]
                grads = [p.grad for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                update = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))
                update = self.orthogonalise(update, group["ns_steps"]).to(params[0].dtype)
                lr = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(update.unbind(0)), alpha=-lr)

    def orthogonalise(self, x: Tensor, steps: int) -> Tensor:
        """Return the Newton-Schulz approximation of each matrix's nearest (semi-)orthogonal one; (N, r, c)."""
        a, b, c = self.COEFFICIENTS
        x = x.to(self.dtype or (torch.bfloat16 if multiplies_bf16(x.device.type) else torch.float32))
        tall = x.shape[1] > x.shape[2]
        if tall:
            x = x.transpose(1, 2)
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
        for _ in range(steps):
            gram = x @ x.transpose(1, 2)
            poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, poly, x, beta=a)
        return x.transpose(1, 2) if tall else x


def clip_gradients(params: Iterable[Tensor], limit: float) -> float:
    """Return the norm of all gradients together, after scaling them down to `limit` where it is more; where it is not, they
    are not touched (`clip_grad_norm_` multiplies them by one)."""
    params = [p for p in params if p.grad is not None]
    shared = any(is_shared(p.grad) for p in params)
    grads = [local(p.grad) for p in params]
    norm = nn.utils.get_total_norm(grads)
    if shared:
        norm = norm_over_ranks(norm)
    if norm > limit and shared:
        torch._foreach_mul_(grads, (limit / (norm + 1e-6)).item())
    elif norm > limit:
        nn.utils.clip_grads_with_norm_(params, limit, norm)
    return float(norm)


def build_optimizers(model: nn.Module, c: TrainConfig) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a config; each group carries its peak rate as "peak_lr".

    Muon (Jordan et al. 2024) takes the matrices inside encoder, decoder or stack; embeddings, heads, gains and projections
    at the borders stay with AdamW. Vectors are not decayed.

    With muP (model.mup_base) rates are those of the base width. AdamW's for matrices whose inputs grow with the width are
    divided by width / base, as table 8 of Yang et al. 2022 (arXiv:2203.03466) has it, and their decay multiplied, so that
    rate times decay stays; tables and vectors keep theirs. Muon's needs nothing: its update has the spectral norm
    sqrt(max(1, rows / columns)), whatever the width, which is what feature learning asks (Yang et al. 2023, arXiv:2310.17813).
    """
    grown = getattr(model, "grown", 1.0)
    wide = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} if grown != 1 else set()
    hidden, scaled, matrices, rest = [], [], [], []
    for name, p in model.named_parameters():
        inner = name.split(".")[0] in ("encoder", "decoder", "blocks")
        if p.ndim == 2 and inner and c.optimizer == "muon" and min(p.shape) > 16:
            hidden.append(p)
        elif id(p) in wide:
            scaled.append(p)
        elif p.ndim >= 2:
            matrices.append(p)
        else:
            rest.append(p)
    groups = [{"params": matrices, "weight_decay": c.weight_decay}, {"params": rest, "weight_decay": 0.0},
              {"params": scaled, "weight_decay": c.weight_decay * grown, "lr": c.lr / grown}]
    out: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], lr=c.lr, betas=c.betas, eps=1e-8, fused=True)
    ]
    if hidden:
        dtype = torch.float32 if c.precision == "fp32" else None
        out.append(Muon(hidden, lr=c.muon_lr, weight_decay=c.weight_decay, dtype=dtype))
    for optimizer in out:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return out
