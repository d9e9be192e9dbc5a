"""When train.sbatch puts its job back into the queue and when it gives up; other programs stand for SLURM's (test_slurm has it)."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
FAKES = {
    # what `nano4m train --dry-run --json` says; anything else is for Python
    "nano4m-python": """[ "$1" = -m ] && { echo '{"run": "demo", "steps": 40}'; exit; }; exec python3 "$@" """,
    "srun": """mkdir -p runs/demo/checkpoints; for s in $SAVES; do mkdir -p runs/demo/checkpoints/step-000000$s; done
        [ -z "$STOPPED" ] || echo '{}' >runs/demo/stopped.json; exit $CODE""",
    "scontrol": """case "$*" in
        "show hostnames "*) echo here ;; "show job "*) echo "   JobState=${STATE:-RUNNING} Reason=None" ;;
        requeue*) echo again >>requeued; kill -TERM $PPID ;; esac""",
    "scancel": "",
}


@pytest.fixture
def job(tmp_path):
    """Run the template as one start of a job; return (exit code, whether it went back into the queue, what it said)."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in FAKES.items():
        path = programs / name
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)
    (tmp_path / "tiny.yaml").write_text("{}")
    starts = iter(range(1000))

    def start(code, saves="", **env):
        for name in ("requeued", "runs/demo/stopped.json"):
            (tmp_path / name).unlink(missing_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "NANO4M"))}
        env = {"SLURM_RESTART_COUNT": str(next(starts)), "STOPPED": "", **env}
        done = subprocess.run(
            ["bash", REPO / "scripts" / "slurm" / "train.sbatch", "tiny.yaml"],
            cwd=tmp_path, capture_output=True, text=True, timeout=60,
            env={**kept, "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here",
                 "SLURM_SUBMIT_DIR": str(tmp_path), "NANO4M_HOME": str(REPO), "NANO4M_PYTHON": str(programs / "nano4m-python"),
                 "TMPDIR": str(tmp_path), "CODE": str(code), "SAVES": saves, **env},
        )
        assert not list(tmp_path.glob("nano4m-7-*")), "its notes are gone"
        return done.returncode, (tmp_path / "requeued").exists(), done.stderr

    return start


pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="no bash")


def test_a_job_is_done_when_the_last_checkpoint_is_there(job):
    code, again, said = job(0, "20 40")
    assert (code, again) == (0, False) and said.rstrip().endswith("done: run 'demo', step-00000040")


def test_srun_that_lost_its_tasks_does_not_make_a_job_done(job):
    code, again, said = job(0, "20")
    assert again and code and "failed (exit code 1) after step-00000020: back into the queue (start 1 to come)" in said


def test_failures_in_a_row_without_a_new_checkpoint_end_it(job):
    for saves, expected in (("", True), ("10", True), ("", True), ("20", True), ("", True), ("", False)):
        code, again, said = job(1, saves)
        assert again is expected and code == 1, said
    assert "error: failed 3 times, with no new checkpoint since the first" in said and "hint: the log above says why" in said
    assert [job(1)[1] for _ in range(3)] == [True, True, False], "the count began anew"
    assert job(1, NANO4M_RETRIES="0")[1] is False


def test_a_stop_is_no_failure(job):
    for _ in range(4):
        code, again, said = job(1, STOPPED="1")
        assert again and "stopped at the start: back into the queue" in said
    assert job(1)[1] and job(1)[1], "none of them counted"


def test_starts_are_limited(job):
    assert job(1, STOPPED="1", SLURM_RESTART_COUNT="99")[1]
    code, again, said = job(1, STOPPED="1", SLURM_RESTART_COUNT="100")
    assert (code, again) == (1, False) and "error: stopped at the start, after 100 further starts" in said
    assert "hint: NANO4M_REQUEUES allows 100; submit the job again to go on" in said
    assert job(1, STOPPED="1", SLURM_RESTART_COUNT="2", NANO4M_REQUEUES="3")[1]
    assert not job(1, STOPPED="1", SLURM_RESTART_COUNT="3", NANO4M_REQUEUES="3")[1]


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED"])
def test_what_slurm_is_ending_is_left_to_it(job, state):
    code, again, said = job(1, STOPPED="1", STATE=state)
    assert (code, again) == (1, False) and f"the job is {state}: SLURM says whether it comes back" in said
