"""Several processes that train from an address: what one process sees, each its own shards, and nobody hangs where one starves."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from stream_server import Server
from test_dist import REPO, close, environment, port
from workspace_factory import config, make_by_hand, records, settings, weights

from nano4m_cli.data import stream
from nano4m_cli.data.stream_order import StreamOrder
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.train.run import prepare, start

NAMES = ["rgb", "audio", "caption"]
BASE = {"train__batch": 12, "train__steps": 8, "train__checkpoint_every": 2, "train__val_samples": 8, "train__val_every": 4,
        "train__log_keys": True, "data__window": 1, "data__modalities": f"[{','.join(NAMES)}]"}
STARVED = "starve/tokens/audio/train/shard-000009.tar"  # of rank 1 alone, from the third step on

SKIP = {"data__skip_broken": True}
LOST = ["rgb/train/shard-000004.tar", "caption/train/shard-000005.tar", "rgb/train/shard-000009.tar"]  # a whole window's two


def changes(server, root, run, **more):
    """A run's settings: an address and a cache of its own for each process, so that it can be told who fetched what."""
    return {**BASE, "data__url": f"{server.url}/{run}", "data__dataset": run, "data__cache": f"{root}/cache/{run}-$RANK", **more}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(workspace, server) after runs of one, two and four processes on 12 shards of 4 samples; a row of shards is an epoch."""
    root, old = tmp_path_factory.mktemp("stream"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setattr("workspace_factory.SHARD", 4)
        patch.setattr("workspace_factory.SPLITS", {"train": 48, "val": 8})
        origin = make_by_hand(root / "origin")
        stream.publish(origin.dataset(), NAMES)
        server, space = Server(origin.dataset().path), Workspace(root)
        server.stalls, server.heals = {STARVED}, "short/"
        server.gone = {f"{run}/tokens/{name}" for run in ("skip_one", "skip_two") for name in LOST}
        torch.set_num_threads(1)
        for name in ("one", "skip_one"):
            made = config(root, name=name, **changes(server, root, name, data__skip_broken=name == "skip_one"))
            start(prepare(made, space), False, "cpu", lambda record: None)
        torch.set_num_threads(old)

        def job(name, more=None, **rest):
            return {"name": name, "changes": changes(server, root, name, **more or {}), **rest}

        starving = ["train", root / "tiny.yaml", *settings(name="starve", **changes(server, root, "starve", data__wait=2)),
                    "--root", root, "--device", "cpu"]
        groups = [
            {"ranks": 2, "port": port(), "name": "starve", "command": [str(a) for a in starving]},
            {"ranks": 2, "port": port(), "jobs": [
                job("short", {"train__steps": 3}), job("two"), job("cut", stop={"rank": 1, "step": 3}), job("cut", resume=True),
                job("starve", resume=True), job("skip_two", SKIP)]},
            {"ranks": 4, "port": port(), "jobs": [job("four")]},
        ]
        (root / "groups.json").write_text(json.dumps(groups))
        command = [sys.executable, REPO / "tests" / "dist_worker.py", root, root / "groups.json"]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert json.loads((root / "said" / "codes.json").read_text()) == [[1, 1], [0, 0], [0, 0, 0, 0]], done.stderr
        yield space, server
        server.close()


def keys(space, name, ranks):
    """Return each rank's keys by step: {step: [keys of rank 0, of rank 1, ...]}."""
    out = {}
    for rank in range(ranks):
        for line in (space.root / "runs" / name / "keys" / f"rank-{rank:05d}.jsonl").read_text().splitlines():
            note = json.loads(line)
            out.setdefault(note["step"], []).append(note["keys"])
    return out


def held(space, server, name, ranks):
    """Return the shards in each rank's cache, by their names at the server (of the train split)."""
    files = json.loads((space.root / "origin/data/scenes/tokens/manifest.json").read_text())["files"]
    named = {f["sha256"]: f"{name}/tokens/{path}" for path, f in files.items()}
    found = [{named[p.stem] for p in (space.root / "cache" / f"{name}-{r}").glob("*.tar")} for r in range(ranks)]
    asked = Counter(server.tars(f"{name}/"))
    assert asked == Counter(shard for some in found for shard in some), "no shard was fetched twice by a rank"
    return [{n for n in some if "/train/" in n} for some in found]


