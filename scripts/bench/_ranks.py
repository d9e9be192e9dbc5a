"""How a bench starts itself as several processes of one thread each, which meet through nano4m_cli.dist."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def launch(processes: int, option: str, file: Path) -> Any:
    """Run this script with the same arguments and `option FILE` once per rank; return the JSON that they left in the file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    command = [sys.executable, *sys.argv, option, str(file)]
    started = [
        subprocess.Popen(command, env={**os.environ, **{k: str(v) for k, v in {**place, "RANK": r, "LOCAL_RANK": r}.items()}})
        for r in range(processes)
    ]
    if any([p.wait() for p in started]):
        raise SystemExit("a process failed")
    return json.loads(file.read_text())
