"""Tensors that processes share by rows (FSDP2's DTensors): this rank's piece, and where it lies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as td
from torch import Tensor

from nano4m_cli import dist
from nano4m_cli.errors import CheckpointError
from nano4m_cli.train.checkpoint import Reader, unpack_optimizers


def is_shared(tensor: Tensor) -> bool:
    """Return whether ranks hold different rows of a tensor. (No DTensor exists without a process group.)"""
    return hasattr(tensor, "placements") and any(p.is_shard() for p in tensor.placements)


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, without a copy."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def rows_of(tensor: Tensor) -> tuple[int, int | None]:
    """Return (first row, rows) that this rank holds; rows None: all ranks hold the same.

    FSDP2 gives each rank ceil(rows / ranks), the last ones less or none.
    """
    if not is_shared(tensor):
        return 0, None
    total, each = tensor.shape[0], -(-tensor.shape[0] // dist.ranks())
    first = min(dist.rank() * each, total)
    held = local(tensor).shape[0]
    assert held == min(each, total - first), (held, each, total, first)
    return first, held


@dataclass(frozen=True)
class Piece:
    """What this rank holds of a tensor of a shape: rows from `first`, `count` of them (None: all ranks hold the same)."""

    tensor: Tensor
    shape: tuple[int, ...]
    first: int
    count: int | None


def piece(tensor: Tensor, copy: bool = False) -> Piece:
    """Return this rank's piece; copy: in host memory, where later steps do not change it."""
    held = local(tensor.detach())
    return Piece(held.to("cpu", copy=True) if copy else held, tuple(tensor.shape), *rows_of(tensor))


def norm_over_ranks(norm: Tensor) -> Tensor:
    """Return the norm of all ranks' pieces together, given that of this one's."""
    squared = norm.detach().float().square()
    td.all_reduce(squared)
    return squared.sqrt()


# -- from a checkpoint of any number of ranks ---------------------------------------------------------------------------


@torch.no_grad()
def fill(point: Reader, part: str, tensors: dict[str, Tensor]) -> None:
    """Copy a part of a checkpoint into tensors of the same names and shapes; of shared ones, this rank's rows."""
    shapes = point.shapes(part)
    if shapes != (mine := {k: tuple(t.shape) for k, t in tensors.items()}):
        other = sorted(k for k in {**shapes, **mine} if shapes.get(k) != mine.get(k))
        raise CheckpointError(f"{point.path}: {part} does not fit this model, in {', '.join(other[:4])}")
    for name, tensor in tensors.items():
        local(tensor).copy_(_rows(point, part, name, tensor))


@torch.no_grad()
def fill_optimizers(point: Reader, optimizers: list[torch.optim.Optimizer]) -> None:
    """Restore optimizers, built from the same config, from a checkpoint; of shared tensors, this rank's rows."""
    packed = {}
    params = [[p for group in o.param_groups for p in group["params"]] for o in optimizers]
    for name, shape in point.shapes("optimizer").items():
        o, p, _ = name.split(".", 2)
        like = params[int(o)][int(p)]
        if is_shared(like) and tuple(like.shape) == shape:
            packed[name] = torch.zeros_like(like)
            local(packed[name]).copy_(_rows(point, "optimizer", name, like))
        else:
            packed[name] = point.rows("optimizer", name)
    unpack_optimizers(optimizers, packed)


def _rows(point: Reader, part: str, name: str, tensor: Tensor) -> Tensor:
    first, count = rows_of(tensor)
    return point.rows(part, name) if count is None else point.rows(part, name, first, first + count)
