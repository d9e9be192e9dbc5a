"""Runs of several processes: the same run as that of one, and nothing lost when one of them stops.

Each group of processes (gloo, tests/dist_worker.py) trains all the runs that need so many, since starting one costs more than the
training.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from dist_worker import PLACE
from safetensors.torch import load_file
from test_cli import ENV, run
from test_watch import spoil
from workspace_factory import by_hand, config, copied, linked, one_thread, records, settings, weights  # noqa: F401

from nano4m_cli import dist
from nano4m_cli.config import build
from nano4m_cli.errors import ConfigError, TrainingError, UsageError
from nano4m_cli.train import checkpoint
from nano4m_cli.train.config import TrainConfig
from nano4m_cli.train.run import open_run, prepare, start
from nano4m_cli.train.status import status
from nano4m_cli.train.tasks import deal

REPO = Path(__file__).parents[1]
BASE = {"train__batch": 12, "train__val_samples": 8, "train__val_every": 3, "train__ema": 0.9, "model__size": "d1-1w32",
        "model__head_width": 16, "train__log_keys": True, "data__dataset": "scenes"}
SKIP = {**BASE, "data__dataset": "broken", "data__skip_broken": True}
FSDP = {**BASE, "train__parallel": "fsdp"}
JOBS = {
    2: [
        {"name": "two", "changes": BASE},
        {"name": "cut", "changes": BASE, "stop": {"rank": 1, "step": 3}},
        {"name": "cut", "changes": BASE, "resume": True},
        {"name": "parts", "changes": {**BASE, "train__accumulate": 3}},
        {"name": "shards", "changes": FSDP},
        {"name": "shards_parts", "changes": {**FSDP, "train__accumulate": 3, "train__recompute": True, "train__clip": 0.1}},
        {"name": "shards_cut", "changes": {**FSDP, "train__save_async": True}, "stop": {"rank": 0, "step": 4}},
        {"name": "shards_cut", "changes": FSDP, "resume": True},
        {"name": "bad", "changes": {**BASE, "train__steps": 9}, "poison": {"rank": 1, "step": 4}},
        {"name": "odd", "changes": {**BASE, "train__batch": 9}},
        {"name": "for_three", "changes": FSDP, "stop": {"rank": 0, "step": 2}},
        {"name": "for_one", "changes": FSDP, "stop": {"rank": 0, "step": 2}},
        {"name": "one_to_two", "changes": BASE, "resume": True},
        {"name": "skip_two", "changes": SKIP},
        {"name": "shards_half", "changes": FSDP, "stop": {"rank": 0, "step": 4}},
        {"name": "shards_half", "changes": FSDP, "resume": True, "cut": "model/rank-00001-of-00002.safetensors"},
    ],
    3: [
        {"name": "three", "changes": BASE},
        {"name": "three_cut", "changes": BASE, "stop": {"rank": 2, "step": 2}},
        {"name": "three_cut", "changes": BASE, "resume": True},
        {"name": "for_three", "changes": FSDP, "resume": True},
    ],
}

FULL = {"full": FSDP, "full_async": {**FSDP, "train__save_async": True}}  # each on a small disk of its own
FULL_JOBS = [
    {"name": name, "changes": changes, **how}
    for name, changes in FULL.items() for how in ({"fill": {"rank": 0, "step": 4}}, {"free": True, "resume": True})
]

BROKEN = [1, 4, 5, 12]  # places in shard 1


def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int = 0, ranks: int = 1, at: int = 0) -> dict[str, str]:
    """Return the environment of a process, of a group that meets at a port if there are several."""
    place = (rank, ranks, rank, "127.0.0.1", at) if ranks > 1 else ()
    path = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    kept = {k: v for k, v in os.environ.items() if k not in PLACE}
    return {**kept, **ENV, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **dict(zip(PLACE, map(str, place), strict=False))}


@pytest.fixture(scope="module")
def trained(by_hand, tmp_path_factory, request):  # noqa: F811
    """A workspace with the runs of one, two and three processes; data set `broken` has samples that cannot be read."""
    space = copied(by_hand, tmp_path_factory.mktemp("dist"))
    shutil.copytree(space.root / "data" / "scenes", space.root / "data" / "broken")
    spoil(space.root / "data/broken/tokens/rgb/train/shard-000001.tar", BROKEN)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    one(space, "one", BASE)
    one(space, "one_to_two", BASE, stop=3)
    one(space, "skip_one", SKIP)
    (space.root / "tiny.yaml").write_text("{}")
    unread = ["train", space.root / "tiny.yaml", *settings(**{**BASE, "name": "unread", "data__dataset": "broken"}),
              "--root", space.root, "--device", "cpu"]
    small = [mounted(space.root / "runs" / name, request) for name in FULL]
    more = {2: FULL_JOBS if all(small) else []}
    groups = [*({"ranks": ranks, "port": port(), "jobs": jobs + more.get(ranks, [])} for ranks, jobs in JOBS.items()),
              {"ranks": 2, "port": port(), "name": "unread", "command": [str(a) for a in unread]}]
    (space.root / "groups.json").write_text(json.dumps(groups))
    command = [sys.executable, REPO / "tests" / "dist_worker.py", space.root, space.root / "groups.json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert json.loads((space.root / "said" / "codes.json").read_text()) == [[0, 0], [0, 0, 0], [1, 1]], done.stderr
    one(space, "for_one", FSDP, resume=True)
    torch.set_num_threads(before)
    return space


def mounted(folder, request):
    """Put a small disk in the place of a folder until the end; return whether that may be done here."""
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True)
    if done.returncode == 0:
        request.addfinalizer(lambda: subprocess.run(["umount", folder], check=True))
    return done.returncode == 0


def one(space, name, changes, resume=False, stop=None):
    """Train in this process; a run to be gone on with is one of which the newest checkpoints are taken away."""
    start(prepare(config(space.root, name=name, **changes), space), resume, "cpu", lambda record: None)
    if stop is not None:
        for path in checkpoint.checkpoints(space.root / "runs" / name):
            if checkpoint.step_of(path) > stop:
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()


def said(space, name, number, ranks):
    return [json.loads((space.root / "said" / f"{name}.{number}.rank-{r}.json").read_text()) for r in range(ranks)]


def close(a, b, tolerance=2e-4, steps=8):
    """Compare two runs' records: the same steps and figures, equal to rounding."""
    assert [(r["kind"], r["step"]) for r in a] == [(r["kind"], r["step"]) for r in b] and len(a) == steps
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x.keys() - {"kind"}:
            assert x[key] == pytest.approx(y[key], rel=tolerance), (x["step"], key)


