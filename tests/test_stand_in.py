"""What stands in for samples of a stream that cannot be had: the same in every process, and after every resume."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections import Counter

import numpy as np
import pytest
from stream_server import Server
from test_stream import NAMES, SIZES, here, trained
from test_watch import seen, spoil
from workspace_factory import make_by_hand, one_thread, records, weights  # noqa: F401

from nano4m_cli.data import stream
from nano4m_cli.data.stand_in import StandIns
from nano4m_cli.data.stream_order import StreamOrder
from nano4m_cli.errors import DataError
from nano4m_cli.train.status import status


class Data:
    """Shards of which some cannot be had and some samples are damaged; `asked` counts how often each was asked for."""

    def __init__(self, lost=(), damaged=()):
        self.lost, self.damaged, self.asked = set(lost), set(damaged), Counter()

    def missed(self, shards):
        self.asked.update(shards)
        return {s: f"shard {s} is gone" for s in shards if s in self.lost}

    def broken(self, index_B, variant_B):
        return {i: f"sample {s} is damaged" for i, s in enumerate(index_B.tolist()) if s in self.damaged}


def slow(order, lost, damaged, lane, k):
    """The rule in words, over lists: (sample that is read, whether it stands in)."""
    long, first = int(order.bounds[lane + 1] - order.bounds[lane]), order.first.tolist()
    of = lambda sample: max(s for s in range(len(order.sizes)) if first[s] <= sample)  # noqa: E731

    def walk(k):
        return int(order.walk(np.array([lane]), np.array([k]))[0])

    began = k
    while True:
        epoch, place = divmod(k, long)
        begin = place // order.span * order.span
        window = [walk(epoch * long + p) for p in range(begin, min(begin + order.span, long))]
        if {of(s) for s in window} <= lost:
            k += order.span
        elif of(walk(k)) in lost or walk(k) in damaged:
            k += 1
        else:
            return walk(k), k != began


@pytest.mark.parametrize("lanes, window, lost, damaged", [
    (1, 1, {3}, {7}), (2, 1, {0, 4, 7}, set()), (4, 3, {1, 5}, {0, 1, 2, 30}), (2, 2, {6, 7}, set(range(5, 9)))])
def test_the_next_that_can_be_had_stands_in(lanes, window, lost, damaged):
    order = StreamOrder(SIZES, 5, 4, lanes, window)
    stand_ins = StandIns(Data(lost, damaged), order)
    for step in [*range(30), 3, 0]:
        counter = np.arange(4 * step, 4 * step + 4)
        found = stand_ins.readable(counter, np.zeros(4))
        want = [slow(order, lost, damaged, lane, k) for lane, k in zip(*(x.tolist() for x in order.places(counter)), strict=True)]
        assert found.index_B.tolist() == [s for s, _ in want]
        assert sorted(found.skipped) == [i for i, (_, other) in enumerate(want) if other]
        assert {s for _, _, s in found.lost} <= lost
        later = StandIns(Data(lost, damaged), order)  # without a past
        assert later.readable(counter, np.zeros(4)).index_B.tolist() == found.index_B.tolist()


def test_a_lost_shard_is_shared_out_among_its_neighbours():
    """No sample stands in for many, though windows are of one shard."""
    order = StreamOrder([20] * 12, 1, 8, 2, 1)
    stand_ins = StandIns(Data({2, 9}), order)
    taken = Counter(s for step in range(30) for s in stand_ins.readable(np.arange(8 * step, 8 * step + 8), np.zeros(8)).index_B)
    assert sum(taken.values()) == 240 and len(taken) == 200 and max(taken.values()) <= 2


def test_losses_hold_for_an_epoch_and_are_taken_over():
    data, order = Data({2}), StreamOrder([4] * 6, 0, 4, 1, 2)
    stand_ins = StandIns(data, order)
    steps = lambda who, steps: [who.readable(np.arange(4 * s, 4 * s + 4), np.zeros(4)).index_B.tolist() for s in steps]  # noqa: E731
    first = steps(stand_ins, range(6))
    lost = [[*key, why] for key, why in stand_ins.decided.items() if why]
    assert lost == [[0, 0, 2, "shard 2 is gone"]] and data.asked[2] == 1
    data.lost.clear()
    assert steps(stand_ins, range(6)) == first and data.asked[2] == 1, "decided is decided"
    second = steps(stand_ins, range(6, 12))
    assert sorted(sum(second, [])) == list(range(24)), "the next epoch has it again"
    resumed = StandIns(data, order)
    resumed.restore(lost)
    assert steps(resumed, range(3, 6)) == first[3:]
    assert steps(StandIns(data, order), range(6)) != first


def _decides(stand_ins, data, out):
    stand_ins.data = data
    out.put(stand_ins.readable(np.arange(4), np.zeros(4)).index_B.tolist())


def test_loader_processes_agree_though_the_server_changes_its_mind():
    order = StreamOrder([4] * 6, 0, 4, 1, 1)
    shard = int(order.at(np.arange(4))[0]) // 4
    stand_ins, out = StandIns(Data(), order), multiprocessing.get_context("fork").Queue()
    for data in (Data({shard}), Data()):
        job = multiprocessing.get_context("fork").Process(target=_decides, args=(stand_ins, data, out))
        job.start()
        job.join(60)
    assert out.get(timeout=60) == out.get(timeout=60)
    assert shard not in {s // 4 for s in stand_ins.readable(np.arange(4), np.zeros(4)).index_B.tolist()}


def test_an_outage_is_not_skipped():
    stand_ins = StandIns(Data(range(12)), StreamOrder([4] * 12, 0, 4, 1, 1))
    with pytest.raises(DataError, match="5 shards on end cannot be had, the last because shard"):
        stand_ins.readable(np.arange(4), np.zeros(4))
    stand_ins = StandIns(Data((), range(400)), StreamOrder([100] * 4, 0, 4, 1, 1))
    with pytest.raises(DataError, match="100 samples on end cannot be read"):
        stand_ins.readable(np.arange(4), np.zeros(4))


# -- training -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path, monkeypatch):
    """12 shards of 4 samples at a server that has lost one, serves other bytes for one, and never answers for one; two samples
    were damaged before they were published."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("workspace_factory.SHARD", 4)
    monkeypatch.setattr("workspace_factory.SPLITS", {"train": 48, "val": 8})
    origin = make_by_hand(tmp_path / "origin").dataset()
    spoil(origin.tokens("audio", "train") / "shard-000007.tar", [1, 2])
    stream.publish(origin, NAMES)
    server = Server(origin.path)
    server.gone = {"tokens/rgb/train/shard-000001.tar"}
    server.instead = {"tokens/caption/train/shard-000003.tar": b"other"}
    server.stalls = {"tokens/audio/train/shard-000008.tar"}
    yield server
    server.close()


