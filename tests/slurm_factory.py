"""A SLURM cluster of three nodes for the tests, by scripts/slurm/one_machine_cluster.sh, with every fault it offers switched on."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from filelock import FileLock

SCRIPTS = Path(__file__).parent.parent / "scripts" / "slurm"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip")


def wait_for(what, condition, seconds=90.0):
    """Return what the condition gives once it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.1)
    return found


class Cluster:
    """Three nodes, and what a user types on them in folder `here`."""

    def __init__(self, folder: Path):
        self.folder = folder
        cluster = {"FOLDER": folder, "NAME": "nt", "NET": "10.93", "NODES": 3, "GPUS": 2, "LOOPBACK_NAMES": 1, "TWO_CARDS": 1,
                   "INSTALL": 1}
        drop = ("SLURM", "SBATCH", "NANO4M", "OMP_NUM_THREADS")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(drop)} | {
            **{k: str(v) for k, v in cluster.items()}, "SLURM_CONF": str(folder / "slurm.conf"),
            "NANO4M_PYTHON": sys.executable, "NANO4M_RESEND": "2", "NO_COLOR": "1",
        }

    def script(self, *args, **env):
        return self.call(SCRIPTS / "one_machine_cluster.sh", *args, **{k: str(v) for k, v in env.items()})

    def call(self, *args, here=None, **env):
        done = subprocess.run([str(a) for a in args], cwd=here, env=self.env | env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{args}\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    def sbatch(self, here, template, *args, options=(), **env):
        """Submit a template; return the job's number."""
        return int(self.call("sbatch", "--parsable", *options, SCRIPTS / f"{template}.sbatch", *args, here=here, **env))

    def job(self, number):
        """Return what scontrol says of a job (of an array: of its first task listed)."""
        said = self.call("scontrol", "show", "job", number, "--oneliner").splitlines()[0]
        return dict(word.split("=", 1) for word in said.split(" ") if "=" in word)

    def wait(self, number, seconds=150.0):
        """Return the states of a job's tasks once all have ended."""

        def ended():
            said = self.call("scontrol", "show", "job", number, "--oneliner").splitlines()
            states = [line.split("JobState=")[1].split()[0] for line in said]
            return states if not {"PENDING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED"} & set(states) else None

        return wait_for(f"job {number}", ended, seconds)

    def processes(self, **env):
        """Return the numbers of this cluster's Python processes whose environment holds these variables."""
        wanted = [f"{k}={v}".encode() for k, v in {"SLURM_CONF": self.env["SLURM_CONF"], **env}.items()]
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.path.basename(os.readlink(path / "exe")).startswith("python"):
                    said = (path / "environ").read_bytes().split(b"\0")
                    if all(w in said for w in wanted):
                        found.append(int(path.name))
        return found


@pytest.fixture(scope="session")
def cluster():
    missing = [p for p in PROGRAMS if not shutil.which(p, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")]
    asked = os.environ.get("NANO4M_TEST_SLURM")
    if asked == "0":
        pytest.skip("NANO4M_TEST_SLURM=0")
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("a SLURM cluster on one machine needs root")
    if missing and not (asked == "1" or os.environ.get("CI")):
        pytest.skip(f"not installed: {', '.join(missing)} (NANO4M_TEST_SLURM=1 installs Debian's packages)")
    if missing and not shutil.which("apt-get"):
        pytest.skip(f"not installed: {', '.join(missing)}, and this is no Debian")
    able = subprocess.run(["unshare", "--net", "--uts", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, text=True)
    if able.returncode:
        pytest.skip(f"no namespaces here: {able.stderr.strip()}")
    with FileLock("/var/tmp/nano4m-test-cluster.lock"):
        folder = Path(tempfile.mkdtemp(prefix="nano4m-test-", dir="/var/tmp"))
        cluster = Cluster(folder)
        try:
            try:
                cluster.script("up")
            except AssertionError as err:
                if asked == "1":
                    raise
                pytest.skip(f"the cluster does not start here: {err}"[-600:])
            yield cluster
        finally:
            for pid in cluster.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            cluster.script("down")
