"""What a run says of itself (status, stalls, sinks), and samples that cannot be read."""

import json
import multiprocessing
import os
import signal
import sys
import time
import types

import numpy as np
import pytest
import torch
from test_cli import run
from workspace_factory import by_hand, config, copied, linked, one_thread, records, settings, weights  # noqa: F401

from nano4m_cli.data.shards import Shard, write_shard
from nano4m_cli.errors import ConfigError, DataError, ShardError, TokenError
from nano4m_cli.train import loop, watch
from nano4m_cli.train.run import prepare, start
from nano4m_cli.train.sinks import open_sinks, scalars
from nano4m_cli.train.status import status
from nano4m_cli.train.watch import KeyLog, Watch, blame, spread, stall_line

pytestmark = pytest.mark.usefixtures("one_thread")


def train(space, callback=lambda record: None, resume=False, **changes):
    prepared = prepare(config(space.root, **changes), space)
    start(prepared, resume, "cpu", callback)
    return prepared.folder


# -- status -------------------------------------------------------------------------------------------------------------


def test_status_of_a_run_from_its_beginning_to_its_end(by_hand, tmp_path):  # noqa: F811
    space = linked(by_hand, tmp_path / "space")
    seen = []

    def look(record):
        if record.kind == "train":
            seen.append(status(space.root / "runs" / "tiny"))
            if record.step == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(space, look, train__val_every=2)
    assert [(s.state, s.step, s.steps, s.restarts) for s in seen] == [("running", i, 6, 0) for i in (1, 2, 3, 4)]
    assert seen[0].eta is None and seen[0].checkpoint is None and seen[3].checkpoint == "step-00000003"
    assert seen[3].eta > 0 and seen[3].rate > 0 and seen[3].val["step"] == 2 and 0 <= seen[3].silence < 60
    late = status(space.root / "runs" / "tiny", now=time.time() + 3600)
    assert late.state == "silent" and late.silence == pytest.approx(3600, abs=60)
    folder = train(space, resume=True, train__val_every=2)
    done = status(folder)
    assert (done.state, done.step, done.restarts, done.eta, done.ranks) == ("done", 6, 1, None, 1)
    assert done.train["loss"] == records(folder, "train")[-1]["loss"] and done.val["loss"] == records(folder, "val")[-1]["loss"]
    assert done.speed["tokens_per_s"]["min"] > 0 and 0 <= done.speed["data_wait"]["max"] < 1 and done.speed["memory_mb"]["min"] > 50
    with pytest.raises(DataError, match="is no run"):
        status(space.root / "runs")

    result = run("train", "--status", "--root", space.root)
    assert result.exit_code == 0 and "done, 1 restarts, 1 processes" in result.stdout and "6/6 (100.0%)" in result.stdout
    document = json.loads(run("train", "--status", "tiny", "--root", space.root, "--json").stdout)
    assert (document["state"], document["checkpoint"], document["restarts"]) == ("done", "step-00000006", 1)
    nothing = run("train", "--status", "tinny", "--root", space.root)
    assert nothing.exit_code == 2 and "did you mean 'tiny'?" in nothing.stderr
    assert run("train", "--root", space.root).exit_code == 2


def test_a_stop_leaves_a_flag_until_the_run_goes_on(by_hand, tmp_path):  # noqa: F811
    space = linked(by_hand, tmp_path / "space")

    def stop(record):
        if record.kind == "train" and record.step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.raises(loop.Stopped):
        train(space, stop)
    flag = space.root / "runs" / "tiny" / "stopped.json"
    note = json.loads(flag.read_text())
    assert (note["step"], note["steps"], note["signal"]) == (2, 6, "SIGUSR1")
    assert status(flag.parent).state == "stopped"
    train(space, resume=True)
    assert not flag.exists() and status(flag.parent).state == "done"


# -- stalls ---------------------------------------------------------------------------------------------------------------


