"""Several processes of one run: which of them this one is, and what they say to each other.

In one process everything here answers at once and no process group exists. Under torchrun (RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT in the environment) `joined` meets the others: over gloo on CPUs, over nccl on GPUs with gloo
beside it for what is said in host memory. Every collective ends by a timeout of minutes, never waits for ever.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as td
from torch import Tensor

from nano4m_cli.errors import Nano4MError, TrainingError, UsageError

MINUTES = 10.0
RESUME = "go on from the last good checkpoint with --resume"
# What gloo, nccl and the store say when a peer is gone or silent.
SIGNS = ("connection closed", "connection reset", "broken pipe", "timed out", "timeout", "gloo/transport", "peer", "nccl")

_talk: Any = None  # the gloo group beside nccl; None: the default group
_alone = False  # whether this process does a piece of shared work just now
T, R = TypeVar("T"), TypeVar("R")


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
    return td.get_rank() if _together() else 0


def ranks() -> int:
    """Return how many processes there are to talk to: one while this one does a piece of shared work."""
    return td.get_world_size() if _together() else 1


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Be the only process for a while: what is called inside talks to no other, and others must not wait for it meanwhile."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def _together() -> bool:
    return not _alone and td.is_available() and td.is_initialized()


@contextlib.contextmanager
def joined(device: str = "cpu", minutes: float = MINUTES, again: str = RESUME) -> Iterator[str]:
    """Meet the other processes of the run; give the device of this one ("cuda" becomes its own GPU).

    Args:
        minutes: how long to wait for the others, here and in every collective.
        again: what to do where one of them is lost.

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
        raise lost(err, again) from err
    else:
        td.destroy_process_group()
    finally:
        _talk = None


def is_lost(err: BaseException) -> bool:
    """Return whether an error of a collective says that another process is gone or silent."""
    return ranks() > 1 and isinstance(err, RuntimeError | OSError) and any(s in str(err).lower() for s in SIGNS)


def lost(err: BaseException, again: str = RESUME) -> TrainingError:
    return TrainingError(f"another process of the run is gone or silent: {_first_line(err)}", f"its own output says why; {again}")


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

    The others' error counts as said, so that a user reads it once. A rank that fails may do so while the others are still on
    their way through a `spread` (or another `together`) inside: they hear of it there.
    """
    error: Nano4MError | None = None
    try:
        yield
    except Nano4MError as err:
        if ranks() == 1 or err.known:
            raise
        error = err
    _meet(error, None)


def _meet(error: Nano4MError | None, thing: T) -> list[T]:
    """Return every rank's thing, by rank; where any brings an error, all raise the first one."""
    if ranks() == 1 and error is None:
        return [thing]
    found = gathered((error, thing))
    first = next((r for r, (e, _) in enumerate(found) if e is not None), None)
    if first is None:
        return [t for _, t in found]
    if first != rank():
        error = found[first][0]
        error.said = True
    error.known = True
    raise error


# -- shared work --------------------------------------------------------------------------------------------------------


def spread(
    items: Sequence[T], work: Callable[[T], R], costs: Sequence[float] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[R]:
    """Return [work(item) for item in items] on every rank, each of which did a part of them.

    All ranks call it with the same items. While a rank works on one it is alone: what it calls finds one process, so shared
    work inside is a plain loop. An error of any rank is raised by all, and counts as said by all but that one.

    Args:
        work: its results are sent to all ranks (pickled; ranks of one run trust each other).
        costs: about how long each item takes, in any unit (default: all the same).
        progress: called with (done, total) items; of several ranks by the share that this one has done.
    """
    total, out = len(items), []
    if ranks() == 1:
        for item in items:
            progress(len(out), total)
            out.append(work(item))
        return out
    mine, error = dealt([1.0] * total if costs is None else costs, ranks())[rank()], None
    try:
        with alone():
            for i in mine:
                progress(total * len(out) // len(mine), total)
                out.append((i, work(items[i])))
    except Nano4MError as err:
        error = err
    told = _meet(error, (total, out))
    assert {n for n, _ in told} == {total}, f"ranks share different work: {[n for n, _ in told]} items"
    done = dict(pair for _, some in told for pair in some)
    return [done[i] for i in range(total)]


def by_first(work: Callable[[], R]) -> R:
    """Return what `work` gives on rank 0, which alone does it; an error of it is raised by all."""
    if ranks() == 1:
        return work()
    error = thing = None
    if rank() == 0:
        try:
            thing = work()
        except Nano4MError as err:
            error = err
    return _meet(error, thing)[0]


def dealt(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Return which items each rank does, in order: the dearest first, each to the rank with the least to do (Graham 1969)."""
    load, out = [0.0] * ranks, [[] for _ in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = load.index(min(load))
        load[least] += costs[i]
        out[least].append(i)
    return [sorted(some) for some in out]


@dataclass(frozen=True)
class Work(Generic[R]):
    """A question whose answer is made of pieces that do not depend on each other.

    pieces: functions of nothing. join: makes the answer of their results, in order. costs: about how long each takes.
    """

    pieces: Sequence[Callable[[], Any]]
    join: Callable[[list[Any]], R]
    costs: Sequence[float]


def answers(works: Sequence[Work[R]], progress: Callable[[int, int], None] = lambda done, total: None) -> list[R]:
    """Return the answer of each question on every rank; the pieces of all of them are shared out at once."""
    pieces, costs = ([x for w in works for x in getattr(w, name)] for name in ("pieces", "costs"))
    found = iter(spread(pieces, lambda piece: piece(), costs, progress))
    return [w.join([next(found) for _ in w.pieces]) for w in works]


def _first_line(err: BaseException) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0][:300]
