"""The templates on a real cluster of three nodes, whose names are 127.0.1.1 to themselves and which have two network cards."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from slurm_factory import SCRIPTS, cluster, wait_for  # noqa: F401
from workspace_factory import by_hand, config, copied, linked, one_thread, records, weights  # noqa: F401

from nano4m_cli.data.workspace import Workspace
from nano4m_cli.probes._evaluate import evaluate
from nano4m_cli.train.run import prepare, start

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
CONFIG = """\
data: {dataset: scenes}
model: {size: d1-1w16, head_width: 16}
masking:
  components:
    - {type: directed, weight: 0.5, max_target: 24}
    - {type: dirichlet, weight: 0.5, input: [4, 32], target: [4, 24]}
train: {batch: 8, steps: 40, warmup: 2, log_every: 1, val_every: 1000, checkpoint_every: 1000, precision: fp32, keep: 2}
"""
SCENES = "scenes train=48 val=8 test=8 test_novel=8 judge=0 size=16 shard_size=16"
TOKENS = "--modality rgb --modality caption rgb.name=identity rgb.levels=8"
TWO = ("--nodes=2",)


@pytest.fixture
def here(by_hand, tmp_path):  # noqa: F811
    """A workspace to submit from."""
    linked(by_hand, tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path


def log(here, job, template="train"):
    path = here / f"nano4m-{template}-{job}.out"
    return path.read_text() if path.is_file() else ""


def begin(here, *args, ranks=1):
    """Run nano4m without SLURM, in one process or under torchrun."""
    command = [sys.executable, "-m", "nano4m_cli"]
    if ranks > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "nano4m_cli"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPTS.parent.parent), "GLOO_SOCKET_IFNAME": "lo"}
    env.pop("NANO4M_ROOT", None)
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*command, *map(str, args)], cwd=here, env=env, **pipes)


def local(here, *args):
    finish(begin(here, *args))


def finish(process):
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said[-3000:]


def keys(here, run):
    """Return {step: [keys of rank 0, ...]}."""
    out = {}
    for path in sorted((here / "runs" / run / "keys").iterdir()):
        for line in path.read_text().splitlines():
            note = json.loads(line)
            out.setdefault(note["step"], []).append(note["keys"])
    return out


def test_nodes_train_as_one_process(cluster, here):  # noqa: F811
    """Three nodes, and two with two processes each: the same losses; samples are shared out without overlap or omission."""
    asked = ["tiny.yaml", "train.batch=12", "train.log_keys=true"]
    launch = {3: ("--nodes=3",), 4: ("--nodes=2", "--gpus-per-node=2")}
    jobs = {n: cluster.sbatch(here, "train", *asked, f"name=on{n}", options=options) for n, options in launch.items()}
    local(here, "train", *asked, "name=on1")
    for job in jobs.values():
        assert cluster.wait(job) == ["COMPLETED"], log(here, job)
    said = log(here, jobs[3])
    assert "on 3 node(s) worker1 worker2 worker3 with 1 process(es) each, at 10.93.0.11:" in said
    assert "worker3 is node 2 of 3, at 10.93.0.13 by eth0" in said
    assert "on 2 node(s) worker1 worker2 with 2 process(es) each" in log(here, jobs[4])
    one, alone = records(here / "runs" / "on1", "train"), keys(here, "on1")
    assert all(len({k for s in range(at, at + 4) for k in alone[s][0]}) == 48 for at in range(1, 41, 4)), "an epoch is four steps"
    for n in jobs:
        many = records(here / "runs" / f"on{n}", "train")
        assert [r["step"] for r in many] == list(range(1, 41))
        for a, b in zip(one, many, strict=True):
            for name in ("loss", "grad_norm"):
                assert a[name] == pytest.approx(b[name], rel=2e-4), (a, b)
        shared = keys(here, f"on{n}")
        assert sorted(shared) == list(range(1, 41))
        for step, parts in shared.items():
            assert [len(p) for p in parts] == [12 // n] * n
            assert sorted(k for p in parts for k in p) == sorted(alone[step][0])


def test_two_nodes_evaluate_as_one_process(cluster, here, one_thread):  # noqa: F811
    """On two nodes, and by two processes that are preempted by TERM to the step alone: the files of one process."""
    start(prepare(config(here, name="run", train__steps=2, train__checkpoint_every=2), Workspace(here)), False, "cpu", print)
    folder, asked = here / "runs" / "run" / "eval", ("--run", "run", "--probe", "loss,fusion")
    evaluate(Workspace(here), "run", ["loss", "fusion"])
    want = {p.name: p.read_bytes() for p in folder.iterdir()}
    shutil.rmtree(folder)
    job = cluster.sbatch(here, "eval", *asked, options=TWO)
    assert cluster.wait(job) == ["COMPLETED"], log(here, job, "eval")
    said = log(here, job, "eval")
    assert "on 2 node(s) worker1 worker2 with 1 process(es) each: nano4m eval --run run" in said
    assert "worker2 is node 1 of 2" in said and "(2 processes)" in said and "fusion: " in said
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == want and len(want) == 4
    shutil.rmtree(folder)
    cluster.script("up", PREEMPT_SIGNAL=0)  # the steps get TERM, the batch shell nothing
    job = cluster.sbatch(here, "eval", *asked, NANO4M_PROCS="2")
    wait_for("its processes", lambda: "(2 processes)" in log(here, job, "eval"))  # from now on they hear of signals
    pids = ranks_of(cluster, job, 2)
    send(pids, signal.SIGSTOP)  # so that it does not end before
    cluster.call("sbatch", "-purgent", "-N3", "--exclusive", "--output=/dev/null", "--wrap=:", here=here)
    wait_for("TERM", lambda: "STEP" in log(here, job, "eval"))
    send(pids, signal.SIGCONT)
    assert cluster.wait(job) == ["COMPLETED"], log(here, job, "eval")
    cluster.script("up")
    assert "preempted: back into the queue (start 1 to come)" in log(here, job, "eval")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == want


def first_child(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]


def ranks_of(cluster, job, ranks=3):  # noqa: F811
    """Return the numbers of the training processes of a job, by rank, once each has shown that it trains."""
    found = [cluster.processes(SLURM_JOB_ID=job, RANK=r) for r in range(ranks)]
    return [min(f) for f in found] if all(found) else None


def progress(here, job, run, start):
    """Return the newest logged step once a job's given start has trained further."""
    _, found, said = log(here, job).partition(f"start {start}: run '{run}'")
    steps = re.findall(r"^step (\d+)/", said, re.M) if found else []
    return int(steps[-1]) if steps else None


