"""Several jobs that tokenize one data set: the shards shared out, one fit, the same bytes."""

import os
import subprocess
import sys

import numpy as np
import pytest
from test_cli import fails, run

from nano4m_cli.data.fetch import fetch, open_source
from nano4m_cli.data.shards import Shard, npy, write_shard
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import DataError
from nano4m_cli.train.tokenizing import agreement, check, repeated, tokenize


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
    assert check(shared, ["caption"])["train"] == {"caption": 30}


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
    assert check(dataset, []) == {"train": {}, "val": {}, "test": {}, "test_novel": {}}
    assert run("tokenize", "--check", "--root", tmp_path).exit_code == 0


def test_the_doctor_finds_repeated_media_and_foreign_tokens(tmp_path):
    dataset = space(tmp_path)
    tokenize(dataset, "rgb", ["name=identity", "levels=4"], workers=1)
    tokenize(dataset, "caption", workers=1)
    assert agreement(dataset, ["rgb", "caption"]) == {"rgb": 1.0, "caption": 1.0}
    assert all(n == 0 for per in repeated(dataset).values() for n in per.values())
    train, test = Shard(dataset.raw("train") / "shard-000001.tar"), dataset.raw("test") / "shard-000000.tar"
    old = Shard(test)
    members = sorted(old.index.offset)
    rows = [(key, {m: old.read(i, m) for m in members}) for i, key in enumerate(old.keys)]
    rows[2][1]["rgb.png"] = train.read(3, "rgb.png")
    write_shard(test, iter(rows))
    assert repeated(dataset)["test"] == {"rgb": 1, "depth": 0, "normal": 0, "audio": 0}
    said = run("tokenize", "--check", "--root", tmp_path)
    assert "1 samples of test have the rgb of a sample in an earlier split" in said.stderr and said.exit_code == 0
    assert 0.9 < agreement(dataset, ["rgb"])["rgb"] < 1.0
    tokens = dataset.tokens("rgb", "train") / "shard-000000.tar"
    foreign = Shard(tokens)
    write_shard(tokens, iter([(k, {"rgb.npy": npy(np.zeros((1, 64), "<u2"))}) for k in foreign.keys]))
    with pytest.raises(DataError, match="the rgb tokens of 'scenes' are not what its tokenizer gives"):
        agreement(dataset, ["rgb"])
