"""How the processes of a run make one step together: alone, as replicas (DDP) or as shards (FSDP2).

A task's loss is a share of the whole step's loss: it is divided by the answers of all ranks. So gradients are summed over
ranks, not averaged, and one step is the same step for any number of them.
"""

from __future__ import annotations

import contextlib
import time
from functools import partial
from inspect import signature
from typing import Any, Protocol

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nano4m_cli import dist
from nano4m_cli.train.config import TrainConfig

BUCKET_MB = 25.0  # of a large model; a small one's gradients still go in a few pieces, so that sending and computing overlap
PIECES = 4


class Lossy(Protocol):
    model: nn.Module

    def loss(self, part: Any) -> tuple[Tensor, dict[str, Tensor]]: ...


class Alone:
    """One process: the task's loss as it is. `seconds` adds up the time that forward passes take; `doing` is what it does now."""

    def __init__(self, task: Lossy):
        self.task, self.seconds, self.doing = task, 0.0, "computing"

    def backward(self, part: Any, autocast: Any, last: bool) -> dict[str, Tensor]:
        """Add the gradients of a part's loss; return the loss and its named figures, of this rank's share.

        Args:
            last: whether this is the step's last part: only then are gradients sent.
        """
        with self._sending(last):
            begin, self.doing = time.perf_counter(), "computing"
            with autocast:
                loss, named = self._loss(part)
            self.seconds += time.perf_counter() - begin
            self.doing = "computing gradients, or waiting for those of other ranks" if dist.ranks() > 1 else "computing"
            loss.backward()
        return {"loss": loss, **named}

    def _loss(self, part: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.task.loss(part)

    def _sending(self, last: bool) -> Any:
        return contextlib.nullcontext()


class _Loss(nn.Module):
    """A task's loss as the forward pass that DDP wants to see."""

    def __init__(self, task: Lossy):
        super().__init__()
        self.task, self.model = task, task.model
        self.never = nn.Parameter(torch.zeros(()))  # never used: torch warns where nothing is unused in a first step

    def forward(self, part: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, named = self.task.loss(part)
        return loss, {k: v.detach() for k, v in named.items()}


class Replicas(Alone):
    """Every rank holds the model; gradients are sent in buckets while the backward pass goes on.

    What a rank's part does not use (a modality that none of its samples has) is zero in its sum. Looking for it also keeps the
    buckets as they are made: rebuilt after a first step, they would be added in another order before and after a resume.
    """

    def __init__(self, task: Lossy):
        super().__init__(task)
        size = sum(p.numel() * p.element_size() for p in task.model.parameters()) / 2**20
        ddp = nn.parallel.DistributedDataParallel
        # Buffers here are constants. torch 2.13 has another name for leaving them alone.
        no_buffers = {n: False for n in ("forward_sync_buffers", "broadcast_buffers") if n in signature(ddp).parameters}
        self.ddp = ddp(
            _Loss(task), gradient_as_bucket_view=True, find_unused_parameters=True,
            bucket_cap_mb=min(BUCKET_MB, max(size / PIECES, 0.25)), **dict(list(no_buffers.items())[:1]),
        )
        self.ddp.register_comm_hook(None, _sum)

    def _loss(self, part: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.ddp(part)

    def _sending(self, last: bool) -> Any:
        return contextlib.nullcontext() if last else self.ddp.no_sync()


def _sum(state, bucket):
    """Return the future sum of a bucket (a hook; DDP refuses annotations that are text)."""
    work = td.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


class Shards(Alone):
    """Ranks hold the rows of all weights between them (FSDP2): a block's are fetched when it is computed, the others at once.

    What only some ranks' parts use is touched by all, so that all send the same gradients.
    """

    def __init__(self, task: Lossy, device: torch.device):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        super().__init__(task)
        self.model, mesh = task.model, init_device_mesh(device.type, (dist.ranks(),))
        inner = blocks(self.model)
        for block in inner:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        within = {id(m) for block in inner for m in block.modules()}
        outer = [m for m in self.model.modules() if id(m) not in within]
        plain = self.model.modality_sums

        def touched(*args: Any) -> tuple[Tensor, Tensor]:
            total, count = plain(*args)
            return _Touched.apply(total, *(p for m in outer for p in m.parameters(recurse=False))), count

        self.model.modality_sums = touched
        register_fsdp_forward_method(self.model, "modality_sums")

    def _sending(self, last: bool) -> Any:
        self.model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()


class _Touched(torch.autograd.Function):
    """A tensor as it is, whose gradient gives parameters one of zeros."""

    @staticmethod
    def forward(ctx, x: Tensor, *params: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in params]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, *(torch.zeros((), dtype=t, device=d).expand(s) for s, t, d in ctx.like)


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model's stacks, in order."""
    return [b for stack in model.children() if isinstance(stack, nn.ModuleList) for b in stack]


def recompute(model: nn.Module) -> None:
    """Let every block keep its input only, and make the rest again in the backward pass (Chen et al. 2016, arXiv:1604.06174)."""
    for block in blocks(model):
        block.forward = partial(_again, block.forward)


def _again(forward: Any, *args: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **named)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, **named)


def arrange(task: Lossy, config: TrainConfig, device: torch.device) -> Alone:
    """Return how this process computes its part of every step; the model is on its device already."""
    if config.recompute:
        recompute(task.model)
    if dist.ranks() == 1:
        return Alone(task)
    return Shards(task, device) if config.parallel == "fsdp" else Replicas(task)
