"""A run's metrics.jsonl, which is the truth of what happened, and the sinks beside it; the first of its processes writes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from nano4m_cli import dist
from nano4m_cli.data._atomic import atomic_file
from nano4m_cli.errors import TrainingError
from nano4m_cli.train import checkpoint
from nano4m_cli.train.config import TrainConfig
from nano4m_cli.train.sinks import Sink, open_sinks


class Metrics:
    """Records of one run, a line each: {"kind", "step", "time", figures...}.

    Args:
        run: the run's folder (None: nothing is written).
    """

    def __init__(self, run: Path | None):
        self.run = run
        self.sinks: list[Sink] = []

    @property
    def _path(self) -> Path | None:
        return self.run / "metrics.jsonl" if self.run is not None and dist.rank() == 0 else None

    def open_sinks(self, config: TrainConfig) -> None:
        if self._path is not None:
            self.sinks = open_sinks(config.sinks, self.run, config.model_dump(mode="json"))

    def back_to(self, step: int) -> None:
        """Drop the records of later steps, which will be made again."""
        path = self._path
        if path is not None and path.is_file():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            with atomic_file(path) as file:
                file.write("".join(line + "\n" for line in kept).encode())

    def write(self, kind: str, step: int, figures: dict[str, Any]) -> None:
        """Append a record, and hand it to the sinks."""
        path = self._path
        if path is None:
            return
        line = json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3), **figures})
        try:
            with open(path, "a") as file:
                file.write(line + "\n")
        except OSError as err:
            last = checkpoint.checkpoints(path.parent)
            raise TrainingError(
                f"step {step}: cannot write {path}: {err.strerror}",
                f"the last good checkpoint is {last[-1].name if last else 'none'}; free some space and go on with --resume",
            ) from err
        for sink in self.sinks:
            sink(kind, step, figures)


def _step_of(line: str) -> int:
    """Return the step that a record is of; what was skipped is told before its step is made."""
    try:
        note = json.loads(line)
        return int(note["step"]) + (note["kind"] == "skipped")
    except (ValueError, KeyError):
        return 1 << 60  # a line cut by a kill
