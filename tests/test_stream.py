"""Token shards at an address: the same samples as a function of the step, whatever the server, the cache and the ranks do."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections import Counter

import numpy as np
import pytest
from stream_server import Server
from test_cli import run
from workspace_factory import by_hand, config, copied, one_thread, records, weights  # noqa: F401

from nano4m_cli.data import stream
from nano4m_cli.data.loader import TokenData
from nano4m_cli.data.shard_cache import RemoteFile, ShardCache, fetch_file
from nano4m_cli.data.stream_order import StreamOrder
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import ConfigError, DataError, FetchError
from nano4m_cli.train.run import prepare, start

NAMES = ["rgb", "audio", "caption"]


@pytest.fixture
def published(by_hand, tmp_path, monkeypatch):  # noqa: F811
    """A data set of 48 train samples in three shards, on a server."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    origin = copied(by_hand, tmp_path / "origin")
    stream.publish(origin.dataset(), NAMES)
    server = Server(origin.dataset().path)
    yield server, origin
    server.close()


@pytest.fixture
def quick(monkeypatch):
    """Retries without long waits."""
    monkeypatch.setattr("nano4m_cli.data.shard_cache.BACKOFF", 0.01)


def here(tmp_path, name="here"):
    (tmp_path / name).mkdir(exist_ok=True)
    return Workspace(tmp_path / name)


def opened(server, workspace, **cache):
    dataset = stream.open_remote(server.url, workspace)
    return TokenData(dataset, "train", NAMES, cache=stream.cache_of(dataset, **cache))


# -- order ------------------------------------------------------------------------------------------------------------

SIZES = [5, 9, 1, 7, 8, 4, 6, 11]


