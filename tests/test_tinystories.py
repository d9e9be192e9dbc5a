"""Source `tinystories` on files in the published layout: from a hub of our own, from a folder, and when there is neither."""

from __future__ import annotations

import json
import pickle
import socket

import pytest
from hub_server import Hub, use

from nano4m_cli.data.fetch import fetch, open_source
from nano4m_cli.data.shards import Split
from nano4m_cli.data.sources.tinystories import HELD, REPO, SEPARATOR, TRAIN, Source
from nano4m_cli.data.workspace import Workspace
from nano4m_cli.errors import FetchError
from nano4m_cli.train.tokenizing import make_tokenizer


def story(i: int, words: int = 20) -> str:
    return f"Once upon a time there was a cat named Tom{i}.\nIt said \u201cmeow\u201d " + "ran " * (i % words) + f"home {i}."


TRAINED, ASIDE = [story(i) for i in range(200)], [story(1000 + i) for i in range(40)]
BOTH = story(1003).replace("\n", " \n")  # a story of the validation file, but for white space


def published(stories: list[str], begin: str, end: str) -> bytes:
    return "\n".join(part for s in [begin, *stories, end] for part in (s, SEPARATOR)).removesuffix(SEPARATOR).encode()


FILES = {TRAIN: published([*TRAINED[:7], BOTH, *TRAINED[7:]], "end of a story", "begin of"),
         HELD: published([*ASIDE, ASIDE[5]], "u don't have to be scared", "")}


def run(space, *options):
    workspace = Workspace(space)
    source = open_source("tinystories", list(options), workspace)
    report = fetch(source, workspace, 1)
    assert pickle.loads(pickle.dumps(source)).options == source.options
    out = {}
    for split, count in report.info.splits.items():
        shards = Split(report.dataset.raw(split)) if count else ()
        found = [shards.locate(i) for i in range(len(shards))]
        out[split] = [s.read(j, "text.txt").decode() for s, j in found]
        labels = [json.loads(s.read(j, "labels.json")) for s, j in found]
        assert {x["file"] for x in labels} <= {TRAIN if split == "train" else HELD}
    return report, out


@pytest.fixture
def mirror(tmp_path):
    (tmp_path / "mirror").mkdir()
    for name, data in FILES.items():
        (tmp_path / "mirror" / name).write_bytes(data)
    return f"mirror={tmp_path / 'mirror'}"


def test_the_published_files_become_splits_without_their_broken_ends(mirror, tmp_path):
    report, got = run(tmp_path, mirror, "shard_size=30")
    assert got["train"] == TRAINED, "in order; but for the one that is held out"
    assert sorted(got["val"] + got["test"]) == sorted(ASIDE) and min(len(got["val"]), len(got["test"])) > 8
    info = report.info
    assert info.name == info.source == "tinystories" and info.modalities == ["text"] and not report.failures
    assert "2 were left out, as their words stand in val or test already" in info.notes and "CDLA-Sharing" in info.notes
    assert "dealt into val and test" in info.notes and "mirror" not in info.options
    again, _ = run(tmp_path, mirror, "shard_size=30")
    assert again.made == 0 and again.kept == 240
    assert make_tokenizer(report.dataset, "text", None, {}).options.vocab == 4096


def test_limits_and_passages(mirror, tmp_path):
    report, got = run(tmp_path, mirror, "limit=9", "chars=30", "name=few")
    whole, _ = "".join(got["train"]), run(tmp_path, mirror, "limit=9", "name=whole")[1]
    assert whole == "".join(TRAINED[:9]) == "".join(_["train"]) and len(_["val"]) == len(_["test"]) == 9
    assert max(map(len, got["train"])) == 30 and report.info.tokenizers["text"]["max_length"] == 31


def test_a_limited_fetch_downloads_the_beginning_only(tmp_path, monkeypatch, mirror):
    long = [story(i) + " and so on" * 150 for i in range(400)]
    hub = Hub({REPO: FILES | {TRAIN: published(long, "end", "begin"), "TinyStories-train.txt": b"x" * 5000}})
    use(hub, monkeypatch, tmp_path / "hf")
    report, got = run(tmp_path, "limit=20", "name=few")
    assert got["train"] == long[:20] and hub.commit in report.info.notes
    parts = list((tmp_path / "data/.cache/tinystories").rglob(f"first-*-{TRAIN}"))
    assert len(parts) == 1 and parts[0].stat().st_size < len(hub.repos[REPO][TRAIN])
    asked = len(hub.asked)
    assert run(tmp_path, "limit=20", "name=few")[0].kept == report.made and len(hub.asked) == asked
    full, got = run(tmp_path, "name=all")
    assert got["train"] == long and sorted({n for n, _ in hub.downloads()}) == [TRAIN, HELD]
    assert run(tmp_path, "limit=20", "name=few")[0].kept == report.made, "the same from the whole file"
    hub.close()


def test_without_a_network_it_says_which_files_to_put_where(tmp_path, monkeypatch):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        use(f"http://127.0.0.1:{nobody.getsockname()[1]}", monkeypatch, tmp_path / "hf")
        with pytest.raises(FetchError, match="cannot be reached") as caught:
            run(tmp_path)
    assert TRAIN in caught.value.hint and HELD in caught.value.hint and "mirror=DIR" in caught.value.hint
    (tmp_path / HELD).write_bytes(FILES[HELD])
    with pytest.raises(FetchError, match=f"holds no {TRAIN}\n") as caught:
        Source(Source.Options(mirror=str(tmp_path)), tmp_path / "cache").prepare(lambda *_: None)
    assert HELD in caught.value.hint