def test_blame_falls_on_the_rank_that_took_half_of_the_step():
    assert blame(10.0, [0.1, 8.0, 0.2], [0.3] * 3) == {"what": "data", "rank": 1, "held": 8.0}
    assert blame(10.0, [0.1, 0.2], [9.0, 0.4]) == {"what": "computing", "rank": 0, "held": 9.0}
    assert blame(10.0, [0.1, 0.2], [0.3, 0.4]) == {"what": "other ranks", "rank": None, "held": None}
    note = {"seconds": 10.0, "median": 0.5, **blame(10.0, [0.1, 8.0], [0.3] * 2)}
    assert stall_line(7, note) == "warning: step 7 took 10.0 s, 20 times the median: rank 1 waited for data for 8.0 s"
    assert spread([3.0, 1.0, 2.0]) == {"min": 1.0, "median": 2.0, "max": 3.0, "min_rank": 1, "max_rank": 0}
    assert spread([3.0]) == {"min": 3.0, "median": 3.0, "max": 3.0}


def test_a_step_is_long_only_among_enough_others(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watch.time, "perf_counter", lambda: now[0])
    made = Watch(torch.device("cpu"), stall=5.0)

    def step(wait, seconds):
        made.begins()
        now[0] += wait
        made.fed(100)
        now[0] += seconds - wait
        return made.ends([made.wait], [0.0])

    assert step(8.0, 9.0) is None  # the first ones set the usual
    assert all(step(0.0, 0.5) is None for _ in range(20))
    assert step(0.0, 2.4) is None and step(0.0, 0.5) is None
    assert step(5.5, 6.0) == {"seconds": 6.0, "median": 0.5, "what": "data", "rank": 0, "held": 5.5}
    speed = made.speed()
    total = 9.0 + 20 * 0.5 + 2.4 + 0.5 + 6.0
    assert speed["tokens_per_s"]["median"] == pytest.approx(24 * 100 / total, abs=1e-3)
    assert speed["data_wait"]["max"] == pytest.approx(13.5 / total, abs=1e-3)


def test_a_long_wait_for_data_is_told(by_hand, tmp_path, monkeypatch):  # noqa: F811
    space = linked(by_hand, tmp_path / "space")
    prepared = prepare(config(space.root, train__steps=22, train__log_every=11, train__checkpoint_every=22), space)
    batch, lines = prepared.task.batch, []

    def slow(step):
        if step == 20:
            time.sleep(1.3)
        return batch(step)

    monkeypatch.setattr(prepared.task, "batch", slow)
    start(prepared, False, "cpu", lambda r: lines.append(r.note) if r.kind == "stall" else None)
    (told,) = records(prepared.folder, "stall")
    assert (told["step"], told["what"], told["rank"]) == (21, "data", 0) and told["held"] >= 1.3
    assert len(lines) == 1 and lines[0].startswith("warning: step 21 took ")
    assert status(prepared.folder).stalls == 1


def test_a_step_that_is_taking_long_is_told_once_while_it_lasts(monkeypatch):
    monkeypatch.setattr(watch, "FIRST", 0.2)
    made, told, doing = Watch(torch.device("cpu"), stall=5.0), [], ["computing"]
    with made.patrol(lambda: doing[0], told.append, 3):
        time.sleep(1.3)
        assert not told, "no step has begun"
        made.begins()
        end = time.monotonic() + 30
        while not told and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(1.2)
        assert len(told) == 1 and told[0].startswith("warning: rank 3: a step has taken ")
        made.fed(1)
        made.ends([0.0], [0.0])
        made.begins()
        made.fed(1)
        while len(told) < 2 and time.monotonic() < end:
            time.sleep(0.05)
    assert [line.rpartition(": ")[2] for line in told] == ["waiting for data", "computing"]


# -- sinks ----------------------------------------------------------------------------------------------------------------


def test_numbers_of_a_record():
    record = {"loss": 2, "speed": {"min": 1.5, "rank": 0}, "what": "data", "held": None, "told": True}
    assert dict(scalars("train", record)) == {"train/loss": 2.0, "train/speed/min": 1.5, "train/speed/rank": 0.0}


