"""Several processes of one run: which of them this one is, and what they say to each other.

In one process everything here answers at once and no process group exists. Under torchrun (RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT in the environment) `joined` meets the others: over gloo on CPUs, over nccl on GPUs with gloo
beside it for what is said in host memory. Every collective ends by a timeout of minutes, never waits for ever.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor

from nano4m_cli.errors import Nano4MError, TrainingError, UsageError

MINUTES = 10.0
# What gloo, nccl and the store say when a peer is gone or silent.
SIGNS = ("connection closed", "connection reset", "broken pipe", "timed out", "timeout", "gloo/transport", "peer", "nccl")

_talk: Any = None  # the gloo group beside nccl; None: the default group


@dataclass(frozen=True)
class Place:
    """Which process of how many this is; `local` counts those of its machine."""

    rank: int = 0
    ranks: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0


def place() -> Place:
    """Return this process's place as its launcher states it; half a statement is a UsageError."""
    said = {k: os.environ.get(k, "") for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if not said["WORLD_SIZE"]:
        return Place()
    try:
        found = Place(*(int(said[k]) for k in ("RANK", "WORLD_SIZE")), int(said["LOCAL_RANK"] or said["RANK"]))
        if not 0 <= found.rank < found.ranks:
            raise ValueError
    except ValueError as err:
        raise UsageError(
            f"WORLD_SIZE={said['WORLD_SIZE']}, RANK={said['RANK']}, LOCAL_RANK={said['LOCAL_RANK']} in the environment name no "
            "process of a group",
            "start with torchrun --nproc_per_node=N -m nano4m_cli ..., or unset WORLD_SIZE",
        ) from err
    return found


def rank() -> int:
    return td.get_rank() if td.is_available() and td.is_initialized() else 0


def ranks() -> int:
    return td.get_world_size() if td.is_available() and td.is_initialized() else 1


@contextlib.contextmanager
def joined(device: str = "cpu", minutes: float = MINUTES) -> Iterator[str]:
    """Meet the other processes of the run; give the device of this one ("cuda" becomes its own GPU).

    Args:
        minutes: how long to wait for the others, here and in every collective.

    Raises:
        UsageError: the environment does not say where the others are, or this process has no GPU.
        TrainingError: they did not come.
    """
    global _talk
    here = place()
    if here.ranks == 1:
        yield device
        return
    if device == "cuda":
        there = torch.cuda.device_count()
        if here.local >= there:
            raise UsageError(
                f"process {here.local} of this machine has no GPU: there are {there}", "one process per GPU, or --device cpu"
            )
        device = f"cuda:{here.local}"
        torch.cuda.set_device(device)
    wait = timedelta(minutes=minutes)
    where = ":".join(os.environ.get(k, "?") for k in ("MASTER_ADDR", "MASTER_PORT"))
    try:
        td.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=wait)
        _talk = td.new_group(backend="gloo", timeout=wait) if device.startswith("cuda") else None
    except ValueError as err:
        raise UsageError(
            f"WORLD_SIZE is {here.ranks}, but the environment does not say where the others are: {_first_line(err)}",
            "start with torchrun --nproc_per_node=N -m nano4m_cli ..., or unset WORLD_SIZE",
        ) from err
    except (RuntimeError, OSError) as err:
        raise TrainingError(
            f"rank {here.rank} of {here.ranks} did not meet the others at {where} within {minutes:g} min: {_first_line(err)}",
            "are all started, and can they reach that address? GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the network card",
        ) from err
    try:
        yield device
    except Nano4MError as err:
        if here.rank and not err.said:
            err.message = f"rank {here.rank}: {err.message}"
        raise
    except (RuntimeError, OSError) as err:
        if not is_lost(err):
            raise
        raise lost(err) from err
    else:
        td.destroy_process_group()
    finally:
        _talk = None


def is_lost(err: BaseException) -> bool:
    """Return whether an error of a collective says that another process is gone or silent."""
    return ranks() > 1 and isinstance(err, RuntimeError | OSError) and any(s in str(err).lower() for s in SIGNS)


def lost(err: BaseException) -> TrainingError:
    return TrainingError(
        f"another process of the run is gone or silent: {_first_line(err)}",
        "its own output says why; go on from the last good checkpoint with --resume",
    )


# -- collectives ------------------------------------------------------------------------------------------------------


def barrier() -> None:
    if ranks() > 1:
        td.barrier(_talk)


def sum_of(values: Tensor) -> Tensor:
    """Return the sum over all ranks of a tensor in host memory (in place)."""
    if ranks() > 1:
        td.all_reduce(values, group=_talk)
    return values


class Summing:
    """The sum over all ranks of a float64 tensor in host memory, on its way: `wait` returns it."""

    def __init__(self, values: Tensor):
        self.values = values
        self._work = td.all_reduce(values, group=_talk, async_op=True) if ranks() > 1 else None

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        return self.values


def gathered(thing: Any) -> list[Any]:
    """Return every rank's thing, by rank (any small Python object; ranks of one run trust each other)."""
    if ranks() == 1:
        return [thing]
    out: list[Any] = [None] * ranks()
    td.all_gather_object(out, thing, group=_talk)
    return out


def told(thing: Any) -> Any:
    """Return rank 0's thing."""
    if ranks() == 1:
        return thing
    out = [thing]
    td.broadcast_object_list(out, src=0, group=_talk)
    return out[0]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Do a thing that any rank may fail at: all leave it, or all raise what the first that failed raised.

    The others' error counts as said, so that a user reads it once.
    """
    error: Nano4MError | None = None
    try:
        yield
    except Nano4MError as err:
        if ranks() == 1:
            raise
        error = err
    found = gathered(error)
    first = next((r for r, e in enumerate(found) if e is not None), None)
    if first is None:
        return
    if first == rank():
        raise error
    found[first].said = True
    raise found[first]


def _first_line(err: BaseException) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0][:300]