# -- one run ------------------------------------------------------------------------------------------------------------


def test_losses_validation_and_norms_are_those_of_one_process(trained):
    runs = trained.root / "runs"
    want = records(runs / "one", "train", "val")
    assert {"loss", "grad_norm", "lr", "ce_rgb", "ce_caption"} <= want[0].keys()
    for name in ("two", "three", "parts", "shards", "shards_parts"):
        if name == "shards_parts":  # clipped harder: the same steps by another rate
            got = records(runs / name, "train", "val")
            assert got[0]["loss"] == pytest.approx(want[0]["loss"], rel=2e-4)
            assert got[0]["grad_norm"] == pytest.approx(want[0]["grad_norm"], rel=2e-4) and want[0]["grad_norm"] > 0.1
            continue
        close(records(runs / name, "train", "val"), want)


def test_ranks_end_with_the_same_weights(trained):
    for name, number, ranks in (("two", 0, 2), ("cut", 2, 2), ("three", 0, 3)):
        assert len({s["weights"] for s in said(trained, name, number, ranks)}) == 1, name


def test_records_tell_of_every_rank(trained):
    folder = trained.root / "runs" / "three"
    (begun,) = records(folder, "start")
    assert (begun["ranks"], begun["device"], begun["step"]) == (3, "cpu", 0)
    for record in records(folder, "speed"):
        assert record["ranks"] == 3
        for name in ("tokens_per_s", "data_wait", "memory_mb"):
            figure = record[name]
            assert figure["min"] <= figure["median"] <= figure["max"] and {figure["min_rank"], figure["max_rank"]} <= {0, 1, 2}
        assert record["tokens_per_s"]["min"] > 0 and record["memory_mb"]["min"] > 50
    again = records(trained.root / "runs" / "three_cut", "start")
    assert [r["step"] for r in again] == [0, 3] and status(trained.root / "runs" / "three_cut").restarts == 1


