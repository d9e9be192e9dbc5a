"""Whether a run that is killed again and again ends with the weights of one that nothing happened to.

    python scripts/bench/kills.py [--kills 20] [--processes 1] [--steps 1500] [--seed 0] [--json] [--quick]

A small model on small data, through the real command line, in one process or under torchrun; checkpoints of averaged weights
and optimizer every tenth step. Each start is ended by SIGKILL to all of its processes at a random moment after it has saved
something new: while training, while writing a checkpoint, while validating. Then the last start is left alone, and the files of
the last checkpoint and the records of metrics.jsonl are compared, byte by byte and number by number, with those of a run that
was never killed. Any difference is an error and exit code 1.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _figures import figure, show
from _reference import make_tokens

SETTINGS = [
    "data.modalities=[rgb,depth,normal,audio,caption]",
    "model.size=d1-1w32", "model.head_width=32", "train.batch=8", "train.precision=fp32",
    "train.optimizer=muon", "train.ema=0.99", "train.log_every=1", "train.checkpoint_every=10", "train.val_every=50",
    "train.val_samples=16", "train.keep=2", "masking.components=[{type: dirichlet, input: [16, 64], target: [16, 64]}]",
]
CLOCK = ("time", "samples_per_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1, help="more than one: under torchrun, all killed at once")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--quick", action="store_true", help="three kills of a short run")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_args()
    if args.quick:
        args.kills, args.steps = 3, 120
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_tokens(root, 64)
        (root / "tiny.yaml").write_text("{}\n")
        figures = run(root, args)
    show("kills", figures, args.json)


def run(root: Path, args: argparse.Namespace) -> list[dict]:
    moments, killed_at, lost = random.Random(args.seed), [], []
    began = time.monotonic()
    while len(killed_at) < args.kills:
        before = newest(root, "killed")
        child = start(root, "killed", args)
        while newest(root, "killed") <= before:
            if child.poll() is not None:
                raise SystemExit(f"start {len(killed_at)} ended by itself:\n{child.communicate()[1][-3000:]}")
            time.sleep(0.002)
        time.sleep(moments.uniform(0.0, 0.15 if args.quick else 0.5))
        if child.poll() is not None:
            raise SystemExit(f"the run ended before kill {len(killed_at) + 1}: give more --steps")
        for pid in family(child.pid):  # torchrun gives its workers sessions of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        child.communicate()
        at, saved = logged(root, "killed"), newest(root, "killed")
        killed_at.append(saved)
        lost.append(float(max(at - saved, 0)))
        print(f"kill {len(killed_at)}: last record of step {at}, last checkpoint of step {saved}", file=sys.stderr, flush=True)
    finish(root, "killed", args)
    seconds = time.monotonic() - began
    finish(root, "whole", args)
    same = files(root, "killed") == files(root, "whole") and records(root, "killed") == records(root, "whole")
    if not same:
        raise SystemExit("the weights or the records of the killed run differ from those of the whole one")
    return [
        figure("kills", [float(args.kills)], "SIGKILL"), figure("identical", [1.0], "1: files and records are the same"),
        figure("steps_lost", lost, "steps a kill"), figure("seconds", [seconds], "s with all restarts"),
    ]


def start(root: Path, name: str, args: argparse.Namespace) -> subprocess.Popen:
    launch = [sys.executable]
    if args.processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}", "--max-restarts=0"]
    command = [*launch, "-m", "nano4m_cli", "train", "tiny.yaml", *SETTINGS, f"name={name}", f"train.steps={args.steps}"]
    return subprocess.Popen(
        [*command, "--resume", "--device", "cpu"], cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1", "NANO4M_ROOT": str(root)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )


def family(pid: int) -> list[int]:
    """Return a process and all that descend from it, the oldest last (Linux)."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    return [p for child in children for p in family(int(child))] + [pid]


def finish(root: Path, name: str, args: argparse.Namespace) -> None:
    child = start(root, name, args)
    _, said = child.communicate()
    if child.returncode:
        raise SystemExit(f"run '{name}' failed:\n{said[-3000:]}")


def newest(root: Path, name: str) -> int:
    points = (p.name.removeprefix("step-") for p in (root / "runs" / name / "checkpoints").glob("step-*"))
    return max((int(p) for p in points), default=0)


def records(root: Path, name: str) -> list[dict]:
    """Return the records of training and validation, without the clock."""
    path = root / "runs" / name / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in lines if r["kind"] in ("train", "val")]


def logged(root: Path, name: str) -> int:
    """Return the last whole record's step."""
    text = (root / "runs" / name / "metrics.jsonl").read_text()
    steps = [json.loads(line)["step"] for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return max(steps, default=0)


def files(root: Path, name: str) -> dict[str, bytes]:
    """Return the last checkpoint's tensors, by file."""
    folder = sorted((root / "runs" / name / "checkpoints").glob("step-*"))[-1]
    return {f"{folder.name}/{p.name}": p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


if __name__ == "__main__":
    main()
