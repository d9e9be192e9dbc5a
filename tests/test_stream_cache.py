"""The cache of streamed shards: a disk that is full or goes away, and how much of it a run needs."""

from __future__ import annotations

import gc
import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest
from stream_server import Server
from test_bad_input import disk
from test_cli import run
from test_stream import NAMES, here, opened, published  # noqa: F401
from workspace_factory import by_hand, config, make_by_hand, one_thread, settings  # noqa: F401

from nano4m_cli.data import stream
from nano4m_cli.data.download import DiskError
from nano4m_cli.data.loader import TokenData
from nano4m_cli.data.shard_cache import RemoteFile, ShardCache, fetch_file
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import DataError
from nano4m_cli.train.run import prepare


def test_a_disk_that_fills_up_while_a_shard_comes(published, tmp_path):  # noqa: F811
    server, origin = published
    local = TokenData(origin.dataset(), "train", NAMES)
    size = local.columns[0].split.shards[0].index.tar_bytes
    with disk(tmp_path / "small", 4096 * (3 + size // 4096)):
        far = opened(server, here(tmp_path), folder=str(tmp_path / "small"))
        (tmp_path / "small" / "others").write_bytes(bytes(size // 2))
        with pytest.raises(DataError) as caught:
            far.read(np.arange(4))
        assert re.search("no room for|the disk is full", caught.value.message)
        assert f"{server.url}/tokens/rgb/train/shard-000000.tar" in caught.value.message
        assert "data.cache" in caught.value.hint and not list((tmp_path / "small").glob("*.tar"))
        (tmp_path / "small" / "others").unlink()
        with pytest.raises(DataError, match="no room|the disk is full"):
            far.read(np.arange(4))  # one fits, but not those of three modalities at a time
        del far, caught
        gc.collect()  # a mapped file holds its disk
    with disk(tmp_path / "small", 4096 * (16 + 4 * size // 4096)):
        far = opened(server, here(tmp_path), folder=str(tmp_path / "small"))
        for shard in (0, 1, 2, 0):  # older ones make room, though data.cache_gb allows more than the disk has
            assert np.array_equal(far.read(np.arange(4) + 16 * shard)[0], local.read(np.arange(4) + 16 * shard)[0])
            for column in far.columns:
                column.split._maps.clear()
        del far
        gc.collect()


@pytest.mark.parametrize("scheme", ["http", "memory"])
def test_a_write_that_fails_leaves_nothing_that_looks_whole(published, tmp_path, monkeypatch, scheme):  # noqa: F811
    import fsspec

    server, origin = published
    name = "tokens/rgb/train/shard-000000.tar"
    body = (origin.dataset().path / name).read_bytes()
    said = json.loads((origin.dataset().path / "tokens/manifest.json").read_text())["files"][name.removeprefix("tokens/")]
    fsspec.filesystem("memory").pipe("/bucket/shard.tar", body)
    file = RemoteFile(f"{server.url}/{name}" if scheme == "http" else "memory://bucket/shard.tar", said["bytes"], said["sha256"])
    cache = ShardCache(tmp_path / "cache", 1 << 30)
    cache.folder.mkdir()
    monkeypatch.setattr("nano4m_cli.data.shard_cache.BLOCK", 4096)
    with disk(cache.folder, 4096 * (1 + len(body) // 8192)):
        monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))  # others fill it
        with pytest.raises(DiskError, match="the disk is full: cannot write") as caught:
            cache.get(file)
        assert file.url in caught.value.message and "data.cache names another folder" in caught.value.hint
        assert not list(cache.folder.glob("*.tar"))
    assert cache.get(file).read_bytes() == body


def test_a_cache_folder_that_goes_away_or_is_none(published, tmp_path):  # noqa: F811
    server, origin = published
    local, where = TokenData(origin.dataset(), "train", NAMES), tmp_path / "cache"
    far = opened(server, here(tmp_path), folder=str(where))
    far.read(np.arange(4))
    shutil.rmtree(where)
    assert np.array_equal(far.read(np.arange(48))[0], local.read(np.arange(48))[0]), "made again, and what is mapped is kept"
    shutil.rmtree(where)
    where.write_text("in the way")
    far = opened(server, here(tmp_path), folder=str(where))
    with pytest.raises(DataError) as caught:
        far.read(np.arange(4))
    assert re.search(rf"cannot write {where}/[0-9a-f]+\.tar: Not a directory \(http.*shard-000000.tar\)", caught.value.message)
    assert "data.cache" in caught.value.hint


def test_a_disk_error_is_not_a_lost_shard(published, tmp_path):  # noqa: F811
    server, _ = published
    where = tmp_path / "cache"
    where.write_text("in the way")
    space = here(tmp_path)
    made = config(space.root, name="x", data__url=server.url, data__cache=where, data__skip_broken=True)
    with pytest.raises(DataError, match="Not a directory"):
        prepare(made, space).task.batch(0)


def test_other_file_systems_tell_a_break_from_a_write_that_fails(tmp_path):
    import fsspec

    fsspec.filesystem("memory").pipe("/bucket/file", b"abc")
    (tmp_path / "out.part").mkdir()
    with pytest.raises(DiskError, match="cannot write .*out.part: Is a directory"):
        fetch_file(RemoteFile("memory://bucket/file", 3, ""), tmp_path / "out")


# -- how much is enough ---------------------------------------------------------------------------------------------------


def test_a_cache_too_small_is_told_and_what_is_said_will_do(tmp_path, monkeypatch, one_thread):  # noqa: F811
    """16 shards of 3 modalities, 2 lanes: with what the warning asks for, an epoch fetches each once; without, some again."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("workspace_factory.SHARD", 4)
    monkeypatch.setattr("workspace_factory.SPLITS", {"train": 64, "val": 8})
    monkeypatch.setattr("nano4m_cli.data.stream.ASK_AGAIN", 0.0)
    monkeypatch.setattr("nano4m_cli.data.stream.KEPT", 2)
    origin = make_by_hand(tmp_path / "origin").dataset()
    stream.publish(origin, NAMES)
    sizes = [p.stat().st_size for p in origin.path.glob("tokens/*/train/*.tar") if p.parent.parent.name in NAMES]
    server = Server(origin.path)
    space = Workspace(here(tmp_path).root)
    more = {"data__url": server.url, "data__lanes": 2, "data__window": 2, "data__modalities": f"[{','.join(NAMES)}]"}

    def epoch(name, gigabytes):
        before = len(server.tars())
        prepared = prepare(config(space.root, data__cache=tmp_path / name, data__cache_gb=gigabytes, **more), space)
        for step in range(8):
            prepared.task.batch(step)
        return prepared.warnings, Counter(server.tars()[before:])

    at_once = 2 * 3 * sum(sizes) / 16
    (warning,), asked = epoch("small", 0.7 * at_once / 1e9)
    found = re.fullmatch(r"a cache of \S+ GB holds less than the (\S+) GB of shards that this node reads at a time: they will be "
                         r"fetched again and again; data.cache_gb=(\S+) would do", warning)
    assert float(found[1]) == pytest.approx(at_once / 1e9, rel=0.01) and max(asked.values()) > 1
    assert float(found[2]) == pytest.approx(2 * at_once * 1.01 / 1e9, rel=0.01)
    warnings, asked = epoch("enough", float(found[2]))
    assert warnings == [] and len(asked) >= 48 and set(asked.values()) == {1}
    (space.root / "tiny.yaml").write_text("{}")
    told = {**more, "data__cache_gb": 1e-5, "name": "dry"}
    result = run("train", space.root / "tiny.yaml", *settings(**told), "--dry-run", "--json", "--root", space.root)
    assert result.stderr.count("warning: a cache of 1e-05 GB holds less than") == 1
    assert json.loads(result.stdout)["warnings"][0].startswith("a cache of 1e-05 GB")
    server.close()
