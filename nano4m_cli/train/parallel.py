"""How the processes of a run make one step together: alone, as replicas (DDP) or as shards (FSDP2).

A task's loss is a share of the whole step's loss: it is divided by the answers of all ranks. So gradients are summed over
ranks, not averaged, and one step is the same step for any number of them.
"""

from __future__ import annotations

import contextlib
from inspect import signature
from typing import Any, Protocol

import torch
import torch.distributed as td
from torch import Tensor, nn

from nano4m_cli import dist
from nano4m_cli.train.config import TrainConfig

BUCKET_MB = 25.0  # of a large model; a small one's gradients still go in a few pieces, so that sending and computing overlap
PIECES = 4


class Lossy(Protocol):
    model: nn.Module

    def loss(self, part: Any) -> tuple[Tensor, dict[str, Tensor]]: ...


class Alone:
    """One process: the task's loss as it is."""

    def __init__(self, task: Lossy):
        self.task = task

    def backward(self, part: Any, autocast: Any, last: bool) -> dict[str, Tensor]:
        """Add the gradients of a part's loss; return the loss and its named figures, of this rank's share.

        Args:
            last: whether this is the step's last part: only then are gradients sent.
        """
        with self._sending(last):
            with autocast:
                loss, named = self._loss(part)
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


def arrange(task: Lossy, config: TrainConfig) -> Alone:
    """Return how this process computes its part of every step; the model is on its device already."""
    return Alone(task) if dist.ranks() == 1 else Replicas(task)
