"""How benches tell their figures: a median with its spread, and one JSON document that says machine and commit."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path


def figure(name: str, values: Sequence[float], unit: str) -> dict:
    """Return the median of some rounds with the lowest and highest."""
    return {"name": name, "value": statistics.median(values), "unit": unit, "low": min(values), "high": max(values)}


def show(bench: str, figures: list[dict], as_json: bool) -> None:
    """Print figures as a table, or as the one JSON document."""
    if as_json:
        document(bench, figures)
        return
    print(f"{'figure':28} {'median':>10} {'lowest':>10} {'highest':>10}  unit")
    for f in figures:
        print(f"{f['name']:28} {f['value']:10.4g} {f['low']:10.4g} {f['high']:10.4g}  {f['unit']}")


def document(bench: str, figures: list[dict]) -> None:
    """Print the one JSON document."""
    machine = {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps({"bench": bench, "machine": machine, "commit": _commit(), "figures": figures}))


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or None
