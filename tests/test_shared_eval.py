"""One evaluation by several processes: the files of one process, byte for byte, and one word of what goes wrong.

All groups of processes are started by one (tests/shared_worker.py), whose chunks are small, so that eight samples are shared.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
from test_cli import run
from test_dist import REPO, environment, port
from workspace_factory import copied, make_by_hand, media, tiny  # noqa: F401

from nano4m_cli import dist
from nano4m_cli.data._atomic import write_json

SETTINGS, FEW = ["attentive.steps=10"], ["forward_vs_ar.samples=5", "forward_vs_ar.positions=3", "tts.clips=5"]
TRANSFER = ["transfer.data=hand", "transfer.sizes=[6]", "transfer.steps=10", "transfer.batch=4", "transfer.rates=[1.0]"]
BREAKS = {"in a piece": 1, "on the way": 1, "in the end": 0, "killed": 1}  # and on which rank


def commands(root, name, ranks):
    """Return the groups that evaluate a workspace in so many processes."""
    given = {
        "eval": ["eval", *FEW], "probe": ["probe", *SETTINGS], "transfer": ["eval", "--probe", "transfer", *TRANSFER],
    }
    if ranks > 2:
        given = {"eval": ["eval", "--limit", "2", "--probe", "loss,retrieval,captions,fusion,tokenizer"]}
    where = ["--root", str(root / name), "--device", "cpu"]
    return [{"ranks": ranks, "port": port(), "name": f"{name}-{what}", "command": [*args, *where]} for what, args in given.items()]


@pytest.fixture(scope="module")
def shared(media, tmp_path_factory):  # noqa: F811
    """Workspaces one and two (evaluated by as many processes), few and three (two samples, by one and by three)."""
    root = tmp_path_factory.mktemp("shared")
    first = copied(media, root / "one")
    info = first.dataset().info_path
    more = {"judge_steps": {"rgb": 2, "audio": 2}, "transcripts": {"caption": {}}}  # every probe finds something to do
    write_json(info, {**json.loads(info.read_text()), **more})
    make_by_hand(root / "one", "hand")
    for name in ("two", "few", "three"):
        copied(first, root / name)
    groups = [*commands(root, "one", 1), *commands(root, "two", 2)]
    for name, ranks in (("few", 1), ("three", 3)):
        groups += [{**g, "ranks": ranks, "name": name} for g in commands(root, name, 3)]
    groups.append({"ranks": 3, "port": port(), "name": "check", "check": True})
    ask = ["eval", "--probe", "loss", "--root", str(root / "broken"), "--device", "cpu"]
    copied(first, root / "broken")
    groups += [{"ranks": 2, "port": port(), "name": f"broken {how}", "command": ask, "breaks": {"rank": rank, "how": how}}
               for how, rank in BREAKS.items()]
    groups.append({"ranks": 2, "port": port(), "name": "alone", "command": [*ask, "--probe", "decoding"]})
    groups.append({"ranks": 2, "port": port(), "name": "unknown", "command": [*ask, "--probe", "los"]})
    (root / "groups.json").write_text(json.dumps(groups))
    command = [sys.executable, REPO / "tests" / "shared_worker.py", root, root / "groups.json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    codes = json.loads((root / "said" / "codes.json").read_text())
    heard = lambda name, r: "".join(p.read_text() for p in (root / "said").glob(f"{name}.rank-{r}.txt"))  # noqa: E731
    told = {g["name"]: [heard(g["name"], r) for r in range(g["ranks"])] for g in groups}
    return root, dict(zip((g["name"] for g in groups), codes, strict=True)), told, done


def files(root, name):
    """Return the bytes of all that an evaluation writes: results, samples, gallery, report, judges."""
    space = root / name
    folders = (space / "runs" / "demo" / "eval", space / "runs" / "demo" / "report", space / "data" / "scenes" / "judges")
    return {str(p.relative_to(space)): p.read_bytes() for folder in folders for p in sorted(folder.rglob("*")) if p.is_file()}


def test_two_processes_write_what_one_writes(shared):
    root, codes, told, done = shared
    assert all(not any(codes[f"{n}-{what}"]) for n in ("one", "two") for what in ("eval", "probe", "transfer")), (told, done)
    want, got = files(root, "one"), files(root, "two")
    assert want.keys() == got.keys()
    assert not [name for name in want if want[name] != got[name]]
    probes = {name.split("/")[3].removesuffix(".json") for name in want
              if name.startswith("runs/demo/eval/") and name.count("/") == 3 and name.endswith(".json")}
    assert probes == {
        "asr", "attention", "attentive", "calibration", "captions", "class", "crossmodal", "fid", "forward_vs_ar", "fusion",
        "geometry", "knn", "lens", "linear", "loss", "memorization", "retrieval", "sounds", "tokenizer", "transfer", "tts",
    }
    assert {"runs/demo/report/index.html", "runs/demo/eval/gallery/gallery.json"} <= want.keys()
    assert "data/scenes/judges/audio/judge.json" in want


def test_more_processes_than_samples_write_what_one_writes(shared):
    root, codes, told, done = shared
    assert codes["few"] == [0] and codes["three"] == [0, 0, 0], (told["three"], done)
    want, got = files(root, "few"), files(root, "three")
    assert want == got and sum(name.startswith("runs/demo/eval/") for name in want) == 10


def test_one_process_speaks(shared):
    _, _, told, _ = shared
    first, other = told["two-eval"]
    assert "run: " in first and "(2 processes)" in first and "probe retrieval" in first and other == ""


def test_shared_work_is_that_of_a_plain_loop(shared):
    _, codes, told, done = shared
    assert codes["check"] == [0, 0, 0], done.stderr


@pytest.mark.parametrize("how, rank", BREAKS.items())
def test_what_goes_wrong_on_one_rank_ends_all_and_is_told_once(shared, how, rank):
    root, codes, told, done = shared
    both = told[f"broken {how}"]
    assert codes[f"broken {how}"] == ([1, -9] if how == "killed" else [1, 1]), (both, done)
    said = "\n".join(both)
    if how == "killed":
        assert both[0].count("error: another process of the run is gone or silent") == 1 == said.count("error: ")
        assert "hint: its own output says why; start the evaluation again" in both[0]
    else:
        who = "rank 1: " if rank else ""
        assert f"error: {who}this went wrong {how}\nhint: try again" in both[rank]
        assert said.count("error: ") == 1
    assert "Traceback" not in said
    assert not (root / "broken" / "runs" / "demo" / "eval" / "loss.json").exists()


def test_what_one_process_alone_can_measure_is_refused_once(shared):
    _, codes, told, _ = shared
    assert codes["alone"] == [2, 2] and codes["unknown"] == [2, 2]
    assert told["alone"][1] == told["unknown"][1] == ""
    assert "error: probe 'decoding' runs by one process, this is one of 2: it measures the seconds that generation takes" in \
        told["alone"][0]
    assert "error: unknown probe 'los'\nhint: did you mean 'loss'?" in told["unknown"][0]


@pytest.mark.parametrize("args, hint", [
    (["eval", "--list"], "torchrun"), (["eval", "--report"], "torchrun"), (["eval", "--compare", "a", "b"], "torchrun"),
    (["eval", "--site", "x"], "torchrun"), (["probe", "--list"], "torchrun"), (["tokenize"], "--shard I/N"),
    (["generate", "--to", "rgb"], "--shard I/N"), (["fetch", "scenes"], "--workers N"),
])
def test_commands_of_one_process_are_refused_by_several(tmp_path, args, hint):
    for rank in (0, 1):
        place = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": "0"}
        result = run(*args, "--root", tmp_path, env=place)
        assert result.exit_code == 2 and result.stdout == "" and list(tmp_path.iterdir()) == []
        assert (" by one process, this is one of 2\nhint: " in result.stderr and hint in result.stderr) == (rank == 0)
        assert rank == 0 or result.stderr == ""


def test_work_is_dealt_evenly():
    draw = np.random.default_rng(0)
    assert dist.dealt([1.0] * 5, 2) == [[0, 2, 4], [1, 3]] and dist.dealt([], 3) == [[], [], []]
    assert dist.dealt([1.0, 5.0, 1.0, 3.0], 2) == [[1], [0, 2, 3]]
    for ranks in (1, 2, 3, 8):
        costs = draw.exponential(size=5 * ranks).tolist()
        parts = dist.dealt(costs, ranks)
        assert sorted(i for p in parts for i in p) == list(range(5 * ranks)) and all(p == sorted(p) for p in parts)
        fullest = max(sum(costs[i] for i in p) for p in parts)
        assert fullest <= sum(costs) / ranks + max(costs) * (1 - 1 / ranks) + 1e-9  # Graham's bound for any order
