"""The parts of every step to come, made in the training process or ahead in others."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from nano4m_cli.errors import Nano4MError, TrainingError


class Source(Protocol):
    """What batches come from. It may have `places(step)`: the samples of a step by the shards that they lie in."""

    def batch(self, step: int) -> list[Any]: ...

    def keys(self, step: int) -> list[str]: ...


class Feed:
    """Iterates over the parts of steps, in order.

    Args:
        workers: processes that make them ahead (0: none). minutes: how long a step's may take to come.
        move: brings them to where they are computed. pin: whether they are made in pinned memory, where there are workers.
    """

    def __init__(self, task: Source, steps: range, workers: int, minutes: float, move: Callable[[list[Any]], list[Any]],
                 pin: bool = False):
        self.task, self.next, self.minutes, self.move = task, steps.start, minutes, move
        self._processes: Any = None
        if workers:
            loader = torch.utils.data.DataLoader(
                _Steps(task), batch_size=None, sampler=list(steps), num_workers=workers, prefetch_factor=4,
                worker_init_fn=_leave_signals, timeout=60 * minutes, pin_memory=pin,
            )
            self._processes = iter(loader)
            self._parts: Iterator[Any] = self._processes
        else:
            self._parts = (task.batch(step) for step in steps)

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> list[Any]:
        """Return the next step's parts; what cannot be read, or does not come, is an error that names it."""
        try:
            parts = next(self._parts)
        except RuntimeError as err:
            if "DataLoader timed out" not in str(err):
                raise
            places = getattr(self.task, "places", self.task.keys)(self.next)
            raise TrainingError(
                f"step {self.next + 1}: no data came within {self.minutes:g} min; waited for {'; '.join(places[:4])} ...",
                "is the data's disk or server there?",
            ) from err
        if isinstance(parts, Nano4MError):
            raise parts
        self.next += 1
        return self.move(parts)

    def close(self) -> None:
        """End the processes: one that hangs on its disk leaves signals alone."""
        fed, self._processes = self._processes, None
        if fed is None:
            return
        fed._shutdown_workers()  # waits for them, and stops watching over them
        for worker in fed._workers:
            if worker.is_alive():
                worker.kill()
                worker.join()


def _leave_signals(worker: int) -> None:
    """Leave stopping to the training process: signals often reach the whole group, and it still needs its loaders."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


class _Steps(torch.utils.data.Dataset):
    """`task.batch` as a map-style data set over steps."""

    def __init__(self, task: Source):
        self.task = task

    def __getitem__(self, step: int) -> list[Any] | Nano4MError:
        try:
            return self.task.batch(step)
        except Nano4MError as err:  # as it is; the loader would wrap it into a traceback
            return err

    def __len__(self) -> int:
        return 1 << 40
