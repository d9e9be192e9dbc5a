"""One rank of a group that trains a list of runs, one after the other: what tests/test_dist.py starts in several processes.

    RANK=0 WORLD_SIZE=2 ... python tests/dist_worker.py ROOT JOBS.json

A job: {"name", "changes", "resume", "stop": {"rank", "step"}, "poison": {"rank", "step"}}. What a job raises goes to
ROOT/said/<name>.<n>.rank-<rank>.json, with a hash of the rank's weights after it and the number of buckets it sent.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from workspace_factory import config

from nano4m_cli import dist
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import Nano4MError
from nano4m_cli.train import loop, parallel, run, sharding

torch.set_num_threads(1)


def work(root: Path, number: int, job: dict) -> None:
    said, out = root / "said", {}
    said.mkdir(exist_ok=True)
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
        return one_step(self, parts)

    loop.Trainer._one_step, parallel._sum = step, counted
    try:
        prepared = run.prepare(config(root, name=job["name"], **job.get("changes", {})), Workspace(root))
        run.start(prepared, job.get("resume", False), "cpu", lambda record: None)
    except Nano4MError as err:
        out = {"error": type(err).__name__, "message": err.message, "hint": err.hint, "said": err.said}
    except loop.Stopped as err:
        out = {"stopped": err.step, "signum": err.signum}
    finally:
        loop.Trainer._one_step, parallel._sum = one_step, summed
    if seen:
        digest = hashlib.sha256()
        for name, p in seen[-1].model.state_dict().items():
            digest.update(name.encode() + sharding.local(p).detach().numpy().tobytes())
        out |= {"weights": digest.hexdigest(), "sent": len(sent)}
    (said / f"{job['name']}.{number}.rank-{dist.rank()}.json").write_text(json.dumps(out))


def main() -> None:
    root, jobs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    with dist.joined("cpu", 2.0):
        for number, job in enumerate(jobs):
            work(root, number, job)
            dist.barrier()


if __name__ == "__main__":
    main()