def slow_order(sizes, seed, batch, lanes, window, steps):
    """The order in words: a row of shards per epoch, cut into lanes, each shuffled window by window."""
    from nano4m_cli.rng import permutation

    samples = sum(sizes)
    names = [[(s, i) for i in range(n)] for s, n in enumerate(sizes)]
    first = np.cumsum([0, *sizes])
    span = max(1, int(window * np.mean(sizes)))
    walks = []
    for lane in range(lanes):
        walk, epoch = [], 0
        while len(walk) < steps * batch // lanes:
            row = [x for s in permutation(len(sizes), seed, "shards", epoch) for x in names[s]]
            mine = row[lane * samples // lanes : (lane + 1) * samples // lanes]
            for w in range(0, len(mine), span):
                part = mine[w : w + span]
                walk += [part[i] for i in permutation(len(part), seed, f"stream/{lane}/{w // span}", epoch)]
            epoch += 1
        walks.append(walk)
    each = batch // lanes
    batches = [[x for walk in walks for x in walk[s * each : (s + 1) * each]] for s in range(steps)]
    return [[int(first[s]) + i for s, i in b] for b in batches]


@pytest.mark.parametrize("lanes", [1, 2, 4, 12])
@pytest.mark.parametrize("window", [1, 3])
def test_order_is_the_slow_one_and_needs_no_history(lanes, window):
    wanted = slow_order(SIZES, 3, 12, lanes, window, 20)
    order = StreamOrder(SIZES, 3, 12, lanes, window)
    for step in [0, 1, 19, 7, 6, 0, 13]:
        assert order.at(np.arange(step * 12, (step + 1) * 12)).tolist() == wanted[step]
    assert order.at(np.arange(5, 100)).tolist() == [x for b in wanted for x in b][5:100]


def test_an_epoch_takes_every_sample_once_and_ranks_share_no_shard_but_at_the_seams():
    sizes = [10] * 64
    order = StreamOrder(sizes, 0, 32, 16)
    steps = np.stack([order.at(np.arange(s * 32, (s + 1) * 32)) for s in range(20)])  # 640 samples: an epoch
    assert sorted(steps.ravel().tolist()) == list(range(640))
    for ranks in (1, 2, 4, 16):
        rows = [order.rows(r, ranks) for r in range(ranks)]
        assert sorted(np.concatenate(rows).tolist()) == list(range(32))
        shards = [set((steps[:, r] // 10).ravel().tolist()) for r in rows]
        assert all(len(s) <= 64 // ranks + 1 for s in shards)
        assert sum(map(len, shards)) <= 64 + ranks
    near = steps[:5].ravel() // 10
    assert len(set(near.tolist())) <= 64
    again = [order.at(np.arange(640, 1280)).tolist() for _ in range(2)]
    assert again[0] == again[1] and sorted(again[0]) == list(range(640)) and again[0] != steps.ravel().tolist()


def test_lanes_of_unequal_length_drift_but_lose_nothing():
    order = StreamOrder(SIZES, 1, 4, 4)  # 51 samples: lanes of 12, 13, 13, 13
    taken = Counter(order.at(np.arange(51 * 4 * 13)).tolist())
    assert set(taken) == set(range(51)) and max(taken.values()) - min(taken.values()) <= 5
    assert sum(taken.values()) == 51 * 4 * 13


def test_what_is_ahead_holds_what_comes():
    order = StreamOrder([10] * 32, 0, 16, 8, 2)
    for step in (0, 3, 9, 21):
        for rank in range(4):
            rows = order.rows(rank, 4)
            soon = set(order.ahead(rows, step))
            for later in range(step, step + 10):  # a window holds 20 samples of a lane, a step takes two
                assert set((order.at(np.arange(later * 16, (later + 1) * 16))[rows] // 10).tolist()) <= soon
            assert len(soon) <= 2 * (2 * 2 + 2)


def test_lanes_that_do_not_divide():
    with pytest.raises(ConfigError, match="5 lanes do not divide a batch of 12"):
        StreamOrder(SIZES, 0, 12, 5)
    with pytest.raises(ConfigError) as caught:
        StreamOrder(SIZES, 0, 12, 4).rows(0, 3)
    assert "3, 6, 12" in caught.value.hint
    assert StreamOrder([100] * 3, 0, 64).lanes == 2 and StreamOrder([100] * 300, 0, 48).lanes == 8


# -- data -------------------------------------------------------------------------------------------------------------


def test_what_comes_is_what_was_published(published, tmp_path):
    server, origin = published
    local = TokenData(origin.dataset(), "train", NAMES)
    far = opened(server, here(tmp_path))
    assert not server.tars(), "opening fetches no shard"
    index = np.random.default_rng(0).permutation(48)
    assert np.array_equal(far.lengths(index), local.lengths(index)) and far.key(17) == local.key(17)
    assert not server.tars()
    for a, b in zip(far.read(index), local.read(index), strict=True):
        assert np.array_equal(a, b)
    assert len(server.tars()) == len(set(server.tars())) == 9
    far.read(index)
    again = TokenData(far.dataset, "train", NAMES)
    assert np.array_equal(again.read(index)[0], local.read(index)[0])
    assert len(server.tars()) == 9, "they are in the cache"
    assert stream.open_remote(server.url, Workspace(far.dataset.path.parent.parent)).path == far.dataset.path


def test_a_server_that_fails_and_cuts(published, tmp_path, quick):
    server, origin = published
    server.fails = {"tokens/rgb/train/shard-000000.tar": 503, "tokens/audio/train/shard-000001.tar": 500}
    server.cuts = {"tokens/rgb/train/shard-000001.tar": 3000, "tokens/manifest.json": 10}
    far, local = opened(server, here(tmp_path)), TokenData(origin.dataset(), "train", NAMES)
    assert np.array_equal(far.read(np.arange(48))[0], local.read(np.arange(48))[0])
    assert Counter(server.tars())["tokens/rgb/train/shard-000001.tar"] == 2, "went on after the break"


def test_a_shard_that_never_comes_is_named(published, tmp_path, quick):
    server, _ = published
    far = opened(server, here(tmp_path), wait=0.4)
    server.stalls.add("tokens/audio/train/shard-000001.tar")
    far.read(np.arange(16))
    began = time.monotonic()
    with pytest.raises(DataError) as caught:
        far.read(np.arange(48))
    assert f"{server.url}/tokens/audio/train/shard-000001.tar" in caught.value.message and caught.value.hint
    assert time.monotonic() - began < 30


def test_who_waits_for_a_transfer_shares_its_failure(published, tmp_path, quick):
    """A shard that is due while it is being fetched ahead is not tried for as long again."""
    server, _ = published
    name = "tokens/audio/train/shard-000001.tar"
    server.stalls.add(name)
    far = opened(server, here(tmp_path), wait=1.6)
    far.soon([1])
    while name not in server.asked:
        time.sleep(0.01)
    with pytest.raises(DataError, match=f"{name}.*5 attempts"):
        far.read(np.arange(16, 20))
    assert server.asked.count(name) == 5


def test_other_bytes_are_refused(published, tmp_path, quick):
    server, origin = published
    name = "tokens/rgb/train/shard-000000.tar"
    body = (origin.dataset().path / name).read_bytes()
    for instead, said in ((body + bytes(512), "larger than"), (body[:-1] + b"x", "sha256"), (body[:512], "sha256")):
        server.instead[name] = instead
        far = opened(server, here(tmp_path), folder=str(tmp_path / "cache"))
        with pytest.raises(DataError, match=said) as caught:
            far.read(np.arange(4))
        assert name in caught.value.message
        assert not list((tmp_path / "cache").glob(f"{far.columns[0].split.shards[0].file.sha256}.tar"))
    del server.instead[name]
    far.read(np.arange(4))


def test_cache_stays_in_its_bounds(published, tmp_path):
    server, origin = published
    size = max(p.stat().st_size for p in origin.dataset().path.rglob("*.tar"))
    far = opened(server, here(tmp_path), folder=str(tmp_path / "cache"), gigabytes=2.5 * size / 1e9)
    local = TokenData(origin.dataset(), "train", NAMES)
    for shard in (0, 1, 2, 0, 1, 2):
        index = np.arange(16) + 16 * shard
        assert np.array_equal(far.read(index)[0], local.read(index)[0])
        for column in far.columns:
            column.split._maps.clear()
        held = sum(p.stat().st_size for p in (tmp_path / "cache").glob("*.tar"))
        assert held <= 2.5 * size
    small = opened(server, here(tmp_path), folder=str(tmp_path / "small"), gigabytes=0.5 * size / 1e9)
    with pytest.raises(DataError, match="the cache holds") as caught:
        small.read(np.arange(4))
    assert "data.cache_gb" in caught.value.hint


def _get(folder, file, barrier):
    barrier.wait()
    ShardCache(folder, 1 << 30).get(file)


def test_processes_of_a_node_fetch_a_shard_once(published, tmp_path):
    server, origin = published
    path = "tokens/rgb/train/shard-000000.tar"
    said = json.loads((origin.dataset().path / "tokens" / "manifest.json").read_text())["files"][path.removeprefix("tokens/")]
    file = RemoteFile(f"{server.url}/{path}", said["bytes"], said["sha256"])
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    jobs = [context.Process(target=_get, args=(tmp_path / "cache", file, barrier)) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0, 0] and server.tars() == [path]


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_other_schemes_go_through_fsspec(published, tmp_path, scheme):
    import fsspec

    _, origin = published
    source = origin.dataset().path
    url = f"file://{source}"
    if scheme == "memory":
        url = "memory://bucket/set"
        memory = fsspec.filesystem("memory")
        for p in source.rglob("*"):
            if p.is_file():
                memory.pipe(f"/bucket/set/{p.relative_to(source)}", p.read_bytes())
    dataset = stream.open_remote(url, here(tmp_path))
    far, local = TokenData(dataset, "train", NAMES), TokenData(origin.dataset(), "train", NAMES)
    assert np.array_equal(far.read(np.arange(48))[0], local.read(np.arange(48))[0])


def test_a_break_of_another_file_system_is_gone_on_with(tmp_path, monkeypatch, quick):
    import fsspec

    body = bytes(range(256)) * 40
    fsspec.filesystem("memory").pipe("/bucket/file", body)
    real, breaks = fsspec.implementations.memory.MemoryFile.read, [OSError("reset"), TimeoutError("slow")]
    monkeypatch.setattr("nano4m_cli.data.shard_cache.BLOCK", 4000)

    def read(self, size=-1):
        if breaks and self.tell() >= 4000:
            raise breaks.pop()
        return real(self, size)

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFile, "read", read)
    dest = tmp_path / "out"
    fetch_file(RemoteFile("memory://bucket/file", len(body), ""), dest)
    assert dest.read_bytes() == body and not breaks
    with pytest.raises(FetchError, match="no such file"):
        fetch_file(RemoteFile("memory://bucket/none", -1, ""), tmp_path / "none")


# -- opening ----------------------------------------------------------------------------------------------------------


def test_bad_addresses_and_names(published, tmp_path, quick):
    server, origin = published
    space = here(tmp_path)
    with pytest.raises(ConfigError, match="no scheme"):
        stream.open_remote("/data/scenes", space)
    with pytest.raises(FetchError, match="404"):
        stream.open_remote(server.url + "/no/where", space)
    server.instead["tokens/manifest.json"] = b'{"format": 1, "files": {"../../evil": {"bytes": 1, "sha256": ""}}, "info": {}}'
    with pytest.raises(DataError, match="names that lead elsewhere"):
        stream.open_remote(server.url, space)
    server.instead["tokens/manifest.json"] = b"[]"
    with pytest.raises(DataError, match="is no manifest"):
        stream.open_remote(server.url, space)
    del server.instead["tokens/manifest.json"]
    assert not (space.root / "data" / "scenes").exists()
    with pytest.raises(DataError, match="holds other data"):
        stream.open_remote(server.url, origin)
    assert stream.open_remote(server.url, origin, "far").name == "far"


# -- training ---------------------------------------------------------------------------------------------------------


def trained(root, name, resume=False, callback=lambda record: None, **changes):
    workspace = Workspace(root)
    made = config(root, name=name, data__modalities=f"[{','.join(NAMES)}]", **changes)
    start(prepare(made, workspace), resume, "cpu", callback)
    return root / "runs" / name


def test_training_from_an_address_resumes_bit_for_bit(published, tmp_path, one_thread):  # noqa: F811
    server, _ = published
    root = here(tmp_path).root
    whole = trained(root, "whole", data__url=server.url, train__steps=6, data__window=1)
    trained(root, "parts", data__url=server.url, train__steps=6, data__window=1)
    cut = root / "runs" / "parts" / "checkpoints"
    shutil.rmtree(sorted(cut.iterdir())[-1])
    shutil.rmtree(root / "data" / ".cache")
    parts = trained(root, "parts", True, data__url=server.url, train__steps=6, data__window=1, data__cache_gb=1)
    assert weights(parts) == weights(whole) and records(parts, "train") == records(whole, "train")


def test_the_command_line_publishes_and_trains(published, tmp_path):
    server, origin = published
    done = run("tokenize", "--publish", "--json", "--root", origin.root)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["manifest"].endswith("tokens/manifest.json")
    space = here(tmp_path)
    (space.root / "tiny.yaml").write_text("train: {batch: 8}\n")
    args = ["train", space.root / "tiny.yaml", f"data.url={server.url}", "model.size=d1-1w64", "--dry-run", "--root", space.root]
    assert run(*args).exit_code == 0
