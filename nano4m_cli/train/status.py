"""How far a run is, from what it has written: metrics.jsonl, its checkpoints, its config. Nothing of it is touched."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nano4m_cli.config import load_yaml
from nano4m_cli.errors import DataError
from nano4m_cli.train import checkpoint
from nano4m_cli.train.run import STOPPED, metrics

RECENT = 10  # records that the rate is taken from
QUIET = 60.0  # seconds of silence that mean nothing yet


@dataclass(frozen=True)
class Status:
    """A run at a moment.

    state: done; stopped (by a signal, a checkpoint saved); running; silent (no record for several times as long as usual: slow,
        or killed); begun (nothing recorded yet). restarts: starts after the first. step, rate and eta are of the last record;
        rate in samples/s, eta, age and silence in seconds. ranks: processes of the last start; speed: over them (train/watch.py).
    """

    run: str
    path: Path
    state: str
    step: int
    steps: int
    rate: float | None = None
    eta: float | None = None
    silence: float | None = None
    restarts: int = 0
    ranks: int = 1
    host: str | None = None
    train: dict[str, float] = field(default_factory=dict)
    val: dict[str, float] = field(default_factory=dict)
    speed: dict[str, Any] = field(default_factory=dict)
    stalls: int = 0
    skipped: int = 0
    checkpoint: str | None = None
    checkpoint_age: float | None = None

    def document(self) -> dict[str, Any]:
        return asdict(self)


def status(run: Path, now: float | None = None) -> Status:
    """Return how far a run is; a folder that holds no run is a DataError."""
    if not (run / "config.yaml").is_file():
        raise DataError(f"{run} is no run: it has no config.yaml")
    now = time.time() if now is None else now
    steps = int(load_yaml(run / "config.yaml").get("train", {}).get("steps", 0))
    records = [r for r in metrics(run) if isinstance(r, dict) and {"kind", "step", "time"} <= r.keys()]
    of = {k: [r for r in records if r["kind"] == k] for k in ("start", "train", "val", "speed", "stall", "skipped")}
    last = of["train"][-1] if of["train"] else None
    start = of["start"][-1] if of["start"] else {}
    points = checkpoint.checkpoints(run)
    step = max([r["step"] for r in of["train"][-1:]] + [checkpoint.step_of(p) for p in points[-1:]], default=0)
    # Only records of one start tell how fast it is: between two there was nothing.
    recent = [r for r in of["train"] if r["time"] >= start.get("time", 0)][-RECENT:]
    per_step = None
    if len(recent) > 1 and recent[-1]["step"] > recent[0]["step"]:
        per_step = (recent[-1]["time"] - recent[0]["time"]) / (recent[-1]["step"] - recent[0]["step"])
    silence = max(now - records[-1]["time"], 0.0) if records else None
    done = bool(points) and checkpoint.step_of(points[-1]) >= steps
    if done:
        state = "done"
    elif (run / STOPPED).is_file():
        state = "stopped"
    elif silence is None or last is None:
        state = "begun"
    else:
        between = (recent[-1]["time"] - recent[-2]["time"]) if len(recent) > 1 else QUIET
        state = "silent" if silence > max(QUIET, 5 * between) else "running"
    return Status(
        run.name, run, state, step, steps,
        rate=last.get("samples_per_s") if last else None,
        eta=None if done or per_step is None else (steps - step) * per_step,
        silence=silence, restarts=max(len(of["start"]) - 1, 0), ranks=start.get("ranks", 1), host=start.get("host"),
        train=_figures(of["train"]), val=_figures(of["val"]), speed=_figures(of["speed"]), stalls=len(of["stall"]),
        skipped=sum(r.get("n", 0) for r in of["skipped"]),
        checkpoint=points[-1].name if points else None,
        checkpoint_age=now - (points[-1] / "state.json").stat().st_mtime if points else None,
    )


def _figures(records: list[dict[str, Any]]) -> dict[str, Any]:
    return {k: v for k, v in records[-1].items() if k not in ("kind", "time")} if records else {}
