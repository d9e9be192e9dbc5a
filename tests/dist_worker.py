"""Groups of processes, one group after the other: what tests/test_dist.py starts.

    python tests/dist_worker.py ROOT GROUPS.json

A group: {"ranks", "port", "jobs": [...]} trains a list of runs, each {"name", "changes", "resume", "stop": {"rank", "step"},
"poison": {"rank", "step"}, "fill": {"rank", "step"} (all of the disk but a few pages; "free" gives it back before), "cut": a file
of the newest checkpoint that loses its second half before}. What a job raises goes to ROOT/said/<name>.<n>.rank-<rank>.json, with
a hash of the rank's weights after it and the number of buckets it sent. Or {"ranks", "port", "name", "command": [...]}: a command
line on every rank, its stderr in ROOT/said/<name>.rank-<rank>.txt. Exit codes go to ROOT/said/codes.json, by group.

Ranks are forked from a process that has torch already: importing it takes longer than all that they do.
"""

import contextlib
import hashlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from workspace_factory import config

from nano4m_cli import __main__ as cli
from nano4m_cli import dist
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import Nano4MError
from nano4m_cli.train import checkpoint, loop, parallel, run, sharding

torch.set_num_threads(1)
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def work(root: Path, number: int, job: dict) -> None:
    said, out = root / "said", {}
    seen, sent = [], []
    one_step, summed = loop.Trainer._one_step, parallel._sum

    def counted(state, bucket):
        sent.append(bucket.index())
        return summed(state, bucket)

    def step(self, parts):
        seen.append(self)
        if job.get("poison") == {"rank": dist.rank(), "step": self.step}:
            weight = self.model.context.weight
            weight.data = weight.data * float("nan")
        if job.get("stop") == {"rank": dist.rank(), "step": self.step}:
            os.kill(os.getpid(), signal.SIGUSR1)
        if job.get("fill") == {"rank": dist.rank(), "step": self.step}:
            fill(root / "runs" / job["name"] / "filler")
        return one_step(self, parts)

    loop.Trainer._one_step, parallel._sum = step, counted
    try:
        prepared = run.prepare(config(root, name=job["name"], **job.get("changes", {})), Workspace(root))
        if "free" in job:
            out["left"] = sorted(p.name for p in (prepared.folder / "checkpoints").iterdir())
            dist.barrier()
            (prepared.folder / "filler").unlink(missing_ok=True)
        if "cut" in job and dist.rank() == 0:
            file = checkpoint.latest(prepared.folder) / job["cut"]
            os.truncate(file, file.stat().st_size // 2)
        dist.barrier()
        run.start(prepared, job.get("resume", False), "cpu", lambda record: None, "cut" in job)
    except Nano4MError as err:
        out |= {"error": type(err).__name__, "message": err.message, "hint": err.hint, "said": err.said}
    except loop.Stopped as err:
        out |= {"stopped": err.step, "signum": err.signum}
    finally:
        loop.Trainer._one_step, parallel._sum = one_step, summed
    if seen:
        digest = hashlib.sha256()
        for name, p in seen[-1].model.state_dict().items():
            digest.update(name.encode() + sharding.local(p).detach().numpy().tobytes())
        out |= {"weights": digest.hexdigest(), "sent": len(sent)}
    (said / f"{job['name']}.{number}.rank-{dist.rank()}.json").write_text(json.dumps(out))


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    os.truncate(path, path.stat().st_size - 10 * 4096)


def member(root: Path, group: dict) -> int:
    """Be one rank of a group; return its exit code."""
    if "command" in group:
        rank = os.environ["RANK"]
        with open(root / "said" / f"{group['name']}.rank-{rank}.txt", "wb") as file:
            os.dup2(file.fileno(), 2)
        sys.argv = ["nano4m", *group["command"]]
        try:
            cli.main()
        except SystemExit as err:
            return int(err.code or 0)
        return 0
    with dist.joined("cpu", 2.0):
        for number, job in enumerate(group["jobs"]):
            work(root, number, job)
            dist.barrier()
    return 0


def main(member=member) -> None:
    root, groups = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    (root / "said").mkdir(exist_ok=True)
    codes = []
    for group in groups:
        children = []
        for rank in range(group["ranks"]):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    place = (rank, group["ranks"], rank, "127.0.0.1", group["port"])
                    os.environ.update(zip(PLACE, map(str, place), strict=True))
                    code = member(root, group)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        codes.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
    (root / "said" / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
