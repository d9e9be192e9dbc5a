"""Whether a job that its time limit and others' jobs send back into the queue ends with the weights of one left alone.

    eval "$(scripts/slurm/one_machine_cluster.sh env)"; python scripts/bench/requeues.py [--rounds 2] [--nodes 2] [--json]

On a SLURM cluster with a partition that preempts the default one (scripts/slurm/one_machine_cluster.sh up). A round is one time
limit and one preemption of a training job of `--nodes` nodes, each once it has trained and after the other has been gone on from.
The files of the last checkpoint and the records of metrics.jsonl are compared with those of a job that nothing happened to. Each
event must cost one start. Any difference is an error and exit code 1.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _figures import figure, show
from _reference import make_tokens
from kills import SETTINGS, files, newest, records

TEMPLATE = Path(__file__).parents[1] / "slurm" / "train.sbatch"
WARN = 600  # seconds before the limit: far more than needed, so that a limit that is set nearer is told of and never reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--partition", default="urgent", help="of the jobs that preempt")
    parser.add_argument("--folder", type=Path, default=Path("."), help="a folder that all nodes see")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder.resolve(), prefix="requeues-") as folder:
        root = Path(folder)
        make_tokens(root, 64)
        (root / "tiny.yaml").write_text("{}\n")
        jobs: list[str] = []
        try:
            figures = run(root, args, jobs)
        finally:
            subprocess.run(["scancel", *jobs])
            while any(said(job)["JobState"] in ("RUNNING", "COMPLETING", "PENDING") for job in jobs):
                time.sleep(0.5)
    show("requeues", figures, args.json)


def run(root: Path, args: argparse.Namespace, jobs: list[str]) -> list[dict]:
    """Return the figures; jobs: gets the numbers of those submitted."""
    job, lost, seconds = submit(root, "hurt", args), [], []
    jobs.append(job)
    for event in [limit, preempt] * args.rounds:
        start = len(seconds)
        wait(f"start {start}", lambda start=start: trained(root, job, start), root, job)
        began, at = time.monotonic(), logged(root, job)
        event(root, job, args)
        wait(f"restart {start + 1}", lambda start=start: int(said(job)["Restarts"]) > start, root, job)
        call("scontrol", "update", f"jobid={job}", "timelimit=60")
        wait(f"start {start + 1}", lambda start=start: trained(root, job, start + 1), root, job)
        seconds.append(time.monotonic() - began)
        lost.append(float(max(at - newest(root, "hurt"), 0)))
        print(f"{event.__name__}: back after {seconds[-1]:.0f} s, from step {newest(root, 'hurt')}", file=sys.stderr, flush=True)
    jobs.append(submit(root, "whole", args))
    for number in jobs:
        wait("the end", lambda number=number: said(number)["JobState"] == "COMPLETED", root, number, 3600)
    if int(said(job)["Restarts"]) != len(seconds):
        raise SystemExit(f"{len(seconds)} events cost {said(job)['Restarts']} starts")
    if files(root, "hurt") != files(root, "whole") or records(root, "hurt") != records(root, "whole"):
        raise SystemExit("the weights or the records of the job that was sent back differ from those of the one left alone")
    return [
        figure("requeues", [float(len(seconds))], f"{args.rounds} time limits, {args.rounds} preemptions"),
        figure("identical", [1.0], "1: files and records are the same"), figure("steps_lost", lost, "steps an event"),
        figure("seconds_away", seconds, "s until it trains again"),
    ]


def submit(root: Path, name: str, args: argparse.Namespace) -> str:
    env = {**os.environ, "NANO4M_PYTHON": sys.executable, "NANO4M_RESEND": "2"}
    options = [f"--nodes={args.nodes}", "--time=60", f"--signal=B:USR1@{WARN}"]
    return call("sbatch", "--parsable", *options, TEMPLATE, "tiny.yaml", *SETTINGS, f"name={name}", f"train.steps={args.steps}",
                here=root, env=env)


def limit(root: Path, job: str, args: argparse.Namespace) -> None:
    call("scontrol", "update", f"jobid={job}", f"timelimit={WARN // 60 - 1}")


def preempt(root: Path, job: str, args: argparse.Namespace) -> None:
    nodes = subprocess.run(["sinfo", "-h", "-o", "%D", "-p", args.partition], capture_output=True, text=True).stdout.strip()
    call("sbatch", f"-p{args.partition}", f"-N{nodes}", "--exclusive", "--output=/dev/null", "--wrap=:", here=root)


def call(*command: object, here: Path | None = None, env: dict[str, str] | None = None) -> str:
    done = subprocess.run([str(c) for c in command], cwd=here, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def said(job: str) -> dict[str, str]:
    """Return what scontrol says of a job."""
    return dict(word.split("=", 1) for word in call("scontrol", "show", "job", job, "--oneliner").split() if "=" in word)


def log(root: Path, job: str) -> str:
    path = root / f"nano4m-train-{job}.out"
    return path.read_text() if path.is_file() else ""


def trained(root: Path, job: str, start: int) -> bool:
    """Return whether a job's given start has logged a step."""
    return bool(re.search(r"^step \d+/", log(root, job).partition(f"start {start}: run ")[2], re.M))


def logged(root: Path, job: str) -> int:
    return int(re.findall(r"^step (\d+)/", log(root, job), re.M)[-1])


def wait(what: str, condition, root: Path, job: str, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end or said(job)["JobState"] in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
            raise SystemExit(f"{what}: the job is {said(job)['JobState']}\n{log(root, job)[-3000:]}")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