def send(pids, signum):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


@contextlib.contextmanager
def held(pid):
    """Keep a process from doing anything, whatever wakes it."""
    over = threading.Event()

    def hold():
        while not over.wait(0.001):
            send([pid], signal.SIGSTOP)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_one_run_survives_what_a_cluster_does_to_it(cluster, here, tmp_path_factory):  # noqa: F811
    """Three nodes: time limit, preemption in three ways, a slurmd killed, a rank killed, a node lost (NANO4M_TEST_SLURM=1; else
    another rank) and meanwhile a checkpoint cut in half. Each costs one start, and the weights are those of a run that nothing
    happened to, bit for bit; two nodes that go on from the middle see the same samples.
    """
    asked = ["tiny.yaml", "train.batch=12", "train.steps=240", "train.checkpoint_every=40", "train.log_keys=true"]
    three = ("--nodes=3", "--time=1", "--signal=B:USR1@40")
    job = cluster.sbatch(here, "train", *asked, "name=hurt", options=three)
    folder = here / "runs" / "hurt"
    said = lambda: log(here, job)  # noqa: E731

    def saved():
        return sorted(p.name for p in (folder / "checkpoints").glob("step-*"))

    def trains(start):
        wait_for(f"start {start}\n{said()[-3000:]}", lambda: progress(here, job, "hurt", start))
        pids = ranks_of(cluster, job)
        send(pids, signal.SIGSTOP)  # so that it does not end before something happened to it
        assert cluster.job(job)["Restarts"] == str(start), said()
        return pids

    def preempt():
        return cluster.call("sbatch", "--parsable", "-purgent", "-N3", "--exclusive", "--output=/dev/null", "--wrap=:", here=here)

    def limit():  # its signal may come before training begins
        if not pids and progress(here, job, "hurt", 0):
            pids.extend(ranks_of(cluster, job) or [])
            send(pids, signal.SIGSTOP)
        return "signal USR1" in said()

    pids = []
    wait_for("training, or the time limit's signal", lambda: limit() or pids)
    whole = begin(here, "train", *asked, "name=whole", ranks=3)
    wait_for("the time limit's signal", limit)
    send(pids, signal.SIGCONT)
    cluster.call("scontrol", "update", f"jobid={job}", "timelimit=30")

    pids = trains(1)
    assert "back into the queue (start 1 to come)" in said()
    urgent = [preempt()]
    wait_for("the signal of preemption", lambda: said().count("signal USR1") == 2)
    send(pids, signal.SIGCONT)

    pids = trains(2)
    cluster.script("up", PREEMPT_SIGNAL=0)  # the steps get TERM, the batch shell nothing
    stops = said().count("checkpoint saved; go on with --resume")
    urgent.append(preempt())
    wait_for("TERM", lambda: "STEP" in said().rpartition(" start 2: ")[2])
    send(pids, signal.SIGCONT)
    cluster.script("up", PREEMPT_SIGNAL=0, GRACE=0, KILL_WAIT=1)

    pids = trains(3)
    assert said().count("checkpoint saved; go on with --resume") == stops + 1 and said().count("signal USR1") == 2
    before = saved()
    with held(pids[2]):  # no time to save
        urgent.append(preempt())
        pids = trains(4)
    assert saved() == before and f"start 4: run 'hurt' ({before[-1]})" in said()
    assert [cluster.wait(u) for u in urgent] == [["COMPLETED"]] * 3 and "done:" not in said()

    daemon = (cluster.folder / "pid" / "slurmd-worker2.own").read_text().strip()  # its number among the node's processes
    inside = (cluster.folder / "pid" / "worker2").read_text().split()[0]
    cluster.call("nsenter", "--target", first_child(inside), "--pid", "--mount", "kill", "-KILL", daemon)  # nothing comes of it
    send(pids, signal.SIGCONT)
    wait_for("another checkpoint", lambda: saved()[-1] != before[-1])
    send(pids[1:2], signal.SIGKILL)

    pids = trains(5)
    assert "failed (exit code" in said()
    fewer = linked(Workspace(here), tmp_path_factory.mktemp("fewer")).root
    shutil.copy(here / "tiny.yaml", fewer)
    shutil.copytree(folder, fewer / "runs" / "hurt")
    middle = int(saved()[-1].removeprefix("step-"))
    other = cluster.sbatch(fewer, "train", *asked, "name=hurt", options=(*TWO, "--nodelist=worker[1-2]"))
    older, cut = saved()  # keep: 2
    half = folder / "checkpoints" / cut / "model.safetensors"
    os.truncate(half, half.stat().st_size // 2)
    if os.environ.get("NANO4M_TEST_SLURM") == "1":  # it takes SLURM a while to notice
        cluster.script("lose", "worker3", SILENT=1)
    else:
        send(pids[2:], signal.SIGKILL)
    wait_for("the job goes back", lambda: cluster.job(job)["Restarts"] == "6")
    cluster.script("up")
    trains(6)
    told = f"{cut} is damaged: model.safetensors is not what was written (its sha256 differs); it is damaged-{cut} now"
    assert said().count(told) == 1 and f"training goes on from {older}" in said()
    send(ranks_of(cluster, job), signal.SIGCONT)
    finish(whole)
    assert cluster.wait(job) == cluster.wait(other) == ["COMPLETED"], said()[-4000:]
    assert cluster.job(job)["Restarts"] == "6" and said().rstrip().endswith("done: run 'hurt', step-00000240")
    assert weights(folder) == weights(here / "runs" / "whole")
    assert records(folder, "train") == records(here / "runs" / "whole", "train")
    whole, went_on = keys(here, "whole"), keys(fewer, "hurt")
    assert keys(here, "hurt") == whole and sorted(whole) == sorted(went_on) == list(range(1, 241))
    for step, parts in went_on.items():
        assert len(parts) == (3 if step <= middle else 2)
        assert sorted(k for p in parts for k in p) == sorted(k for p in whole[step] for k in p)


def test_a_bad_config_fails_once_and_says_why(cluster, here):  # noqa: F811
    job = cluster.sbatch(here, "train", "tiny.yaml", "train.stepz=3", options=TWO)
    assert cluster.wait(job) == ["FAILED"]
    said = log(here, job)
    assert said.count("stepz") >= 1 and said.count("hint: did you mean") == 1 and "error: this cannot be trained" in said
    assert cluster.job(job)["Restarts"] == "0"


def test_a_job_that_is_cancelled_does_not_come_back(cluster, here):  # noqa: F811
    job = cluster.sbatch(here, "train", "tiny.yaml", "name=gone", "train.steps=100000")
    wait_for("training", lambda: progress(here, job, "gone", 0))
    cluster.call("scancel", job)
    assert cluster.wait(job) == ["CANCELLED"]
    assert list((here / "runs" / "gone" / "checkpoints").glob("step-*")), "TERM saves as well"
    assert cluster.job(job)["Restarts"] == "0"


def tars(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.tar"))}


def test_pipeline_array_and_what_a_killed_task_leaves(cluster, tmp_path):  # noqa: F811
    """From a source to a report; then tokens again, by an array of which one task is killed and submitted again."""
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    asked = [{"from": {"caption": f"a large {colour} metal sphere"}, "to": "rgb"} for colour in ("red", "blue", "green")]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    said = cluster.call(
        SCRIPTS / "pipeline.sh", "--fetch", SCENES, "--tokenize", TOKENS, "--shares", 2, "--generate", "requests.jsonl made",
        "--eval", "--probe loss", "tiny.yaml", "data.modalities=[rgb,caption]", "train.steps=4", here=tmp_path,
    )
    jobs = dict(line.split() for line in said.splitlines())
    assert list(jobs) == ["fetch", "tokenize", "train", "generate", "eval"]
    for stage, job in jobs.items():
        logs = "\n".join(p.read_text() for p in (tmp_path / "logs").glob(f"nano4m-{stage}-*"))
        assert set(cluster.wait(job)) == {"COMPLETED"}, logs
    assert len(list((tmp_path / "made").rglob("rgb.png"))) == 3
    assert sorted(p.name for p in (tmp_path / "made").iterdir() if p.is_dir()) == ["000001", "000002", "000003"]
    assert (tmp_path / "runs" / "tiny" / "eval" / "loss.json").is_file()
    assert (tmp_path / "runs" / "tiny" / "report" / "index.html").is_file()

    tokens = tmp_path / "data" / "scenes" / "tokens"
    by_array = tars(tokens)
    shutil.rmtree(tokens)
    local(tmp_path, "tokenize", *TOKENS.split())
    assert tars(tokens) == by_array and len(by_array) == 12
    shutil.rmtree(tokens)
    job = cluster.sbatch(tmp_path, "tokenize", *TOKENS.split(), options=("--array=0-1",), NANO4M_RETRIES="0")
    pids = wait_for("a task", lambda: cluster.processes(SLURM_ARRAY_JOB_ID=job, SLURM_ARRAY_TASK_ID=1))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert sorted(cluster.wait(job)) == ["COMPLETED", "FAILED"]
    assert 0 < len(tars(tokens)) < 12
    again = cluster.sbatch(tmp_path, "tokenize", *TOKENS.split(), options=("--array=1",), NANO4M_SHARES="2")
    assert cluster.wait(again) == ["COMPLETED"]
    assert tars(tokens) == by_array


def test_a_stage_that_fails_cancels_the_rest(cluster, tmp_path):  # noqa: F811
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    said = cluster.call(SCRIPTS / "pipeline.sh", "--fetch", "nowhere", "--shares", 1, "tiny.yaml", here=tmp_path)
    jobs = dict(line.split() for line in said.splitlines())
    assert [cluster.wait(j)[0] for j in jobs.values()] == ["FAILED", "CANCELLED", "CANCELLED", "CANCELLED"]
    assert "unknown source 'nowhere'" in next((tmp_path / "logs").glob("nano4m-fetch-*")).read_text()


def test_a_killed_task_starts_again_by_itself(cluster, tmp_path):  # noqa: F811
    job = cluster.sbatch(tmp_path, "fetch", *SCENES.split())
    pids = wait_for("fetch", lambda: cluster.processes(SLURM_JOB_ID=job))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert cluster.wait(job) == ["COMPLETED"], log(tmp_path, job, "fetch")
    assert cluster.job(job)["Restarts"] == "1"
    assert len(list((tmp_path / "data" / "scenes" / "raw").rglob("*.tar"))) == 6


def test_pipeline_says_what_it_would_do(tmp_path):
    """Without a cluster: the commands, in order, each waiting for the one before."""
    (tmp_path / "tiny.yaml").write_text("{}\n")
    command = [SCRIPTS / "pipeline.sh", "--dry-run", "--fetch", "scenes", "--train-options", "--nodes=2 --time=60"]
    command += ["tiny.yaml", "seed=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(".sbatch")[0].rsplit("/", 1)[1] for line in lines] == ["fetch", "tokenize", "train", "eval"]
    assert "--dependency=afterok:JOBID_OF_TOKENIZE --kill-on-invalid-dep=yes --nodes=2 --time=60" in lines[2]
    assert lines[2].rstrip().endswith("train.sbatch tiny.yaml seed=1")
    assert not (tmp_path / "logs").exists()
    bad = {"--shares no": ["--shares", "no", "tiny.yaml"], "no config file 'missing'": ["missing"], "no config": []}
    for said, args in bad.items():
        done = subprocess.run([SCRIPTS / "pipeline.sh", "--dry-run", *args], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr and "hint: " in done.stderr