def test_gradients_are_sent_once_a_step(trained):
    whole, parts = (said(trained, name, number, 2)[0]["sent"] for name, number in (("two", 0), ("parts", 3)))
    assert whole == parts == 6, (whole, parts)  # so small a model's go in one piece


def keys(space, name, ranks):
    """Return {step: [keys of rank 0, ...]}."""
    out = {}
    for r in range(ranks):
        for line in (space.root / "runs" / name / "keys" / f"rank-{r:05d}.jsonl").read_text().splitlines():
            note = json.loads(line)
            out.setdefault(note["step"], []).append(note["keys"])
    return out


def test_samples_of_ranks_are_disjoint_and_complete(trained):
    alone = keys(trained, "one", 1)
    assert sorted(alone) == [1, 2, 3, 4, 5, 6] and all(len(k[0]) == 12 == len(set(k[0])) for k in alone.values())
    epoch = [k for step in (1, 2, 3, 4) for k in alone[step][0]]
    assert len(set(epoch)) == 48, "four steps of twelve are the whole split"
    for name, ranks in (("two", 2), ("three", 3), ("cut", 2), ("shards", 2)):
        shared = keys(trained, name, ranks)
        assert shared.keys() == alone.keys()
        for step, parts in shared.items():
            assert [len(p) for p in parts] == [12 // ranks] * ranks
            assert sorted(k for p in parts for k in p) == sorted(alone[step][0]), (name, step)


def test_samples_are_dealt_by_their_tokens():
    draw = np.random.default_rng(0)
    for ranks in (1, 2, 3, 8):
        tokens = draw.integers(1, 300, 24 * ranks)
        parts = deal(tokens, ranks)
        assert sorted(np.concatenate(parts).tolist()) == list(range(24 * ranks))
        assert all(len(p) == 24 and (np.diff(p) > 0).all() for p in parts)
        sums = [int(tokens[p].sum()) for p in parts]
        in_order = [int(tokens[p].sum()) for p in np.split(np.arange(24 * ranks), ranks)]
        assert max(sums) - min(sums) <= max(1, (max(in_order) - min(in_order)) // 4), (sums, in_order)
    assert [p.tolist() for p in deal(np.array([5, 1, 4, 2]), 2)] == [[0, 1], [2, 3]]


def test_a_batch_must_divide(trained):
    first, other = said(trained, "odd", 9, 2)
    assert first == other and first["error"] == "ConfigError"
    assert first["message"] == "train.batch: 9 samples do not divide among 2 processes"
    assert first["hint"] == "the nearest that do: 8, 10"
    with pytest.raises(ConfigError, match="muon needs whole matrices"):
        build(TrainConfig, {"parallel": "fsdp", "optimizer": "muon"})


# -- stopping and going on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, whole, ranks, step", [("cut", "two", 2, 4), ("three_cut", "three", 3, 3)])
def test_a_signal_to_one_rank_stops_all_and_resume_is_bitwise(trained, name, whole, ranks, step):
    number = next(i for i, job in enumerate(JOBS[ranks]) if job["name"] == name)
    for rank in said(trained, name, number, ranks):
        assert (rank["stopped"], rank["signum"]) == (step, signal.SIGUSR1)
    runs = trained.root / "runs"
    assert weights(runs / name) == weights(runs / whole)
    assert records(runs / name, "train", "val") == records(runs / whole, "train", "val")
    assert not (runs / name / "stopped.json").exists(), "it went on"


def test_shards_stop_and_go_on_bit_for_bit(trained):
    runs = trained.root / "runs"
    assert [s["stopped"] for s in said(trained, "shards_cut", 6, 2)] == [5, 5]
    assert weights(runs / "shards_cut") == weights(runs / "shards")
    assert records(runs / "shards_cut", "train", "val") == records(runs / "shards", "train", "val")


def test_shards_of_which_one_is_cut_in_half_are_set_aside_and_the_run_is_the_same(trained):
    runs = trained.root / "runs"
    assert not any("error" in s for s in said(trained, "shards_half", 15, 2))
    points = sorted(p.name for p in (runs / "shards_half" / "checkpoints").iterdir())
    assert points == ["damaged-step-00000005", "step-00000003", "step-00000006"]
    assert weights(runs / "shards_half") == weights(runs / "shards")
    assert records(runs / "shards_half", "train", "val") == records(runs / "shards", "train", "val")


def test_a_checkpoint_is_read_by_any_number_of_ranks(trained):
    runs = trained.root / "runs"
    want = records(runs / "one", "train", "val")
    for name in ("for_three", "for_one", "one_to_two"):
        close(records(runs / name, "train", "val"), want)
    assert [p.name for p in checkpoint.checkpoints(runs / "for_one")] == ["step-00000003", "step-00000006"]


def test_shards_are_safetensors_that_make_up_the_model(trained):
    runs = trained.root / "runs"
    folder = checkpoint.latest(runs / "shards")
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert files == sorted(["state.json", *(f"{part}/rank-{r:05d}-of-00002.safetensors" for r in range(2)
                                            for part in ("model", "ema", "optimizer"))])
    whole = checkpoint.load(checkpoint.latest(runs / "two")).tensors
    put = checkpoint.load(folder).tensors
    assert {p: {k: t.shape for k, t in part.items()} for p, part in put.items()} == {
        p: {k: t.shape for k, t in part.items()} for p, part in whole.items()
    }
    pieces = [load_file(folder / f"model/rank-{r:05d}-of-00002.safetensors") for r in range(2)]
    for name, tensor in put["model"].items():
        assert torch.equal(torch.cat([p[name] for p in pieces if name in p]), tensor)
        assert torch.allclose(tensor, whole["model"][name], atol=2e-4), name
    assert all(len(p) > 10 for p in pieces)


def test_torch_s_own_checkpoint_reader_reads_the_shards(trained):
    """torch.distributed.checkpoint knows nothing of us: it finds shapes and offsets in the files' headers."""
    folder = checkpoint.latest(trained.root / "runs" / "shards")
    for part, tensors in checkpoint.load(folder).tensors.items():
        got = {k: torch.full_like(t, torch.nan) if t.is_floating_point() else torch.zeros_like(t) for k, t in tensors.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is but one process
            dcp.load(got, storage_reader=dcp.HuggingFaceStorageReader(str(folder / part)), no_dist=True)
        assert len(got) > 5
        for name, tensor in tensors.items():
            assert torch.equal(got[name], tensor), (part, name)


def test_a_run_in_shards_is_used_like_any_other(trained):
    shared, two = (open_run(trained, name) for name in ("shards", "two"))
    for (name, a), b in zip(shared.model.state_dict().items(), two.model.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=2e-4), name
    from nano4m_cli.report._read import read_run

    pages = [read_run(trained.root / "runs" / name) for name in ("shards", "two")]
    assert not pages[0].problems and pages[0].parameters == pages[1].parameters > 1000


def test_a_damaged_shard_is_told(trained, tmp_path):
    folder = checkpoint.latest(trained.root / "runs" / "shards")
    there = tmp_path / "checkpoints" / folder.name
    shutil.copytree(folder, there)
    bad = there / "model" / "rank-00001-of-00002.safetensors"
    bad.write_bytes(bad.read_bytes()[:-4] + b"\0\1\2\3")
    with pytest.raises(checkpoint.CheckpointError, match="model/rank-00001-of-00002.safetensors is not what was written"):
        checkpoint.load(there)


@pytest.mark.parametrize("name", FULL)
def test_a_disk_that_is_full_while_shards_are_written(trained, name):
    """Both ranks end with a word, what was written of it is gone, and training goes on once there is space."""
    if not os.path.ismount(trained.root / "runs" / name):
        pytest.skip("no small disk here")
    number = len(JOBS[2]) + 2 * list(FULL).index(name)
    both = said(trained, name, number, 2)
    assert [s["error"] for s in both] == ["CheckpointError"] * 2 and sorted(s["said"] for s in both) == [False, True]
    assert both[0]["message"] == both[1]["message"] and both[0]["message"].startswith("checkpoint at step 6 was not written: ")
    assert "No space left on device" in both[0]["message"]
    assert both[0]["hint"] == "the last good one is step-00000003; free some space and go on with --resume"
    assert [(s.get("error"), s["left"]) for s in said(trained, name, number + 1, 2)] == [(None, ["step-00000003"])] * 2
    runs = trained.root / "runs"
    assert weights(runs / name) == weights(runs / "shards")
    assert records(runs / name, "train", "val") == records(runs / "shards", "train", "val")


def test_what_stays_of_checkpoints():
    loss = {100: 3.0, 200: 2.0, 300: 2.0, 400: 2.5}
    steps = [100, 200, 300, 400, 500]
    keep = checkpoint.Retention
    assert keep(2).stays(steps, loss) == {400, 500}
    assert keep(1, every=200).stays(steps, loss) == {200, 400, 500}
    assert keep(1, best=True).stays(steps, loss) == {200, 500}
    assert keep(1, best=True).stays(steps, {}) == {500}
    assert keep(9, every=100, best=True).stays(steps, loss) == set(steps)


# -- failures ------------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_and_names_its_samples(trained):
    first, other = said(trained, "bad", 8, 2)
    assert first["error"] == other["error"] == "TrainingError"
    assert (first["said"], other["said"]) == (True, False)
    assert other["message"].startswith("step 5: loss or gradient is not finite (loss=nan")
    alone, mine = keys(trained, "one", 1), other["message"].split("samples: ")[1].split(", ")
    assert len(mine) == 6 and set(mine) < set(alone[5][0])


def test_ranks_agree_on_what_stands_for_broken_samples(trained):
    alone, shared = keys(trained, "skip_one", 1), keys(trained, "skip_two", 2)
    bad = {f"train-{16 + i:08d}" for i in BROKEN}
    for step, parts in shared.items():
        assert sorted(k for p in parts for k in p) == sorted(alone[step][0]) and not bad & set(alone[step][0])
    runs = trained.root / "runs"
    close(records(runs / "skip_two", "train", "val"), records(runs / "skip_one", "train", "val"))
    assert records(runs / "skip_two", "skipped") == records(runs / "skip_one", "skipped")
    assert sum(r["n"] for r in records(runs / "skip_one", "skipped")) >= 4


def test_data_that_one_rank_cannot_read_end_all_and_are_named_once(trained):
    told = "".join((trained.root / "said" / f"unread.rank-{r}.txt").read_text() for r in range(2))
    keys_ = "|".join(f"train-{16 + i:08d}" for i in BROKEN)
    found = re.findall(rf"error: (?:rank 1: )?.*broken/tokens/rgb/train/shard-000001.tar, sample '({keys_})': id \d+", told)
    assert 1 <= len(found) <= 2, told  # both may meet one in the same step
    assert "Traceback" not in told
    assert len(found) == 2 or told.count("another process of the run is gone or silent") == 1, told


def test_half_a_launcher_s_word_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="name no process of a group"):
        dist.place()
    monkeypatch.setenv("RANK", "1")
    assert dist.place() == dist.Place(1, 2, 1)
    with pytest.raises(UsageError, match="does not say where the others are: .*MASTER_ADDR"), dist.joined():
        pass


# -- from outside --------------------------------------------------------------------------------------------------------


def until(what, process, seconds=240):
    """Wait until what() is true while a process runs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not what():
        time.sleep(0.02)
    assert what(), process.communicate()[1] if process.poll() is not None else "it takes too long"


def long_run(space, name):
    (space.root / "tiny.yaml").write_text("{}")
    args = settings(name=name, train__batch=8, train__steps=100_000, train__checkpoint_every=100_000, train__val_samples=8)
    folder = space.root / "runs" / name
    command = ["-m", "nano4m_cli", "train", space.root / "tiny.yaml", *args, "--root", space.root, "--device", "cpu"]
    return folder, [str(a) for a in command], lambda: (folder / "metrics.jsonl").is_file() and len(records(folder)) > 2


def test_torchrun_stopped_by_its_scheduler(by_hand, tmp_path):  # noqa: F811
    space = linked(by_hand, tmp_path / "space")
    folder, command, begun = long_run(space, "cut")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child = subprocess.Popen(launch, env=environment(), **pipes)
    until(begun, child)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=120)
    note = json.loads((folder / "stopped.json").read_text())
    assert note["signal"] == "SIGTERM" and child.returncode != 0
    assert err.count(f"stopped at step {note['step']}, checkpoint saved; go on with --resume") == 1, err
    assert "2 processes" in err and "on cpu" in err and out == "" and "Error" not in err.split("stopped at")[0]
    assert checkpoint.load(checkpoint.latest(folder)).state["step"] == note["step"]


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others_with_a_word(by_hand, tmp_path):  # noqa: F811
    space = linked(by_hand, tmp_path / "space")
    folder, command, begun = long_run(space, "killed")
    at = port()
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    ranks = [subprocess.Popen([sys.executable, *command], env=environment(r, 2, at), **pipes) for r in range(2)]
    until(begun, ranks[0])
    ranks[1].kill()
    _, err = ranks[0].communicate(timeout=120)
    ranks[1].communicate()
    assert ranks[0].returncode == 1, err
    assert "error: another process of the run is gone or silent" in err and "go on from the last good checkpoint" in err
    assert "Traceback" not in err


def test_what_one_process_does_is_refused_by_several_and_said_once(tmp_path):
    (tmp_path / "t.yaml").write_text("task: tokenizer\ntokenizer: {modality: rgb}\n")
    for rank in (0, 1):
        place = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": "0"}
        result = run("train", tmp_path / "t.yaml", "--root", tmp_path, env=place)
        assert result.exit_code == 2 and result.stdout == ""
        told = "error: task: tokenizer runs by one process, this is one of 2\nhint: start it without torchrun\n"
        assert result.stderr == (told if rank == 0 else "")


def test_ranks_that_do_not_come_are_waited_for_in_minutes_not_for_ever(monkeypatch):
    for name, value in zip(PLACE, (0, 2, 0, "127.0.0.1", port()), strict=True):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(TrainingError, match=r"rank 0 of 2 did not meet the others at 127.0.0.1:\d+ within 0.02 min"):
        with dist.joined("cpu", 0.02):
            pass
    assert dist.ranks() == 1


@pytest.mark.slow
def test_shards_written_beside_training_survive_kills_at_any_moment(by_hand, tmp_path):  # noqa: F811
    """Both ranks are killed at once or one first, while shards are being written or not; the run ends as if nothing had been."""
    space, moments = linked(by_hand, tmp_path / "space"), random.Random(1)
    (space.root / "tiny.yaml").write_text("{}")
    changes = dict(train__parallel="fsdp", train__save_async=True, train__checkpoint_every=2, train__steps=80, train__ema=0.9,
                   train__val_samples=8, train__log_every=20)

    def ranks(name):
        args = ["-m", "nano4m_cli", "train", space.root / "tiny.yaml", *settings(name=name, **changes), "--root", space.root,
                "--device", "cpu", "--resume"]
        at, pipes = port(), dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        return [subprocess.Popen([sys.executable, *map(str, args)], env=environment(r, 2, at), **pipes) for r in range(2)]

    def newest(name):
        return max((p.name for p in (space.root / "runs" / name / "checkpoints").glob("step-*")), default="")

    whole = ranks("whole")
    assert [(p.communicate(timeout=240)[1], p.returncode)[1] for p in whole] == [0, 0]
    for n in range(2):
        before, both = newest("cut"), ranks("cut")
        until(lambda before=before: newest("cut") > before, both[0])
        time.sleep(moments.uniform(0.0, 0.3))
        for p in both if n % 2 else both[::-1]:
            p.kill()
        for p in both:
            p.communicate(timeout=60)
        for point in checkpoint.checkpoints(space.root / "runs" / "cut"):
            checkpoint.load(point)  # whatever has its name is whole
    assert newest("cut") < "step-00000080"
    last = ranks("cut")
    assert [(p.communicate(timeout=240)[1], p.returncode)[1] for p in last] == [0, 0]
    runs = space.root / "runs"
    assert weights(runs / "cut") == weights(runs / "whole")
    assert records(runs / "cut", "train", "val") == records(runs / "whole", "train", "val")
    assert status(runs / "cut").restarts == 2
