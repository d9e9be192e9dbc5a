"""What a run says of itself while it trains: when it began, how fast each rank is, which rank held the others up."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from nano4m_cli import dist

MEMORY = 64  # steps whose median is the usual one
FEW = 16  # steps before anything is unusual
SHORTEST = 1.0  # seconds below which no step is worth a line
LONG, FIRST = 30.0, 300.0  # seconds after which one is worth a line while it lasts; before anything is usual


class Watch:
    """Times the steps of one rank.

    Args:
        stall: how many times the median a step takes that is told.
    """

    def __init__(self, device: torch.device, stall: float):
        self.device, self.stall = device, stall
        self.recent: deque[float] = deque(maxlen=MEMORY)
        self._begin = time.perf_counter()
        self.wait = 0.0  # seconds for the data of this step
        self.idle, self.hungry = True, False  # between steps; waiting for data
        self._reset()

    @contextlib.contextmanager
    def patrol(self, doing: Callable[[], str], tell: Callable[[str], None], rank: int) -> Iterator[None]:
        """Tell of a step while it is taking long, once: a thread looks every second.

        Args:
            doing: says what this rank does once the step's data are there.
        """
        over = threading.Event()

        def look() -> None:
            told = None
            while not over.wait(1.0):
                begin = self._begin
                spent = time.perf_counter() - begin
                recent = tuple(self.recent)
                limit = max(self.stall * statistics.median(recent), LONG) if len(recent) >= FEW else FIRST
                if self.idle or begin == told or spent < limit:
                    continue
                told, what = begin, "waiting for data" if self.hungry else doing()
                tell(f"warning: rank {rank}: a step has taken {spent:.0f} s so far: {what}")

        thread = threading.Thread(target=look, name="patrol", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _reset(self) -> None:
        self.seconds = self.waited = 0.0
        self.tokens = 0

    def begins(self) -> None:
        """A step begins, by waiting for its data."""
        self._begin = time.perf_counter()
        self.idle, self.hungry = False, True

    def fed(self, tokens: int) -> None:
        """The step's data are there."""
        self.wait = time.perf_counter() - self._begin
        self.hungry = False
        self.waited += self.wait
        self.tokens += tokens

    def ends(self, waits: Sequence[float], computes: Sequence[float]) -> dict[str, Any] | None:
        """A step ends; return a note where it took unusually long.

        Args:
            waits, computes: seconds that each rank waited for data, and computed its part of the loss.
        """
        seconds = time.perf_counter() - self._begin
        self.idle = True
        self.seconds += seconds
        usual = statistics.median(self.recent) if len(self.recent) >= FEW else None
        self.recent.append(seconds)
        if usual is None or seconds < max(self.stall * usual, SHORTEST):
            return None
        return {"seconds": round(seconds, 3), "median": round(usual, 4), **blame(seconds, waits, computes)}

    def speed(self) -> dict[str, Any]:
        """Return figures of all ranks since the last call, each as its least, median and greatest with the ranks of both ends."""
        mine = [self.tokens / max(self.seconds, 1e-9), self.waited / max(self.seconds, 1e-9), peak_memory(self.device)]
        table = torch.zeros(dist.ranks(), len(mine), dtype=torch.float64)
        table[dist.rank()] = torch.tensor(mine, dtype=torch.float64)
        columns = dist.sum_of(table).T.tolist()
        self._reset()
        return {"ranks": dist.ranks()} | {
            name: spread(column) for name, column in zip(("tokens_per_s", "data_wait", "memory_mb"), columns, strict=True)
        }


def blame(seconds: float, waits: Sequence[float], computes: Sequence[float]) -> dict[str, Any]:
    """Return which rank held a long step up, and with what; it must have taken half of the step."""
    for what, each in (("data", waits), ("computing", computes)):
        longest = max(each)
        if longest > seconds / 2:
            return {"what": what, "rank": list(each).index(longest), "held": round(longest, 3)}
    return {"what": "other ranks" if len(waits) > 1 else "computing", "rank": None, "held": None}


def stall_line(step: int, note: dict[str, Any]) -> str:
    """Return the warning about a long step."""
    took = f"step {step} took {note['seconds']:.1f} s, {note['seconds'] / max(note['median'], 1e-9):.0f} times the median"
    if note["rank"] is None:
        return f"warning: {took}: no rank says why" + (" (gradients on their way?)" if note["what"] == "other ranks" else "")
    did = "waited for data" if note["what"] == "data" else "computed"
    return f"warning: {took}: rank {note['rank']} {did} for {note['held']:.1f} s"


def spread(values: Sequence[float]) -> dict[str, float]:
    low, high = min(values), max(values)
    figures = {"min": low, "median": statistics.median(values), "max": high}
    out = {k: round(v, 4) for k, v in figures.items()}
    return out | ({"min_rank": values.index(low), "max_rank": values.index(high)} if len(values) > 1 else {})


def peak_memory(device: torch.device) -> float:
    """Return the most memory this process has used, in MB (2^20 bytes): of its GPU, or of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def start_note(device: torch.device) -> dict[str, Any]:
    """Return what the record of a start says besides its step."""
    return {"ranks": dist.ranks(), "device": device.type, "host": socket.gethostname()}


class KeyLog:
    """The keys of this rank's samples, a line per step, in keys/rank-00000.jsonl of the run (train.log_keys)."""

    def __init__(self, run: Path, step: int):
        self.path = run / "keys" / f"rank-{dist.rank():05d}.jsonl"
        self.path.parent.mkdir(exist_ok=True)
        self.path.touch()
        # What was seen after the checkpoint will be seen again; ranks that are no more left such lines as well.
        gone = sorted(self.path.parent.glob("rank-*.jsonl"))[dist.ranks() :] if dist.rank() == 0 else []
        for path in (self.path, *(p for p in gone if p.name >= f"rank-{dist.ranks():05d}")):
            lines = path.read_text().splitlines() if step else []
            path.write_text("".join(line + "\n" for line in lines if _step(line) <= step))

    def write(self, step: int, keys: list[str]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, "keys": keys}) + "\n")


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return 1 << 60