def test_a_sink_that_is_not_installed_is_told_before_anything_is_trained(by_hand, tmp_path, monkeypatch):  # noqa: F811
    space = linked(by_hand, tmp_path / "space")
    for name, module in (("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ConfigError) as err:
            train(space, name=name, train__sinks=f"[{name}]")
        assert f"train.sinks: {name} cannot be imported" in err.value.message and err.value.hint == f"pip install 'nano4m[{name}]'"
        assert not (space.root / "runs" / name / "metrics.jsonl").exists()
    with pytest.raises(ConfigError, match="sinks"):
        config(space.root, train__sinks="[graphite]")


def test_sinks_get_what_metrics_get(by_hand, tmp_path, monkeypatch):  # noqa: F811
    space, got = linked(by_hand, tmp_path / "space"), []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            got.append((name, step, value))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    session = types.SimpleNamespace(log=lambda figures: got.append(("wandb", figures["step"], figures.get("val/loss"))))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **kw: session))
    folder = train(space, train__sinks="[tensorboard, wandb]", train__val_every=3)
    assert [(s, v) for n, s, v in got if n == "train/loss"] == [(r["step"], r["loss"]) for r in records(folder, "train")]
    val = [(r["step"], r["loss"]) for r in records(folder, "val")]
    assert [(s, v) for n, s, v in got if n == "val/loss"] == val == [(s, v) for n, s, v in got if n == "wandb" and v is not None]
    assert any(n == "speed/tokens_per_s/median" for n, _, _ in got)


def test_tensorboard_s_own_reader_reads_the_figures(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (sink,) = open_sinks(["tensorboard"], tmp_path, {})
    for step in (1, 2, 3):
        sink("train", step, {"loss": 1.0 / step})
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(s, pytest.approx(1 / s)) for s in (1, 2, 3)]


# -- samples that cannot be read ------------------------------------------------------------------------------------------


def spoil(path, wanted):
    """Write ids outside the vocabulary into some samples of a shard, by key; return the keys."""
    shard = Shard(path)
    samples = []
    for i, key in enumerate(shard.keys):
        members = {m: shard.read(i, m) for m in shard.index.offset}
        if i in wanted:
            (name,) = members
            members[name] = members[name][:-2] + b"\xff\x7f"
        samples.append((key, members))
    write_shard(path, iter(samples))
    return [shard.keys[i] for i in wanted]


def seen(folder):
    lines = (folder / "keys" / "rank-00000.jsonl").read_text().splitlines()
    return {note["step"]: note["keys"] for note in map(json.loads, lines)}