@pytest.mark.parametrize("name, ranks", [("two", 2), ("four", 4), ("cut", 2)])
def test_ranks_see_what_one_does_and_each_sample_once_an_epoch(trained, name, ranks):
    space, _ = trained
    alone, shared = keys(space, "one", 1), keys(space, name, ranks)
    assert sorted(shared) == sorted(alone) == list(range(1, 9))
    for step, parts in shared.items():
        assert [len(p) for p in parts] == [12 // ranks] * ranks
        assert sorted(k for p in parts for k in p) == sorted(alone[step][0])
    for epoch in (range(1, 5), range(5, 9)):
        own = [{k for step in epoch for k in shared[step][r]} for r in range(ranks)]
        assert len(set.union(*own)) == sum(map(len, own)) == 48, "disjoint and complete"
    runs = space.root / "runs"
    want, got = records(runs / "one", "train", "val"), records(runs / name, "train", "val")
    close(got, want, steps=10)


def test_each_rank_fetches_its_own_shards_once(trained):
    space, server = trained
    first, other = held(space, server, "short", 2)  # three steps: all within an epoch
    assert not first & other and len(first) == len(other) == 6 * len(NAMES)
    order = StreamOrder([4] * 12, 0, 12, None, 1)
    for name, ranks in (("two", 2), ("cut", 2), ("four", 4)):
        for rank, found in enumerate(held(space, server, name, ranks)):
            due = {s for step in range(8) for s in order.ahead(order.rows(rank, ranks), step, 8)}
            assert found == {f"{name}/tokens/{m}/train/shard-{s:06d}.tar" for s in due for m in NAMES}
            seen = {k for parts in keys(space, name, ranks).values() for k in parts[rank]}
            wanted = {int(k.removeprefix("train-")) // 4 for k in seen}
            assert found >= {f"{name}/tokens/{m}/train/shard-{s:06d}.tar" for s in wanted for m in NAMES}


def test_two_ranks_resume_bit_for_bit(trained):
    space, _ = trained
    runs = space.root / "runs"
    assert [json.loads((space.root / "said" / f"cut.2.rank-{r}.json").read_text())["stopped"] for r in range(2)] == [4, 4]
    assert weights(runs / "cut") == weights(runs / "two")
    assert records(runs / "cut", "train", "val") == records(runs / "two", "train", "val")


def test_a_rank_that_starves_is_heard_by_all_and_the_run_goes_on_once_the_server_answers(trained):
    space, server = trained
    told = [(space.root / "said" / f"starve.rank-{r}.txt").read_text() for r in range(2)]
    both = "".join(told)
    assert both.count("error:") == 1 and f"error: rank 1: no data: cannot download {server.url}/{STARVED}: ReadTimeout" in told[1]
    assert told[1].count("hint:") == 1 and "the last good checkpoint is step-00000002, go on from it with --resume" in told[1]
    assert "gone or silent" not in both and "Traceback" not in both
    runs = space.root / "runs"
    assert weights(runs / "starve") == weights(runs / "two")
    assert records(runs / "starve", "train", "val") == records(runs / "two", "train", "val")
    assert keys(space, "starve", 2) == keys(space, "two", 2)
    assert np.all([STARVED not in server.stalls, STARVED in server.asked])


def test_ranks_agree_on_what_stands_in_for_lost_shards(trained):
    space, server = trained
    runs, alone, shared = space.root / "runs", keys(space, "skip_one", 1), keys(space, "skip_two", 2)
    gone = {f"train-{4 * shard + i:08d}" for shard in (4, 5, 9) for i in range(4)}
    for step, parts in shared.items():
        assert [k for p in parts for k in p] == alone[step][0] and not gone & set(alone[step][0])
    close(records(runs / "skip_two", "train", "val"), records(runs / "skip_one", "train", "val"), steps=10)
    told = records(runs / "skip_one", "skipped")
    assert sum(r["n"] for r in told) == 24, "two epochs of 12 samples"
    said = records(runs / "skip_two", "skipped")
    assert [(r["step"], r["n"]) for r in said] == [(r["step"], r["n"]) for r in told]
    assert {w.split("skip_two/tokens/")[1] for r in said for w in r["samples"]} == {f"{n}: HTTP 404 Not Found" for n in LOST}
