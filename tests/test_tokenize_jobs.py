"""Several jobs that tokenize one data set: the shards shared out, one fit, the same bytes."""

import os
import subprocess
import sys

import pytest
from test_cli import fails, run

from nano4m_cli.data.fetch import fetch, open_source
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.train.doctor import examine
from nano4m_cli.train.tokenizing import tokenize


def space(root):
    workspace = Workspace(root)
    options = ["train=30", "val=4", "test=4", "test_novel=4", "judge=0", "size=8", "shard_size=6"]
    fetch(open_source("scenes", options, workspace), workspace, 1)
    return workspace.dataset()


def tars(dataset, modality):
    folder = dataset.tokens(modality)
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.tar"))}


def test_jobs_at_once_fit_once_and_make_the_same_bytes(tmp_path):
    alone = space(tmp_path / "alone")
    tokenize(alone, "caption", workers=1)
    wanted = tars(alone, "caption")
    assert len(wanted) == 8  # five shards of train, one of each other split
    shared = space(tmp_path / "shared")
    jobs = [
        subprocess.Popen(
            [sys.executable, "-m", "nano4m_cli", "tokenize", "-m", "caption", "--shard", f"{i}/3", "--root", tmp_path / "shared"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for i in range(3)
    ]
    said = [job.communicate(timeout=180) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0], said
    assert sum("(fitted now)" in out for out, _ in said) == 1, "one fits, the others wait for it"
    made = [int(out.split("caption: ")[1].split(" samples made")[0]) for out, _ in said]
    assert sum(made) == 42 and all(made), made
    assert tars(shared, "caption") == wanted
    report = examine(shared, ["caption"])
    assert not report.errors and report.samples["train"] == {"caption": 30}


def test_a_share_keeps_what_is_there_and_leaves_the_rest(tmp_path):
    dataset = space(tmp_path)
    first = tokenize(dataset, "caption", workers=1, part=(1, 4))
    assert (first.made, first.kept, first.samples) == (10, 0, 10)  # shards 1 and 5: six of train, four of val
    again = tokenize(dataset, "caption", workers=1, part=(1, 4))
    assert (again.made, again.kept) == (0, 10)
    rest = tokenize(dataset, "caption", workers=1)
    assert (rest.made, rest.kept, rest.samples) == (32, 10, 42)


@pytest.mark.parametrize("given", ["3/3", "1", "a/b", "-1/2", "1/0"])
def test_a_share_that_is_none_is_refused(given):
    fails(run("tokenize", f"--shard={given}"), 2, f"--shard {given} is not of the form I/N", "for example --shard 0/4")


def test_check_of_what_is_not_tokenised_yet(tmp_path):
    dataset = space(tmp_path)
    assert examine(dataset, []).samples == {"train": {}, "val": {}, "test": {}, "test_novel": {}}
    assert run("tokenize", "--check", "--root", tmp_path).exit_code == 0