def test_broken_samples_are_an_error_that_names_them_or_are_replaced_by_the_next(by_hand, tmp_path):  # noqa: F811
    space = copied(by_hand, tmp_path / "space")
    whole = train(space, name="whole", train__log_keys=True)
    order = [k for step in sorted(seen(whole)) for k in seen(whole)[step]]
    path = space.dataset().tokens("rgb", "train") / "shard-000001.tar"
    bad = spoil(path, [2, 3, 9])
    with pytest.raises(TokenError, match=f"shard-000001.tar, sample '({'|'.join(bad)})': id "):
        train(space, name="strict")
    for workers in (0, 1):
        folder = train(space, name=f"skip{workers}", data__skip_broken=True, train__log_keys=True, train__workers=workers)
    got, expected = seen(folder), {}
    for i, key in enumerate(order):  # 48 samples: 6 steps of 8 are one epoch
        j = i
        while order[j] in bad and j + 1 < len(order):
            j += 1
        expected.setdefault(i // 8 + 1, []).append(order[j] if order[j] not in bad else None)
        assert expected[i // 8 + 1][-1] in (None, got[i // 8 + 1][i % 8]), (i, key)
    assert sum(k in bad for step in got.values() for k in step) == 0 and sum(map(len, got.values())) == 48
    told = records(folder, "skipped")
    assert sum(r["n"] for r in told) == 3 and {r["step"] + 1 for r in told} == {i // 8 + 1 for i, k in enumerate(order) if k in bad}
    assert all(any(k in why and "shard-000001.tar" in why for why in r["samples"]) for r in told
               for k in [k for k in bad if order.index(k) // 8 == r["step"]])
    first = space.root / "runs" / "skip0"
    assert records(first) == records(folder) and weights(first) == weights(folder)


def test_a_shard_that_goes_away_while_it_is_read(by_hand, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("nano4m_cli.data.loader.CHECKED", 0.0)
    space = copied(by_hand, tmp_path / "space")
    path = space.dataset().tokens("caption", "train") / "shard-000002.tar"
    content = path.read_bytes()

    def cut(record):
        if record.kind == "train" and record.step == 2:
            path.unlink()
            path.write_bytes(content[:2048])

    with pytest.raises(ShardError, match=r"caption/train/shard-000002.tar has 2048 bytes, \d+ when it was opened \(sample 'train-"):
        train(space, cut, name="cut")

    path.write_bytes(content)
    path.with_suffix(".idx.json").touch()
    gone = train(space, lambda r: path.unlink(missing_ok=True) if r.step == 2 else None, name="gone", data__skip_broken=True,
                 train__steps=12, train__log_keys=True)
    keys = {k for step, some in seen(gone).items() if step > 3 for k in some}
    lost = set(json.loads(path.with_suffix(".idx.json").read_text())["keys"])
    assert len(lost) == 16 and not keys & lost and all(str(path) in why for r in records(gone, "skipped") for why in r["samples"])
    # Started anew without the shard, the same samples are left out.
    again = train(space, name="again", data__skip_broken=True, train__steps=12, train__log_keys=True)
    assert {s: k for s, k in seen(again).items() if s > 3} == {s: k for s, k in seen(gone).items() if s > 3}
    with pytest.raises(DataError, match="rgb has 3 shards in .*, caption has 2 in"):
        train(space, name="strict")


def test_nothing_readable_ends_with_a_reason(by_hand, tmp_path):  # noqa: F811
    space = copied(by_hand, tmp_path / "space")
    for i in range(3):
        spoil(space.dataset().tokens("depth", "train") / f"shard-{i:06d}.tar", range(16))
    with pytest.raises(DataError, match="samples on end cannot be read, the last because .*depth.*outside its vocabulary"):
        train(space, data__skip_broken=True)


def test_data_that_do_not_come_are_named(by_hand, tmp_path, monkeypatch):  # noqa: F811
    space = linked(by_hand, tmp_path / "space")
    prepared = prepare(config(space.root, train__workers=1, train__timeout=0.05, train__steps=3), space)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    batch = prepared.task.batch
    monkeypatch.setattr(prepared.task, "batch", lambda step: time.sleep(3600) if step == 1 else batch(step))
    told = "step 2: no data came within 0.05 min; waited for .*/train/shard-00000[012].tar: train-0"
    with pytest.raises(loop.TrainingError, match=told):
        start(prepared, False, "cpu", lambda record: None)
    assert not multiprocessing.active_children(), "who waits for ever does not outlive the run"


def test_rows_of_tokens_keep_their_order_where_none_is_broken(by_hand):  # noqa: F811
    from nano4m_cli.data.loader import TokenData

    data = TokenData(by_hand.dataset(), "train", ["rgb", "caption"])
    assert data.broken(np.arange(48), np.zeros(48, dtype=np.int64)) == {}


def test_keys_after_the_checkpoint_are_dropped_of_ranks_that_are_no_more_too(tmp_path):
    for rank in range(3):
        path = tmp_path / "keys" / f"rank-{rank:05d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({"step": s, "keys": [f"{rank}.{s}"]}) + "\n" for s in range(1, 6)) + '{"step": 6, "ke')
    log = KeyLog(tmp_path, 3)  # one process goes on where three were
    log.write(4, ["a"])
    steps = {p.name: [json.loads(line)["step"] for line in p.read_text().splitlines()] for p in (tmp_path / "keys").iterdir()}
    assert steps == {"rank-00000.jsonl": [1, 2, 3, 4], "rank-00001.jsonl": [1, 2, 3], "rank-00002.jsonl": [1, 2, 3]}