def test_lost_shards_are_told_and_counted_and_a_resume_is_exact(damaged, tmp_path, one_thread, monkeypatch):  # noqa: F811
    root = here(tmp_path).root
    more = {"data__url": damaged.url, "data__skip_broken": True, "data__wait": 0.4, "data__window": 2, "train__steps": 12,
            "train__log_keys": True, "train__keep": 9}
    told = []
    with pytest.raises(DataError, match="no data: "):
        trained(root, "strict", **{**more, "data__skip_broken": False})
    whole = trained(root, "whole", callback=told.append, **more)
    workers = trained(root, "workers", **more, train__workers=2)
    assert weights(workers) == weights(whole) and seen(workers) == seen(whole)
    skips = records(whole, "skipped")
    assert [(r["step"], r["n"]) for r in skips] == [(r["step"], r["n"]) for r in records(workers, "skipped")]
    bad = {*range(4, 8), *range(12, 16), *range(32, 36), 29, 30}
    used = Counter(int(k.removeprefix("train-")) for step in range(1, 7) for k in seen(whole)[step])
    assert not set(used) & bad and sum(used.values()) == 48 and len(used) == 34, "an epoch"
    assert sum(r["n"] for r in skips if r["step"] < 6) == 14
    why = Counter(w for r in skips if r["step"] < 6 for w in r["samples"])
    for said, n in (("rgb/train/shard-000001.tar: HTTP 404", 4), ("caption/train/shard-000003.tar", 4),
                    ("audio/train/shard-000008.tar", 4), ("audio/train/shard-000007.tar, sample 'train-", 2)):
        assert sum(count for w, count in why.items() if said in w and damaged.url in w) == n, (said, why)
    lines = [r.note for r in told if r.kind == "skipped"]
    assert 6 <= len(lines) <= 9, "once in each of two epochs, and a look into the third"
    assert all("others stand in for its 4 samples in this epoch" in x and x.startswith("warning: step ") for x in lines)
    # The server is whole again: what was lost stays so for the epoch, by the checkpoint, and comes back in the next.
    damaged.gone, damaged.instead, damaged.stalls = set(), {}, set()
    for step in (9, 12):
        shutil.rmtree(whole / "checkpoints" / f"step-{step:08d}")
    shutil.rmtree(root / "data" / ".cache")
    before, lost = seen(whole), json.loads((whole / "checkpoints" / "step-00000006" / "state.json").read_text())["lost"]
    later = {shard for _, epoch, shard, _ in lost if epoch}  # looked at already by who walked out of the first epoch
    assert {shard for _, epoch, shard, _ in lost if not epoch} == {1, 3, 8} > later
    resumed = trained(root, "whole", True, **more)
    assert {s: seen(resumed)[s] for s in range(1, 7)} == {s: before[s] for s in range(1, 7)}
    again = Counter(int(k.removeprefix("train-")) for step in range(7, 13) for k in seen(resumed)[step])
    assert {s for s in range(48) if s // 4 not in later} - {29, 30} <= set(again), "the next epoch has all but the damaged"
    assert not {29, 30} & set(again)
    told = [r["step"] for r in records(resumed, "skipped")]
    assert told == sorted(set(told)), "none twice"
    assert status(resumed).skipped == sum(r["n"] for r in records(resumed, "skipped")) >= 14


def test_with_nothing_lost_it_is_the_same_run(tmp_path, monkeypatch, one_thread):  # noqa: F811
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    origin = make_by_hand(tmp_path / "origin").dataset()
    stream.publish(origin, NAMES)
    server = Server(origin.path)
    root = here(tmp_path).root
    plain = trained(root, "plain", data__url=server.url)
    skipping = trained(root, "skipping", data__url=server.url, data__skip_broken=True)
    server.close()
    assert weights(plain) == weights(skipping)
    assert records(plain, "train", "val", "skipped") == records(skipping, "train", "val", "skipped")
