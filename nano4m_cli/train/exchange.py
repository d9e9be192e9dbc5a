"""What the processes of a run tell each other of every step, in one small sum: figures, signals they got, seconds they took."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch

from nano4m_cli import dist

# What ends training after the step: the first of those that came counts.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Exchange:
    """Of one process: `stop` is the signal that ends training, once all processes know of it; `times` are, by rank, the seconds
    of the last step for data and for computing."""

    def __init__(self):
        self.times: tuple[list[float], list[float]] = [0.0], [0.0]
        self._got: int | None = None  # the signal this process got
        self._agreed: int | None = None  # the one that all know of

    @property
    def stop(self) -> int | None:
        return self._got if dist.ranks() == 1 else self._agreed

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Turn the stopping signals into a flag that the loop reads between steps."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(signum: int, frame: Any) -> None:
            if self._got is not None and signum == signal.SIGINT:
                raise KeyboardInterrupt  # the second Ctrl-C does not wait
            self._got = signum

        before = {s: signal.signal(s, ask) for s in SIGNALS}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def begin(self, mine: dict[str, float], wait: float, seconds: float) -> dist.Summing:
        """Begin to add up what the ranks say of a step.

        Args:
            mine: this rank's shares of its figures.
            wait, seconds: that this rank waited for data, and computed.
        """
        asked = [float(self._got == s) for s in SIGNALS]
        times = torch.zeros(2, dist.ranks(), dtype=torch.float64)
        times[:, dist.rank()] = torch.tensor([wait, seconds], dtype=torch.float64)
        return dist.Summing(torch.cat([torch.tensor([*mine.values(), *asked], dtype=torch.float64), times.flatten()]))

    def end(self, mine: dict[str, float], shared: dist.Summing) -> dict[str, float]:
        """Return the whole step's figures; take note of a signal that any rank got, and of all ranks' seconds."""
        values = shared.wait().tolist()
        rest = values[len(mine) :]
        asked = [s for s, n in zip(SIGNALS, rest, strict=False) if n]
        self._agreed = asked[0] if asked else None
        times = rest[len(SIGNALS) :]
        self.times = times[: dist.ranks()], times[dist.ranks() :]
        return dict(zip(mine, values, strict=False))
